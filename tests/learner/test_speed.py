"""Expected speed from acceptance along a trajectory."""

import itertools

import numpy as np
import pytest

from buffer.records import PassCosts
from learner.speed import Operation, output_tokens_per_round, round_s, tokens_per_s


def test_averaged_over_what_the_target_emits_it_is_the_exact_length_of_a_round() -> None:
    """All 8 trajectories of three tokens over a vocabulary of two, laws drawn at random by context."""
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
        found += probability * output_tokens_per_round(expected_N, np.array(given_N, np.float32), 2)[0]
    assert found == pytest.approx(exact, abs=1e-6)


def test_a_round_never_reaches_past_the_end() -> None:
    ones = np.ones(4, np.float32)
    assert output_tokens_per_round(ones, ones, 2).tolist() == [3, 3, 3, 2]
    assert output_tokens_per_round(ones, ones, 0).tolist() == [1, 1, 1, 1]


def test_costs_are_interpolated_and_their_absence_is_not_a_number() -> None:
    costs = PassCosts((1, 3), (1, 5), ((0.010, 0.014), (0.020, 0.028)), (0.001, 0.003))
    operation = Operation(2, 2.0, costs)
    assert round_s(operation, costs) == pytest.approx((0.012 + 0.024) / 2 + 2 * 0.002)
    assert tokens_per_s(1.5, operation) == pytest.approx(2.0 * 1.5 / 0.022)
    assert np.isnan(tokens_per_s(1.5, Operation(2)))
