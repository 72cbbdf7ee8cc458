"""The engine as a caller sees it: same text as the target alone, whatever happens around it."""

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from serving.engine import Generation, GenerationRequest, SamplingParams
from serving.engine.draft_pool import BrokenDraftError
from serving.engine.engine import EngineClosedError
from serving.local import LocalEngine, load_engine
from serving.options import EngineOptions
from tests.support.table_engine import StagedTable, table_engine
from tests.support.table_model import TableModel
from tests.support.tiny_models import save_tiny_pair

PROMPTS = [[5, 6, 7, 8], [9], [20, 21, 22, 23, 24] * 8, [30, 31], [40] * 20, [50, 51, 52], [100, 3, 200]]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_tiny_pair(tmp_path_factory.mktemp(request.param), arch=request.param)


@pytest.fixture(scope="module")
def engine(paths: tuple[str, str]) -> Iterator[LocalEngine]:
    with load_engine(
        *paths, options=EngineOptions(num_draft_tokens=4, num_slots=3, max_seq_len=128)
    ) as engine:
        yield engine


def _target_alone(engine: LocalEngine, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy by whole forward passes, no cache, none of our code."""
    model, output = engine.pair.target, list[int]()
    while len(output) < max_tokens:
        logits_V = model(torch.tensor([prompt + output]), use_cache=False).logits[0, -1]
        output.append(int(logits_V.argmax()))
        if output[-1] in engine.pair.eos_token_ids:
            break
    return output


def test_greedy_output_equals_the_target_alone(engine: LocalEngine) -> None:
    generations = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=40))
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        assert generation.output_token_ids == _target_alone(engine, prompt, 40)
        assert generation.num_rounds < 40 or generation.num_accepted == 0


def test_seeded_text_is_the_same_whatever_the_draft_its_length_or_the_batch_mates(
    paths: tuple[str, str], engine: LocalEngine
) -> None:
    params = [
        SamplingParams(temperature=0.9, top_p=0.95, seed=index, max_tokens=24)
        for index in range(len(PROMPTS))
    ]
    together = [generation.output_token_ids for generation in engine.generate(PROMPTS, params)]
    assert len({tuple(output) for output in together}) == len(PROMPTS)
    lengths = [0, 1, 7]
    for length in lengths:
        with load_engine(
            *paths, options=EngineOptions(num_draft_tokens=length, num_slots=1, max_seq_len=128)
        ) as other:
            assert [g.output_token_ids for g in other.generate(PROMPTS, params)] == together
    with load_engine(paths[0], options=EngineOptions(num_slots=5, max_seq_len=128)) as other:
        assert [g.output_token_ids for g in other.generate(PROMPTS, params)] == together
    with load_engine(
        paths[0], paths[0], options=EngineOptions(num_draft_tokens=3, num_slots=2, max_seq_len=128)
    ) as own:
        generations = own.generate(PROMPTS, params)
        assert [g.output_token_ids for g in generations] == together
        assert all(g.num_accepted == g.num_attempted for g in generations)


def test_a_draft_equal_to_the_target_is_accepted_throughout(paths: tuple[str, str]) -> None:
    with load_engine(
        paths[0], paths[0], options=EngineOptions(num_draft_tokens=4, num_slots=2, max_seq_len=128)
    ) as engine:
        for sampling in (SamplingParams(temperature=0.0, max_tokens=30), SamplingParams(max_tokens=30)):
            for generation in engine.generate(PROMPTS, sampling):
                assert generation.num_accepted == generation.num_attempted
                assert generation.num_rounds <= 1 + len(generation.output_token_ids) // 5


def test_counters_add_up(engine: LocalEngine) -> None:
    for generation in engine.generate(PROMPTS, SamplingParams(max_tokens=17)):
        tokens = len(generation.output_token_ids)
        assert generation.num_accepted <= generation.num_attempted <= generation.num_drafted
        assert generation.num_accepted + generation.num_rounds >= tokens >= generation.num_rounds
        assert sum(generation.accepted_histogram) == generation.num_rounds
        spans = generation.draft_versions
        assert spans[0].start == 0 and spans[-1].end == tokens
        assert len(generation.logprobs) == tokens


def test_logprobs_are_the_raw_targets_at_temperature_one(engine: LocalEngine) -> None:
    [generation] = engine.generate([PROMPTS[0]], SamplingParams(temperature=0.5, max_tokens=9, logprobs=4))
    text = PROMPTS[0] + generation.output_token_ids
    logits_TV = engine.pair.target(torch.tensor([text]), use_cache=False).logits[0]
    expected_TV = logits_TV.log_softmax(-1)[len(PROMPTS[0]) - 1 :]
    for index, token in enumerate(generation.output_token_ids):
        assert generation.logprobs[index] == pytest.approx(float(expected_TV[index, token]), abs=1e-4)
        top = expected_TV[index].topk(4)
        assert [token for token, _ in generation.top_logprobs[index]] == top.indices.tolist()
        assert [value for _, value in generation.top_logprobs[index]] == pytest.approx(
            top.values.tolist(), abs=1e-4
        )


def test_stop_tokens_end_the_text_inside_an_accepted_run(paths: tuple[str, str]) -> None:
    with load_engine(
        paths[0], paths[0], options=EngineOptions(num_draft_tokens=6, num_slots=1, max_seq_len=128)
    ) as engine:
        [free] = engine.generate([PROMPTS[0]], SamplingParams(temperature=0.0, max_tokens=20))
        stop = free.output_token_ids[9]
        first = free.output_token_ids.index(stop)
        [stopped] = engine.generate(
            [PROMPTS[0]], SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=(stop,))
        )
    assert stopped.output_token_ids == free.output_token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_token_id) == ("stop", stop)
    assert stopped.num_attempted <= first + 1


def test_min_tokens_holds_the_stop_back_and_ignore_eos_forgets_it(engine: LocalEngine) -> None:
    stops = tuple(range(0, 320, 2))
    short, long = engine.generate(
        [PROMPTS[0]] * 2,
        [
            SamplingParams(max_tokens=30, stop_token_ids=stops, seed=1),
            SamplingParams(max_tokens=30, stop_token_ids=stops, seed=1, min_tokens=12),
        ],
    )
    assert len(short.output_token_ids) < 12 <= len(long.output_token_ids)
    assert not set(long.output_token_ids[:12]) & set(stops)
    eos = engine.pair.eos_token_ids
    params = SamplingParams(max_tokens=40, temperature=3.0, seed=3, ignore_eos=True)
    generations = engine.generate([[eos[0]]] * 1, params)
    assert generations[0].finish_reason == "length"


def test_sequences_join_leave_and_are_cancelled_between_rounds(engine: LocalEngine) -> None:
    """Fifty requests of mixed length, a third of them cancelled; the others' text is untouched."""
    chooser = random.Random(0)
    expected: dict[tuple[int, ...], list[int]] = {}
    handles = []
    for index in range(50):
        prompt = tuple(chooser.choice(PROMPTS))
        params = SamplingParams(temperature=0.0, max_tokens=chooser.randint(1, 40))
        handles.append(engine.submit(GenerationRequest(str(index), prompt, params)))
        if index % 3 == 0:
            chooser.choice(handles[-6:]).cancel()
    generations = [handle.result(60) for handle in handles]
    reasons = {generation.finish_reason for generation in generations}
    assert "length" in reasons and "cancelled" in reasons
    for generation in generations:
        prompt = generation.prompt_token_ids
        if prompt not in expected:
            expected[prompt] = _target_alone(engine, list(prompt), 40)
        tokens = generation.output_token_ids
        assert tokens == expected[prompt][: len(tokens)]


def test_a_cancelled_generation_frees_its_slot_within_a_round(engine: LocalEngine) -> None:
    handle = engine.submit(GenerationRequest("long", (5,), SamplingParams(max_tokens=120, ignore_eos=True)))
    next(iter(handle))
    handle.cancel()
    generation = handle.result(10)
    assert generation.finish_reason == "cancelled"
    assert engine.stats().num_running == 0


def test_events_carry_every_token_once_and_the_last_one_the_generation(engine: LocalEngine) -> None:
    handle = engine.submit(GenerationRequest("stream", (5, 6), SamplingParams(max_tokens=21, seed=2)))
    events = list(handle)
    tokens = [token for event in events for token in event.token_ids]
    assert events[-1].generation is not None
    assert tokens == events[-1].generation.output_token_ids
    assert all(event.generation is None for event in events[:-1])


@pytest.mark.parametrize(
    ("prompt", "params", "named"),
    [
        ((), SamplingParams(), "prompt has 0 tokens"),
        ((5, 400), SamplingParams(), "token id 400"),
        ((5,) * 100, SamplingParams(max_tokens=60), "max_tokens=60"),
    ],
)
def test_a_request_that_cannot_run_is_refused_by_name(
    engine: LocalEngine, prompt: tuple[int, ...], params: SamplingParams, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        engine.submit(GenerationRequest("bad", prompt, params))


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"top_k": -1},
        {"max_tokens": -1},
        {"min_tokens": 99},
    ],
)
def test_sampling_parameters_name_the_field_that_is_wrong(field: dict[str, float]) -> None:
    [name] = field
    with pytest.raises(ValueError, match=name):
        SamplingParams(**field)  # type: ignore[arg-type]


def test_a_closed_engine_refuses_and_ends_what_ran(paths: tuple[str, str]) -> None:
    engine = load_engine(*paths, EngineOptions(num_slots=1, max_seq_len=128))
    handles = [
        engine.submit(GenerationRequest(str(index), (5,), SamplingParams(max_tokens=100, ignore_eos=True)))
        for index in range(3)
    ]
    engine.close()
    assert {handle.result(5).finish_reason for handle in handles} <= {"cancelled", "length"}
    with pytest.raises(EngineClosedError):
        engine.submit(GenerationRequest("late", (5,)))


def _greedy(generations: list[Generation]) -> list[list[int]]:
    return [generation.output_token_ids for generation in generations]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_a_draft_that_turns_to_garbage_changes_no_output(garbage: float) -> None:
    target, draft = TableModel(6, seed=1), TableModel(6, seed=2)
    prompts, params = [[1, 2, 3], [4], [0, 5]], SamplingParams(temperature=0.0, max_tokens=20)
    with table_engine(target, None, num_draft_tokens=0) as alone:
        expected = _greedy(alone.generate(prompts, params))
    with table_engine(target, draft, num_draft_tokens=3) as engine:
        assert _greedy(engine.generate(prompts, params)) == expected
        broken = StagedTable(1, draft, torch.full_like(draft.table, garbage))
        engine.swap(broken).result(5)
        assert _greedy(engine.generate(prompts, params)) == expected
        if garbage != 1e30:
            assert "draft_version=1" in engine.stats().draft_disabled_reason
            with pytest.raises(BrokenDraftError):
                engine.swap(broken).result(5)
            good = StagedTable(2, draft, TableModel(6, seed=2).table)
            engine.swap(good).result(5)
            assert engine.stats().draft_disabled_reason == ""
        generations = engine.generate(prompts, params)
        assert _greedy(generations) == expected
        assert sum(generation.num_drafted for generation in generations) > 0


def test_what_a_slot_held_before_never_shows_in_the_next_owners_text(paths: tuple[str, str]) -> None:
    """Slots poisoned with huge finite values stand for whatever an earlier sequence left."""
    params = SamplingParams(temperature=0.0, max_tokens=24)
    with load_engine(
        *paths, options=EngineOptions(num_draft_tokens=3, num_slots=2, max_seq_len=128)
    ) as engine:
        expected = _greedy(engine.generate(PROMPTS, params))
        engine.core.target.cache.kv_L2SHTD.fill_(1e4)
        engine.core.drafts.drafter.runner.cache.kv_L2SHTD.fill_(-1e4)  # type: ignore[union-attr, attr-defined]
        assert _greedy(engine.generate(PROMPTS, params)) == expected


def test_the_controller_stops_drafting_when_it_does_not_pay(paths: tuple[str, str]) -> None:
    """A random draft is almost never right; the free controller turns to draft length 0."""
    with load_engine(*paths, EngineOptions(num_slots=2, max_seq_len=512)) as engine:
        engine.generate([[5]] * 4, SamplingParams(max_tokens=400, ignore_eos=True))
        deadline = time.monotonic() + 5
        while engine.stats().num_draft_tokens > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine.stats().num_draft_tokens <= 1


@pytest.mark.parametrize(
    ("options", "counts"),
    [({"speculation": "off"}, (1,)), ({"num_draft_tokens": 0}, (1,)), ({}, (1, 2, 4, 9))],
)
def test_where_nobody_drafts_only_passes_of_one_token_are_timed(
    options: dict[str, Any], counts: tuple[int, ...], tiny_pair: tuple[str, str]
) -> None:
    with load_engine(*tiny_pair, EngineOptions(num_slots=2, max_seq_len=64, **options)) as engine:
        assert engine.costs is not None and engine.costs.token_counts == counts
        [generation] = engine.generate([[5, 6]], SamplingParams(temperature=0.0, max_tokens=4))
        assert generation.output_token_ids
