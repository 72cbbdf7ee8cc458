"""May the candidate serve? One pure decision on paired, held-out scores.

Knows no models and no clock. Invariant: a candidate passes only if the one-sided lower bound of its
gain over the incumbent, from a bootstrap over records (not positions: those of one record are not
independent), is above the wanted gain, its predicted speed is not worse, and the floor is not better.
A candidate no better than the incumbent passes one decision at most about `level` of the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from learner.evaluation import RecordScore
from learner.speed import Operation, tokens_per_s


@dataclass(frozen=True)
class GateRule:
    """What a candidate must show; see LearnerSettings."""

    min_records: int = 16
    level: float = 0.05
    min_gain: float = 0.0
    num_resamples: int = 1000


@dataclass(frozen=True)
class GateDecision:
    """A refusal is a value, not an error."""

    promote: bool
    reason: str
    evidence: dict[str, float] = field(default_factory=dict)


Scores = Sequence[RecordScore]


def decide(
    candidate: Scores,
    incumbent: Scores,
    floor: Scores,
    *,
    fault: str,
    operation: Operation,
    rule: GateRule,
    rng: np.random.Generator,
) -> GateDecision:
    """All three scored on the same records, in the same order. `fault` is what is already known to be
    wrong with the candidate (weights, revisions); empty: nothing."""
    if not len(candidate) == len(incumbent) == len(floor):
        raise ValueError(
            f"{len(candidate)} candidate, {len(incumbent)} incumbent and {len(floor)} floor scores are "
            "no pairs; nothing was decided"
        )
    if fault:
        return GateDecision(False, fault)
    if len(candidate) < rule.min_records:
        reason = f"{len(candidate)} held-out records, {rule.min_records} are needed"
        return GateDecision(False, reason, {"num_held_out_records": float(len(candidate))})
    evidence = _evidence(candidate, incumbent, floor, operation, rule, rng)
    reason = _objection(evidence, rule)
    return GateDecision(not reason, reason or _praise(evidence), evidence)


def gain_lower_bound(
    candidate: Scores, incumbent: Scores, level: float, num_resamples: int, rng: np.random.Generator
) -> float:
    """One-sided lower bound of the gain in acceptance, by a paired bootstrap over records."""
    gains = _sums(candidate) - _sums(incumbent)
    counts = np.array([len(score.expected_N) for score in candidate], dtype=float)
    if not np.isfinite(gains).all():
        return float("-inf")
    draws = rng.multinomial(len(gains), np.full(len(gains), 1 / len(gains)), size=num_resamples)
    return float(np.quantile((draws @ gains) / (draws @ counts), level))


def acceptance(scores: Scores) -> float:
    """Mean over all positions of the records; NaN for none."""
    num_positions = sum(len(score.expected_N) for score in scores)
    return float(_sums(scores).sum() / num_positions) if num_positions else float("nan")


def speed(scores: Scores, operation: Operation) -> tuple[float, float]:
    """(output tokens a round, output tokens per second), the latter NaN without costs."""
    if not scores:
        return float("nan"), float("nan")
    weights = [len(score.expected_N) for score in scores]
    rounds = [score.tokens_per_round(operation.num_draft_tokens) for score in scores]
    per_round = float(np.average(rounds, weights=weights))
    return per_round, tokens_per_s(per_round, operation)


def _sums(scores: Scores) -> NDArray[np.float64]:
    return np.array([score.expected_N.sum(dtype=np.float64) for score in scores])


def _evidence(
    candidate: Scores,
    incumbent: Scores,
    floor: Scores,
    operation: Operation,
    rule: GateRule,
    rng: np.random.Generator,
) -> dict[str, float]:
    lower = gain_lower_bound(candidate, incumbent, rule.level, rule.num_resamples, rng)
    evidence = {
        "num_held_out_records": float(len(candidate)),
        "acceptance_candidate": acceptance(candidate),
        "acceptance_incumbent": acceptance(incumbent),
        "acceptance_floor": acceptance(floor),
        "gain_lower_bound": lower,
    }
    for name, scores in (("candidate", candidate), ("incumbent", incumbent)):
        per_round, per_s = speed(scores, operation)
        evidence[f"tokens_per_round_{name}"] = per_round
        if np.isfinite(per_s):
            evidence[f"tokens_per_s_{name}"] = per_s
    return evidence


def _objection(evidence: dict[str, float], rule: GateRule) -> str:
    """Why not; empty when nothing speaks against it."""
    if not np.isfinite(evidence["acceptance_candidate"]):
        return "the candidate's acceptance is not finite"
    if evidence["gain_lower_bound"] <= rule.min_gain:
        lower = f"{evidence['gain_lower_bound']:+.4f}"
        return f"not better than the incumbent: lower bound of the gain {lower}, not over {rule.min_gain}"
    if evidence["acceptance_candidate"] <= evidence["acceptance_floor"]:
        return "not better than the floor"
    if evidence["tokens_per_round_candidate"] < evidence["tokens_per_round_incumbent"]:
        return "expected tokens per second are worse than the incumbent's"
    return ""


def _praise(evidence: dict[str, float]) -> str:
    before, after = evidence["acceptance_incumbent"], evidence["acceptance_candidate"]
    return (
        f"acceptance {before:.3f} -> {after:.3f}, lower bound of the gain {evidence['gain_lower_bound']:+.4f}"
    )
