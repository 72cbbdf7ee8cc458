"""What the engine emits follows the target's distribution exactly: across batches, draft lengths and swaps.

Chi-square against full enumeration on a vocabulary of 4; false-alarm rate in chi_square.py. The generator
is seeded, but which requests share a batch depends on timing, so the rate holds per run.
"""

from collections.abc import Callable, Sequence

import pytest

from serving.drafters.model_drafter import ModelDrafter
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.engine import Engine
from serving.engine.proposal import COPIED
from tests.support.chi_square import FALSE_ALARM_RATE, fit_p_value
from tests.support.table_engine import (
    CopyingAsIfDrawnDrafter,
    HalfCopyingDrafter,
    MisreportingDrafter,
    Script,
    ScriptedDrafter,
    StagedTable,
    UndrawingDrafter,
    table_engine,
)
from tests.support.table_model import TableModel

VOCAB, PROMPT, NUM_TOKENS, SAMPLES = 4, [2, 0, 3, 1, 1, 2, 0], 3, 6000
CROWD = {"num_slots": 32, "prefill_chunk_tokens": 64}
"""A prompt in one piece fills the slots; in three, each waits for the rounds of the few before it."""


def _outputs(engine: Engine, sampling: list[SamplingParams]) -> list[tuple[int, ...]]:
    generations = engine.generate([PROMPT] * len(sampling), sampling)
    return [tuple(generation.output_token_ids) for generation in generations]


def _pair() -> tuple[TableModel, TableModel]:
    return TableModel(VOCAB, seed=1, sharpness=1.3), TableModel(VOCAB, seed=2, sharpness=1.3)


def _p_value(drafter_class: type[ModelDrafter], temperature: float, num_draft_tokens: int) -> float:
    target, draft = _pair()
    with table_engine(
        target, draft, num_draft_tokens=num_draft_tokens, drafter_class=drafter_class, **CROWD
    ) as engine:
        engine.seed(5)
        sampling = SamplingParams(temperature=temperature, max_tokens=NUM_TOKENS)
        outputs = _outputs(engine, [sampling] * SAMPLES)
    return fit_p_value(outputs, target.output_distribution(PROMPT, NUM_TOKENS, temperature))


@pytest.mark.parametrize(
    ("temperature", "num_draft_tokens"),
    [(1.0, 2), pytest.param(0.6, 4, marks=pytest.mark.slow), pytest.param(1.0, 0, marks=pytest.mark.slow)],
)
def test_sampled_output_follows_the_targets_distribution(temperature: float, num_draft_tokens: int) -> None:
    assert _p_value(ModelDrafter, temperature, num_draft_tokens) > FALSE_ALARM_RATE


def _random(context: Sequence[int], count: int) -> list[int]:
    """By a hash of the context, and not always as many as were asked for."""
    mixed = sum((index + 7) * (token + 3) for index, token in enumerate(context)) * 2654435761 % 2**32
    return [(mixed >> (3 * index)) % VOCAB for index in range(min(count, mixed % 3))]


SCRIPTS: dict[str, Script] = {
    "random": _random,
    "stale": lambda context, count: list(context[:count]),
    "wrong": lambda context, count: [0] * count,
}


@pytest.mark.parametrize("seeded", [False, True], ids=["standard", "coupled"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_copied_tokens_of_any_kind_leave_the_distribution_as_it_is(name: str, seeded: bool) -> None:
    target, _ = _pair()
    copier = ScriptedDrafter(SCRIPTS[name])
    with table_engine(target, None, num_draft_tokens=2, ngram=copier, **CROWD) as engine:
        engine.seed(8)
        params = [
            SamplingParams(max_tokens=NUM_TOKENS, seed=seed if seeded else None) for seed in range(2500)
        ]
        outputs = _outputs(engine, params)
        assert engine.stats().counts[COPIED].num_accepted > 100
    assert fit_p_value(outputs, target.output_distribution(PROMPT, NUM_TOKENS)) > FALSE_ALARM_RATE


@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.6, marks=pytest.mark.slow)])
def test_copied_and_drawn_rows_share_a_round(temperature: float) -> None:
    assert _p_value(HalfCopyingDrafter, temperature, 3) > FALSE_ALARM_RATE


@pytest.mark.parametrize("broken", [MisreportingDrafter, UndrawingDrafter, CopyingAsIfDrawnDrafter])
def test_a_drafter_that_misstates_its_distribution_is_caught(broken: type[ModelDrafter]) -> None:
    assert _p_value(broken, 1.0, 2) < FALSE_ALARM_RATE


def test_coupled_output_follows_the_targets_distribution_over_seeds() -> None:
    target, draft = _pair()
    with table_engine(target, draft, num_draft_tokens=2, **CROWD) as engine:
        params = [SamplingParams(max_tokens=NUM_TOKENS, seed=seed) for seed in range(SAMPLES)]
        outputs = _outputs(engine, params)
    assert fit_p_value(outputs, target.output_distribution(PROMPT, NUM_TOKENS)) > FALSE_ALARM_RATE


def _mixed_params(seed_of: Callable[[int], int | None]) -> list[SamplingParams]:
    """Draft lengths 0 to 3 side by side, greedy and seeded batch mates between the sampled ones."""
    return [
        SamplingParams(max_tokens=NUM_TOKENS, num_draft_tokens=index % 4, seed=seed_of(index))
        if index % 5
        else SamplingParams(max_tokens=NUM_TOKENS + 2, temperature=0.0)
        for index in range(SAMPLES // 2)
    ]


@pytest.mark.parametrize("seed_of", [lambda index: None, lambda index: index], ids=["standard", "coupled"])
def test_the_distribution_holds_while_drafts_are_swapped_and_draft_lengths_change(
    seed_of: Callable[[int], int | None],
) -> None:
    target, draft = _pair()
    tables = [TableModel(VOCAB, seed=seed, sharpness=2.0).table for seed in (3, 4)]
    with table_engine(target, draft, num_draft_tokens=3, num_slots=16, prefill_chunk_tokens=64) as engine:
        engine.seed(6)
        params = _mixed_params(seed_of)
        handles = [
            engine.submit(GenerationRequest(str(index), tuple(PROMPT), sampling))
            for index, sampling in enumerate(params)
        ]
        for version in range(1, 120):
            report = engine.swap(StagedTable(version, draft, tables[version % 2])).result(30)
            assert report.draft_version == version
        generations = [handle.result(60) for handle in handles]
        stats = engine.stats()
    assert stats.num_swaps == 119 and stats.num_swaps_under_load > 20
    assert len({span.draft_version for g in generations for span in g.draft_versions}) > 20
    sampled = [tuple(g.output_token_ids) for index, g in enumerate(generations) if index % 5]
    assert fit_p_value(sampled, target.output_distribution(PROMPT, NUM_TOKENS)) > FALSE_ALARM_RATE
    greedy = {tuple(g.output_token_ids) for index, g in enumerate(generations) if index % 5 == 0}
    assert len(greedy) == 1
