"""Goodness of fit with a stated false-alarm rate."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from scipy import stats

FALSE_ALARM_RATE = 1e-4
"""Of one test on a right implementation; seeds are fixed, so a passing test stays passing."""


def fit_p_value(
    outcomes: Iterable[Any], distribution: Mapping[Any, float], min_expected: float = 5.0
) -> float:
    """p-value of `outcomes` under `distribution`; rare cells are pooled so that each expects `min_expected`,
    with the smallest of the others if need be. A distribution of one cell is met by whatever is possible."""
    counts = Counter(outcomes)
    total = sum(counts.values())
    assert set(counts) <= {key for key, probability in distribution.items() if probability > 0}, (
        "impossible outcome"
    )
    observed, expected, rare_observed, rare_expected = [], [], 0.0, 0.0
    for key, probability in distribution.items():
        if probability * total >= min_expected:
            observed.append(float(counts[key]))
            expected.append(probability * total)
        else:
            rare_observed += counts[key]
            rare_expected += probability * total
    if 0 < rare_expected < min_expected and expected:
        smallest = expected.index(min(expected))
        rare_observed += observed.pop(smallest)
        rare_expected += expected.pop(smallest)
    if rare_expected > 0:
        observed.append(rare_observed)
        expected.append(rare_expected)
    if len(expected) == 1:
        return 1.0
    scale = sum(observed) / sum(expected)
    return float(stats.chisquare(observed, [value * scale for value in expected]).pvalue)
