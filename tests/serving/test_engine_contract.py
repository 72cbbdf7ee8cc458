"""What every ServingEngine does: ours, the tests' own, and where it is installed vLLM's."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.records import AdapterManifest
from serving.engine.engine import EngineClosedError
from serving.engine.request import Generation, GenerationRequest, SamplingParams
from serving.local import load_engine
from serving.models.adapter import AdapterRejectedError
from serving.options import EngineOptions
from serving.serving_engine import ServingEngine
from tests.support.fake_engine import FakeEngine
from tests.support.tiny_adapters import tiny_adapter

HAS_VLLM = importlib.util.find_spec("vllm") is not None
PAIR = Path(__file__).parents[2] / "deploy" / "demo" / "pair"
OPTIONS = EngineOptions(num_slots=4, max_seq_len=128, num_draft_tokens=3, compile="off", prefix_cache_mib=0)
ENGINES = (
    "ours",
    "fake",
    pytest.param("vllm", marks=pytest.mark.skipif(not HAS_VLLM, reason="no vLLM here")),
)
WAIT_S = 60.0


@dataclass(frozen=True)
class Subject:
    """An engine, a prompt for it, and an adapter for its draft by version."""

    engine: ServingEngine
    prompt: tuple[int, ...]
    adapter: Callable[[int], tuple[AdapterManifest, bytes]]

    def run(self, *prompts: tuple[int, ...], capture: bool = False, **params: Any) -> list[Generation]:
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **params})
        handles = [
            self.engine.submit(GenerationRequest(f"r{number}", prompt, sampling, capture=capture))
            for number, prompt in enumerate(prompts or (self.prompt,))
        ]
        return [handle.result(WAIT_S) for handle in handles]


def _open(kind: str, tiny_pair: tuple[str, str]) -> Subject:
    if kind == "fake":
        manifest, weights = tiny_adapter(tiny_pair[1], draft_version=1, target_revision="fake")
        return Subject(FakeEngine(), (5, 6, 7), lambda v: (replace(manifest, draft_version=v), weights))
    if kind == "ours":
        target, draft = tiny_pair
        engine: ServingEngine = load_engine(target, draft, OPTIONS)
        prompt: tuple[int, ...] = (5, 6, 7, 8)
    else:
        from serving.engines.async_llm.engine import load_async_llm

        target, draft = str(PAIR / "target"), str(PAIR / "draft")
        engine = load_async_llm(target, draft, OPTIONS)
        assert engine.tokenizer is not None
        prompt = tuple(engine.tokenizer("The quick brown fox")["input_ids"])
    revision = engine.target_revision
    return Subject(engine, prompt, lambda v: tiny_adapter(draft, draft_version=v, target_revision=revision))


@pytest.fixture(scope="module", params=ENGINES)
def subject(request: pytest.FixtureRequest, tiny_pair: tuple[str, str]) -> Iterator[Subject]:
    opened = _open(request.param, tiny_pair)
    yield opened
    opened.engine.close()


@pytest.fixture
def on_the_floor(subject: Subject) -> Iterator[Subject]:
    yield subject
    drafts = subject.engine.drafts
    assert drafts is not None
    drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, None))


def test_the_events_of_a_generation_add_up_to_it(subject: Subject) -> None:
    events: list[Any] = []
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=1)
    handle = subject.engine.submit(GenerationRequest("r", subject.prompt, sampling), events.append)
    generation = handle.result(WAIT_S)
    told = [token for event in events for token in event.token_ids]
    assert told == generation.output_token_ids and len(told) == 24
    assert generation.finish_reason == "length" and generation.stop_token_id is None
    assert len(events) > 2, "tokens come as they are made"
    assert [event.generation is not None for event in events] == [False] * (len(events) - 1) + [True]
    assert sum(len(event.logprobs) for event in events) == 24
    likeliest = [top[0][0] for event in events for top in event.top_logprobs]
    assert likeliest == told, "greedy takes the likeliest"


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_the_log_probabilities_of_a_prompt_come_with_its_first_event(
    subject: Subject, max_tokens: int
) -> None:
    [whole] = subject.run(max_tokens=8)
    prompt = (*subject.prompt, *whole.output_token_ids)
    events: list[Any] = []
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=2)
    generation = subject.engine.submit(GenerationRequest("r", prompt, params), events.append).result(WAIT_S)
    assert (generation.finish_reason, len(generation.output_token_ids)) == ("length", max_tokens)
    assert [event.prompt_logprobs is not None for event in events] == [True] + [False] * (len(events) - 1)
    found = generation.prompt_logprobs
    assert found is not None and len(found.logprobs_T) == len(found.ranks_T) == len(prompt) - 1
    assert found.top_token_ids_TK.shape == found.top_logprobs_TK.shape == (len(prompt) - 1, 2)
    written = slice(len(subject.prompt) - 1, None)
    assert (found.ranks_T[written] == 1).all(), "greedy takes the likeliest"
    assert found.top_token_ids_TK[written, 0].tolist() == whole.output_token_ids
    assert found.top_logprobs_TK[written, 0].tolist() == found.logprobs_T[written].tolist()


def test_a_stop_id_ends_the_text_and_is_its_last_token(subject: Subject) -> None:
    [whole] = subject.run()
    stop = whole.output_token_ids[5]
    [cut] = subject.run(stop_token_ids=(stop,))
    first = whole.output_token_ids.index(stop)
    assert cut.output_token_ids == whole.output_token_ids[: first + 1]
    assert (cut.finish_reason, cut.stop_token_id) == ("stop", stop)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [((), 4, "prompt"), ((10**6,), 4, "prompt"), ((1, 2), 10_000, "max_tokens")],
)
def test_what_cannot_run_is_refused_by_name(
    subject: Subject, prompt: tuple[int, ...], max_tokens: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        subject.engine.submit(GenerationRequest("r", prompt, SamplingParams(max_tokens=max_tokens)))
    assert subject.run()[0].finish_reason == "length", "and the engine goes on"


def test_a_cancelled_generation_ends_soon_and_says_so(subject: Subject) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
    handle = subject.engine.submit(GenerationRequest("r", subject.prompt[:4], sampling))
    next(iter(handle))
    handle.cancel()
    generation = handle.result(WAIT_S)
    assert generation.finish_reason == "cancelled" and len(generation.output_token_ids) < 120
    assert subject.run()[0].finish_reason == "length"


def test_one_that_is_cancelled_before_it_began_ends_too(subject: Subject) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    for _ in range(20):
        handle = subject.engine.submit(GenerationRequest("r", subject.prompt, sampling))
        handle.cancel()
        assert handle.result(WAIT_S).finish_reason == "cancelled"


def test_a_swap_shows_on_tokens_and_changes_none(on_the_floor: Subject) -> None:
    subject = on_the_floor
    drafts = subject.engine.drafts
    assert drafts is not None
    before = subject.run()[0]
    assert {span.draft_version for span in before.draft_versions} == {FLOOR_VERSION}
    report = drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, *subject.adapter(3)))
    assert (report.draft_version, subject.engine.draft_version) == (3, 3)
    after = subject.run()[0]
    assert after.output_token_ids == before.output_token_ids
    assert {span.draft_version for span in after.draft_versions} == {3}
    assert after.draft_versions[0].start == 0 and after.draft_versions[-1].end == 24
    drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, None))
    floor = subject.run()[0]
    assert subject.engine.draft_version == FLOOR_VERSION
    assert (floor.num_attempted, floor.num_accepted) == (before.num_attempted, before.num_accepted)


def test_swaps_under_load_end_no_generation(on_the_floor: Subject) -> None:
    subject = on_the_floor
    drafts = subject.engine.drafts
    assert drafts is not None
    alone = subject.run(max_tokens=96)[0]
    sampling = SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)
    handles = [
        subject.engine.submit(GenerationRequest(f"r{number}", subject.prompt, sampling))
        for number in range(4)
    ]
    for version in (1, 2, 3):
        drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, *subject.adapter(version)))
    for handle in handles:
        assert handle.result(WAIT_S).output_token_ids == alone.output_token_ids
    assert subject.engine.stats().num_swaps >= 3


def test_an_adapter_that_does_not_fit_is_refused_and_the_incumbent_serves_on(on_the_floor: Subject) -> None:
    subject = on_the_floor
    drafts = subject.engine.drafts
    assert drafts is not None
    manifest, weights = subject.adapter(4)
    drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, *subject.adapter(5)))
    with pytest.raises(AdapterRejectedError):
        drafts.stage(DEFAULT_ROUTE, manifest, weights[:-1])
    assert subject.engine.draft_version == 5
    assert {span.draft_version for span in subject.run()[0].draft_versions} == {5}


def test_captured_rounds_hold_what_the_target_said(subject: Subject) -> None:
    [generation] = subject.run(capture=True)
    rounds = generation.captured_rounds
    assert rounds[0].start == len(subject.prompt)
    emitted = [len(each.emitted_target_logprobs_C) for each in rounds]
    assert sum(emitted) == 24
    for each, count in zip(rounds, emitted, strict=True):
        at = each.start - len(subject.prompt)
        said = generation.output_token_ids[at : at + count]
        assert each.topk_token_ids_EK[:count, 0].tolist() == said, "greedy: the likeliest was said"
        assert len(each.topk_token_ids_EK) == len(each.drafted_token_ids_G) + 1
        assert each.drafted_token_ids_G[: each.num_accepted].tolist() == said[: each.num_accepted]
        assert np.isfinite(each.topk_logprobs_EK.astype(np.float32)).all()
    [plain] = subject.run()
    assert plain.captured_rounds == [] and plain.output_token_ids == generation.output_token_ids


def test_what_is_counted_is_what_was_said(subject: Subject) -> None:
    before = _counts(subject)
    generations = subject.run(subject.prompt, subject.prompt, subject.prompt)
    deadline_s = time.monotonic() + 5.0
    wanted = [
        sum(getattr(generation, name) for generation in generations)
        for name in ("num_rounds", "num_drafted", "num_attempted", "num_accepted")
    ]
    while _counts(subject)[0] - before[0] < wanted[0]:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    counted = [now - then for now, then in zip(_counts(subject), before, strict=True)]
    assert counted == wanted
    stats = subject.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)


def _counts(subject: Subject) -> list[int]:
    counts = subject.engine.stats().route_counts.get(DEFAULT_ROUTE, {}).values()
    names = ("num_rounds", "num_drafted", "num_attempted", "num_accepted")
    return [sum(getattr(each, name) for each in counts) for name in names]


@pytest.mark.parametrize("kind", ENGINES)
def test_a_closed_engine_ends_what_runs_and_takes_nothing(kind: str, tiny_pair: tuple[str, str]) -> None:
    subject = _open(kind, tiny_pair)
    sampling = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    handle = subject.engine.submit(GenerationRequest("r", subject.prompt, sampling))
    next(iter(handle))
    assert subject.engine.is_alive
    subject.engine.close()
    subject.engine.close()
    assert handle.result(WAIT_S).finish_reason in ("cancelled", "length")
    assert not subject.engine.is_alive
    with pytest.raises(EngineClosedError):
        subject.engine.submit(GenerationRequest("r", subject.prompt, sampling))
