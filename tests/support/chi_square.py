"""Goodness of fit with a stated false-alarm rate."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from scipy import stats

FALSE_ALARM_RATE = 1e-4
"""Of one test on a right implementation; seeds are fixed, so a passing test stays passing."""


def fit_p_value(outcomes: Iterable[Any], law: Mapping[Any, float], min_expected: float = 5.0) -> float:
    """p-value of `outcomes` under `law`; rare cells are pooled so that each expects `min_expected`."""
    counts = Counter(outcomes)
    total = sum(counts.values())
    assert set(counts) <= {key for key, probability in law.items() if probability > 0}, "impossible outcome"
    observed, expected, rare_observed, rare_expected = [], [], 0.0, 0.0
    for key, probability in law.items():
        if probability * total >= min_expected:
            observed.append(float(counts[key]))
            expected.append(probability * total)
        else:
            rare_observed += counts[key]
            rare_expected += probability * total
    if rare_expected > 0:
        observed.append(rare_observed)
        expected.append(rare_expected)
    scale = sum(observed) / sum(expected)
    return float(stats.chisquare(observed, [value * scale for value in expected]).pvalue)
