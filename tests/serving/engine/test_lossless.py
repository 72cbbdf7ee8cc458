"""Losslessness, attacked: whatever happens around a request, its text is the target's own.

Random schedules of the real engine on models whose distribution is known; `make fuzz` draws many more of
them. False alarms: FALSE_ALARM_RATE for each listed distribution, FUZZ_FALSE_ALARM_RATE for each drawn one,
none elsewhere. The bugs that these checks must catch are in test_lossless_controls.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from serving.engine import SamplingParams
from serving.engine.verification import ratio_test
from serving.local import LocalEngine, load_engine
from serving.options import EngineOptions
from tests.support.distribution_checks import (
    DISTRIBUTION_CASES,
    DistributionCase,
    check_distribution,
    distribution_cases,
)
from tests.support.lossless_checks import check_schedule, check_twin, check_up_to_near_ties
from tests.support.rule_checks import FUZZ_FALSE_ALARM_RATE, check_rule, distribution_pairs
from tests.support.schedules import Schedule, examples, schedules


@examples(250)
@given(schedules())
def test_every_text_is_the_targets_own_whatever_joins_leaves_and_is_swapped(schedule: Schedule) -> None:
    check_schedule(schedule)


@examples(100)
@given(schedules(drafter="model", copies="none", swaps=False))
def test_a_draft_equal_to_the_target_is_accepted_throughout_any_schedule(schedule: Schedule) -> None:
    check_twin(schedule)


@pytest.mark.parametrize("name", DISTRIBUTION_CASES)
def test_sampled_outputs_follow_the_distribution(name: str) -> None:
    check_distribution(DISTRIBUTION_CASES[name])


@examples(5)
@given(distribution_cases())
def test_sampled_outputs_follow_the_distribution_in_any_case(case: DistributionCase) -> None:
    check_distribution(case, FUZZ_FALSE_ALARM_RATE)


@examples(60)
@given(distribution_pairs())
def test_the_ratio_test_emits_the_targets_distribution_for_any_pair_of_distributions(
    pair: tuple[Tensor, Tensor],
) -> None:
    check_rule(ratio_test, pair)


@pytest.fixture(scope="module", params=["twin", "draft"])
def half_precision(
    request: pytest.FixtureRequest, tiny_pair: tuple[str, str]
) -> Iterator[tuple[LocalEngine, LocalEngine]]:
    """A bfloat16 engine that drafts, and the same without."""
    target, draft = tiny_pair
    options = EngineOptions(num_draft_tokens=5, num_slots=3, max_seq_len=96)
    twin = target if request.param == "twin" else draft
    drafted = load_engine(target, twin, options, dtype="bfloat16")
    alone = load_engine(target, draft, replace(options, num_draft_tokens=0), dtype="bfloat16")
    with drafted, alone:
        yield drafted, alone


_PROMPTS = st.lists(st.lists(st.integers(0, 319), min_size=1, max_size=40), min_size=1, max_size=5)


@examples(4)
@given(_PROMPTS, st.sampled_from([None, 3]))
def test_half_precision_departs_from_plain_decoding_only_at_near_ties(
    half_precision: tuple[LocalEngine, LocalEngine], prompts: list[list[int]], seed: int | None
) -> None:
    params = SamplingParams(temperature=0.0 if seed is None else 0.8, seed=seed, max_tokens=32)
    check_up_to_near_ties(*half_precision, prompts, params)
