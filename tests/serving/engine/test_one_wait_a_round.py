"""On a GPU a round waits for its device once: everything else is sent, run and decided there."""

import pytest
import torch

from serving.drafters.model_drafter import ModelDrafter
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.passes.runner import Runner
from serving.engine.passes.static_check import static_pass_of
from serving.engine.passes.transfer import by_one_copy, to_device, to_host
from serving.engine.proposal import DraftAssignment, DraftPlan, ServingDraft
from serving.engine.round import run_round
from serving.engine.sequence import Batch, Sequence
from tests.support.host_reads import HostReads
from tests.support.tiny_models import tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=60)
STANDARD = SamplingParams(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, max_tokens=60)
COUPLED = SamplingParams(temperature=0.8, seed=3, max_tokens=60)
BATCHES = {
    "greedy": [GREEDY] * 3,
    "standard": [STANDARD] * 3,
    "coupled": [COUPLED] * 3,
    "mixed": [GREEDY, STANDARD, COUPLED],
    "logprobs": [SamplingParams(temperature=1.0, logprobs=3, max_tokens=60), GREEDY],
}


def _runner(num_layers: int) -> Runner:
    torch.manual_seed(num_layers)
    model = tiny_model("qwen3", num_layers, 64).requires_grad_(False).eval()
    runner = Runner(model, num_slots=4, max_seq_len=96)
    runner.static = static_pass_of(runner)
    return runner


def _batch(params: list[SamplingParams], capture: bool) -> Batch:
    return Batch(
        [
            Sequence(
                GenerationRequest(str(row), tuple(range(1, 4 + row)), each, capture=capture),
                frozenset(),
                lambda event: None,
            )
            for row, each in enumerate(params)
        ],
        vocab_size=64,
    )


def _plan(drafter: ModelDrafter, lengths: list[int]) -> DraftPlan:
    drafts_B = (ServingDraft("default", drafter.draft_version),) * len(lengths)
    return DraftPlan(drafts_B, (DraftAssignment(drafter, lengths),) if any(lengths) else ())


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_a_round_waits_for_its_device_once(kind: str, capture: bool) -> None:
    target, drafter = _runner(2), ModelDrafter(_runner(1))
    batch = _batch(BATCHES[kind], capture)
    generator = torch.Generator().manual_seed(0)
    for drafted in ([3] * len(batch), [0] * len(batch), [2, 0, 4][: len(batch)]):
        before = batch.lengths()
        with HostReads() as reads:
            run_round(batch, _plan(drafter, drafted), target, generator)
        assert reads.places == []
        assert reads.num_host_calls == 1
        assert all(now > then for now, then in zip(batch.lengths(), before, strict=True))


@pytest.mark.parametrize("kind", BATCHES)
def test_a_round_in_which_several_drafts_draft_waits_for_its_device_once(kind: str) -> None:
    target, drafters = _runner(2), [ModelDrafter(_runner(1)) for _ in range(2)]
    batch = _batch(BATCHES[kind], capture=True)
    lengths = [[3 * (row % 2 == number) for row in range(len(batch))] for number in range(2)]
    shares = tuple(DraftAssignment(drafter, each) for drafter, each in zip(drafters, lengths, strict=True))
    drafts_B = tuple(ServingDraft(f"r{row % 2}", row % 2) for row in range(len(batch)))
    with HostReads() as reads:
        report = run_round(batch, DraftPlan(drafts_B, shares), target, torch.Generator().manual_seed(0))
    assert reads.places == []
    assert reads.num_host_calls == 1
    assert report.draft_passes == (3, 3)
    assert [advance.num_drafted for advance in report.advances] == [3] * len(batch)
    captured = [sequence.captured_rounds[0] for sequence in batch.sequences]
    assert [(each.draft_route, each.draft_version) for each in captured] == [
        (f"r{row % 2}", row % 2) for row in range(len(batch))
    ]


def test_catching_up_by_chunks_waits_for_nothing_more() -> None:
    target, drafter = _runner(2), ModelDrafter(_runner(1), chunk_tokens=16)
    batch = _batch([GREEDY], capture=False)
    batch.sequences[0].token_ids.extend([5] * 60)
    with HostReads() as reads:
        report = run_round(batch, _plan(drafter, [3]), target)
    assert report.num_chunks == 1
    assert [place for place in reads.places if "slot_cache" not in place] == []  # only there: on processors
    assert reads.num_host_calls == 1


def test_the_counter_sees_a_wait() -> None:
    values = torch.tensor([1.0, 2.0])
    with HostReads() as reads:
        values.tolist()
        values[0].item()
        bool(values[0] > 0)
        values[values > 1]
        values[[0]]
        torch.tensor([1])
    assert len(reads.places) == 6


def test_what_is_brought_to_the_host_is_what_was_on_the_device() -> None:
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "halves": torch.randn(3, 2, 5).half(),
        "logprobs": torch.randn(3, 4).t(),
        "nothing": torch.zeros((3, 0), dtype=torch.int64),
        "ids": torch.randint(2**40, (3, 7)),
        "small": torch.randint(2**20, (1, 3), dtype=torch.int32),
    }
    for arrays in (to_host(tensors), by_one_copy(tensors)):
        assert arrays.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert arrays[name].shape == tuple(tensor.shape)
            assert arrays[name].tolist() == tensor.tolist()
            assert arrays[name].flags.aligned
    sent = to_device([[1, 2], range(3, 5)], "cpu")
    assert sent.dtype == torch.int64 and sent.tolist() == [[1, 2], [3, 4]]
