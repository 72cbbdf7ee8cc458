"""Greedy and coupled texts, token by token, as they have always been: what a change of the engine must keep.

The texts are not the engine's own: `python -m tests.serving.engine.test_goldens` decodes them by whole passes
of the target alone and rewrites goldens.json. It asserts that at every position the best token leads by more
than MIN_GAP, so that no processor's arithmetic decides which one is said.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor, nn

from buffer.names import DEFAULT_ROUTE
from serving.engine import Generation, GenerationRequest, SamplingParams, TokenEvent
from serving.engine.stats import SwapReport
from serving.local import LocalEngine, load_engine
from serving.models.draft_weights import StagedWeights
from serving.models.loading import load_pair
from serving.options import EngineOptions
from tests.support.reference import coupled_noise, next_distribution
from tests.support.tiny_adapters import tiny_adapter
from tests.support.tiny_models import save_tiny_pair

GOLDENS = Path(__file__).with_name("goldens.json")
MIN_GAP = 1e-3
"""Of the scores that are compared: log-probabilities, and coupled noise on top for coupled texts."""
NUM_TOKENS = 24
SWAP_ROUND = 4
PROMPTS = [
    (10, 20, 30),
    (40,),
    (50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61),
    (70, 80),
    (90, 91, 92, 93, 94),
    (100, 3, 200),
    (300, 301, 302, 303),
    (150, 140, 130, 120, 110, 100, 90),
]
PLAIN = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
PENALISED = replace(
    PLAIN, presence_penalty=0.6, frequency_penalty=0.4, repetition_penalty=1.2, logit_bias={77: 2.0}
)


def sampling_of(case: str, row: int) -> SamplingParams:
    found = PENALISED if "penalties" in case else PLAIN
    return replace(found, temperature=0.8, seed=1000 + row) if "coupled" in case else found


CASES = ("greedy", "greedy with penalties", "coupled", "coupled with penalties")


@pytest.fixture(scope="module", params=["another draft", "the target drafts"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    torch.set_num_threads(1)
    target, draft = save_tiny_pair(tmp_path_factory.mktemp("pair"))
    options = EngineOptions(num_slots=8, max_seq_len=64, num_draft_tokens=3, compile="off")
    drafter = draft if request.param == "another draft" else target
    with load_engine(target, drafter, replace(options, speculation="model")) as running:
        yield running


@pytest.fixture(scope="module")
def staged(engine: LocalEngine) -> StagedWeights:
    """Of an adapter under which this draft drafts other tokens."""
    assert engine.drafts is not None
    pair = engine.pair
    adapter = tiny_adapter(pair.draft_id, draft_version=1, target_revision=pair.target_revision)
    return engine.drafts.stage("default", *adapter)


def generations(
    engine: LocalEngine, case: str, num_rows: int, swapped: StagedWeights | None
) -> list[Generation]:
    """All queued before the first round: the engine's thread is held until then, in the callback of a request
    before them. The swap is asked for in the round before the one that it comes into."""
    is_held, is_queued = threading.Event(), threading.Event()
    swaps: list[Future[SwapReport]] = []
    batch_sizes: list[int] = []

    def hold(event: TokenEvent) -> None:
        is_held.set()
        is_queued.wait()

    def count(event: TokenEvent) -> None:
        batch_sizes.append(engine.stats().num_running)
        if swapped is not None and len(batch_sizes) == SWAP_ROUND - 1:
            swaps.append(engine.swap(swapped))

    engine.submit(GenerationRequest("holds", (9,), replace(PLAIN, max_tokens=1)), hold)
    is_held.wait()
    handles = []
    for row in range(num_rows):
        request = GenerationRequest(f"{row}", PROMPTS[row], sampling_of(case, row))
        handles.append(engine.submit(request, count if row == 0 else None))
    is_queued.set()
    found = [handle.result() for handle in handles]
    assert batch_sizes[0] == num_rows
    assert [swap.result().under_load for swap in swaps] == [True] * (swapped is not None)
    return found


@pytest.mark.parametrize("swaps", [False, True], ids=["", "swap"])
@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("case", CASES)
def test_texts_are_what_they_were(
    engine: LocalEngine, staged: StagedWeights, case: str, num_rows: int, swaps: bool
) -> None:
    assert engine.drafts is not None
    found = generations(engine, case, num_rows, staged if swaps else None)
    engine.drafts.swap(DEFAULT_ROUTE, engine.drafts.stage(DEFAULT_ROUTE, None))
    expected = json.loads(GOLDENS.read_text())[case][:num_rows]
    assert [generation.output_token_ids for generation in found] == expected
    for generation in found:
        assert generation.num_drafted > 0
        versions = [span.draft_version for span in generation.draft_versions]
        assert versions == ([0, 1] if swaps else [0])
    if swaps:
        emitted = generation.draft_versions[0].end
        assert SWAP_ROUND - 1 <= emitted <= 4 * (SWAP_ROUND - 1)


class WholePasses:
    """A transformers model, without any cache."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.inference_mode()
    def logits_after(self, context: Sequence[int]) -> Tensor:
        logits_V: Tensor = self._model(torch.tensor([list(context)]), use_cache=False).logits[0, -1].float()
        return logits_V


def decoded(model: nn.Module, request: GenerationRequest) -> list[int]:
    """The target's own text, whose every token leads."""
    sampling, output = request.sampling, list[int]()
    scored = replace(request, sampling=replace(sampling, temperature=sampling.temperature or 1.0))
    while len(output) < sampling.max_tokens:
        score_V = next_distribution(WholePasses(model), scored, (), output)  # type: ignore[arg-type]
        if sampling.mode == "coupled":
            score_V = score_V + coupled_noise(request, len(output), len(score_V))
        best, second = score_V.topk(2)[0].tolist()
        where = f"{request.request_id}, position {len(output)}: leads by {best - second:.2g}"
        assert best - second > MIN_GAP, f"{where}; choose another prompt or seed"
        output.append(int(score_V.argmax()))
    return output


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        target = load_pair(save_tiny_pair(folder)[0]).target
    texts = {
        case: [
            decoded(target, GenerationRequest(f"{case}, row {row}", prompt, sampling_of(case, row)))
            for row, prompt in enumerate(PROMPTS)
        ]
        for case in CASES
    }
    by_case = (f'"{case}": [\n' + ",\n".join(map(str, rows)) + "\n]" for case, rows in texts.items())
    GOLDENS.write_text("{\n" + ",\n".join(by_case) + "\n}\n")


if __name__ == "__main__":
    main()
