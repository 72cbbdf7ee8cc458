"""Expected speed from acceptance along a trajectory."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from buffer.records import PassCosts
from learner.judging.judge import operation
from learner.judging.speed import (
    ExpectedSpeed,
    Operation,
    expected_speed,
    output_tokens_by_length,
    round_s_by_length,
)
from serving.local import load_engine
from serving.options import EngineOptions
from serving.status import serving_status
from tests.support.tiny_models import save_tiny_pair


def test_averaged_over_what_the_target_emits_it_is_the_exact_length_of_a_round() -> None:
    """All 8 trajectories of three tokens over a vocabulary of two, distributions drawn at random by
    context."""
    rng = np.random.default_rng(0)
    contexts = [c for depth in range(3) for c in itertools.product((0, 1), repeat=depth)]
    target = {context: rng.dirichlet([1, 1]) for context in contexts}
    draft = {context: rng.dirichlet([1, 1]) for context in contexts}

    def meet(context: tuple[int, ...]) -> np.ndarray:
        return np.minimum(target[context], draft[context])

    exact = 1.0 + meet(()).sum() + sum(meet(())[v] * meet((v,)).sum() for v in (0, 1))
    found = 0.0
    for path in itertools.product((0, 1), repeat=3):
        prefixes = [path[:depth] for depth in range(3)]
        probability = np.prod([target[prefix][path[len(prefix)]] for prefix in prefixes])
        expected_N = np.array([meet(prefix).sum() for prefix in prefixes], np.float32)
        given_N = [meet(prefix)[path[len(prefix)]] / target[prefix][path[len(prefix)]] for prefix in prefixes]
        by_length_LN = output_tokens_by_length(expected_N, np.array(given_N, np.float32), 2)
        found += probability * by_length_LN[2, 0]
    assert found == pytest.approx(exact, abs=1e-6)


def test_a_round_never_reaches_past_the_end() -> None:
    ones = np.ones(4, np.float32)
    assert output_tokens_by_length(ones, ones, 2).tolist() == [[1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 2]]
    assert output_tokens_by_length(ones, ones, 6)[-1].tolist() == [5, 4, 3, 2]


COSTS = PassCosts((1, 3), (1, 5), ((0.010, 0.014), (0.020, 0.028)), (0.001, 0.003), (0.002, 0.004))


def test_costs_are_interpolated_and_without_them_only_tokens_a_round_are_known() -> None:
    assert round_s_by_length(COSTS, 2.0, 2)[2] == pytest.approx((0.012 + 0.024) / 2 + 0.003 + 2 * 0.002)
    assert round_s_by_length(COSTS, 2.0, 2)[0] == pytest.approx((0.010 + 0.020) / 2)
    speed = expected_speed([1.0, 1.3, 1.5], Operation(2, 2.0, COSTS, is_draft_length_fixed=True))
    assert (speed.num_draft_tokens, speed.unit) == (2, "tokens_per_s")
    assert speed.amount == pytest.approx(2.0 * 1.5 / 0.025)
    assert expected_speed([1.0, 1.3, 1.5], Operation(2)) == ExpectedSpeed(1.5, "tokens_per_round", 2)


def test_a_draft_is_as_fast_as_at_its_own_best_draft_length() -> None:
    """A round takes 10, 14, 16, 18 and 20 milliseconds; the length in use is that of the draft before."""
    operation = Operation(1, 1.0, COSTS)
    assert operation.draft_lengths == range(5)
    hopeless, fair, good = [1.0] * 5, [1.0, 1.5, 1.6, 1.62, 1.63], [1.0, 1.9, 2.7, 3.4, 4.0]
    found = [expected_speed(tokens, operation) for tokens in (hopeless, fair, good)]
    assert [speed.num_draft_tokens for speed in found] == [0, 1, 4]
    assert [speed.amount for speed in found] == pytest.approx([100.0, 1500 / 14, 200.0])


def test_the_learner_prices_a_round_as_the_engine_that_told_it(tmp_path: Path) -> None:
    """Also beyond what was measured, and after live rounds have corrected the table."""
    with load_engine(*save_tiny_pair(tmp_path), EngineOptions(num_slots=4, max_seq_len=64)) as engine:
        table = engine.costs
        assert table is not None and table.draft_start_s
        table.draft_start_s = tuple(s + 0.5 * min(table.draft_pass_s) for s in table.draft_start_s)
        table.observe_target(2, 3, 3.0 * table.target_s(2, 4))
        table.observe_draft(2, [3], 0.2 * table.propose_s(2, 3))
        costs = serving_status(engine, replica_id="r0", at_s=0.0, num_dropped_records=0).costs
        assert costs is not None
        for batch_size in (1, 2.5, 4, 16):
            target_s, propose_s = table.seconds_by_length(batch_size, 12)
            engines = [sum(both) for both in zip(target_s, propose_s, strict=True)]
            assert round_s_by_length(costs, batch_size, 12) == pytest.approx(engines, rel=1e-12)


@pytest.mark.parametrize("fixed", [None, 2])
def test_a_replica_says_whether_its_draft_length_is_fixed(tmp_path: Path, fixed: int | None) -> None:
    with load_engine(
        *save_tiny_pair(tmp_path), options=EngineOptions(num_draft_tokens=fixed, max_seq_len=64)
    ) as engine:
        found = operation([serving_status(engine, replica_id="r0", at_s=0.0, num_dropped_records=0)], 4)
    assert found.draft_lengths == ((2,) if fixed else range(9))
