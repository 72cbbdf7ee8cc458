"""What capture keeps is what the target said, position by position, recomputed here without the engine."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from serving.engine import Generation, GenerationRequest, SamplingParams
from serving.engine.sampling import SamplingMetadata, processed_logprobs
from serving.local import LocalEngine, load_engine
from serving.options import EngineOptions
from tests.support.tiny_models import save_tiny_pair

PROMPT = (5, 6, 7, 8, 9)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    paths = save_tiny_pair(tmp_path_factory.mktemp("pair"))
    with load_engine(
        *paths, options=EngineOptions(num_draft_tokens=3, num_slots=4, max_seq_len=128)
    ) as engine:
        yield engine


def _captured(engine: LocalEngine, sampling: SamplingParams) -> Generation:
    """Beside two batch mates that are not captured."""
    mates = [
        engine.submit(GenerationRequest(f"mate-{index}", (30, 31), SamplingParams(max_tokens=12, seed=index)))
        for index in range(2)
    ]
    handle = engine.submit(GenerationRequest("captured", PROMPT, sampling, capture=True))
    assert not any(mate.result(30).captured_rounds for mate in mates)
    return handle.result(30)


def test_a_captured_row_keeps_nothing_of_its_batch_mates_alive(engine: LocalEngine) -> None:
    generation = _captured(engine, SamplingParams(temperature=0.0, max_tokens=20))
    arrays = [value for trace in generation.captured_rounds for value in vars(trace).values()]
    kept = [array for array in arrays if isinstance(array, np.ndarray)]
    assert kept and all(array.base is None for array in kept), "a view keeps the whole round's array"


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0, max_tokens=20),
        SamplingParams(temperature=0.7, max_tokens=20),
        SamplingParams(temperature=1.6, seed=4, max_tokens=20, top_k=9),
    ],
    ids=["greedy", "standard", "coupled"],
)
def test_every_verified_position_holds_what_the_target_said(
    engine: LocalEngine, sampling: SamplingParams
) -> None:
    generation = _captured(engine, sampling)
    text = [*PROMPT, *generation.output_token_ids]
    distribution = SamplingMetadata.stack(
        [(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)]
    )
    next_start = len(PROMPT)
    for trace in generation.captured_rounds:
        assert trace.start == next_start
        drafted = trace.drafted_token_ids_G.tolist()
        context = torch.tensor([text[: trace.start] + drafted])
        logits_EV = engine.pair.target(context, use_cache=False).logits[0, trace.start - 1 :].float()
        logprobs_EV = logits_EV.log_softmax(-1)
        kept = logprobs_EV.gather(1, torch.tensor(trace.topk_token_ids_EK, dtype=torch.int64))
        assert np.allclose(kept, trace.topk_logprobs_EK, atol=2e-2, rtol=2e-3)
        final_EV = processed_logprobs(logits_EV[None], distribution)[0]
        if sampling.temperature and not sampling.top_k:
            exact = logprobs_EV / sampling.temperature + torch.tensor(trace.retemper_E)[:, None]
            assert torch.allclose(exact, final_EV, atol=1e-4)
        drafted_distribution = [float(final_EV[g, token]) for g, token in enumerate(drafted)]
        assert trace.drafted_target_logprobs_G.tolist() == pytest.approx(drafted_distribution, abs=1e-3)
        emitted = text[trace.start : trace.start + len(trace.emitted_target_logprobs_C)]
        emitted_distribution = [float(final_EV[position, token]) for position, token in enumerate(emitted)]
        assert trace.emitted_target_logprobs_C.tolist() == pytest.approx(emitted_distribution, abs=1e-3)
        assert emitted[: trace.num_accepted] == drafted[: trace.num_accepted]
        next_start += len(emitted)
    assert next_start == len(text)


def test_positions_after_the_first_rejection_are_kept_too(engine: LocalEngine) -> None:
    generation = _captured(engine, SamplingParams(temperature=0.0, max_tokens=20))
    rounds = generation.captured_rounds
    assert any(trace.num_attempted < len(trace.drafted_token_ids_G) for trace in rounds)
    assert all(len(trace.topk_token_ids_EK) == len(trace.drafted_token_ids_G) + 1 for trace in rounds)
    assert all(trace.topk_token_ids_EK.shape[1] == 32 for trace in rounds)


def test_a_vocabulary_smaller_than_k_keeps_all_of_it() -> None:
    from tests.support.table_engine import table_engine
    from tests.support.table_model import TableModel

    with table_engine(TableModel(6, 1), TableModel(6, 2), num_draft_tokens=2) as engine:
        handle = engine.submit(GenerationRequest("r", (1, 2), SamplingParams(max_tokens=6), capture=True))
        for trace in handle.result(10).captured_rounds:
            assert sorted(trace.topk_token_ids_EK[0].tolist()) == list(range(6))
