"""The gate: decides from paired, held-out scores whether the candidate may serve. Pure.

Knows no models and no clock. Invariant: a candidate passes only if the one-sided lower bound of its
gain over the incumbent, from a bootstrap over records (not positions: those of one record are not
independent), is above the wanted gain, its expected speed is not worse, and the floor is not better. Speed
is tokens a second at the costs that a replica reports, each draft at its own best draft length; tokens a
round while no costs are known.
A candidate no better than the incumbent passes one decision at most about `level` of the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from learner.judging.evaluation import RecordScore
from learner.judging.speed import ExpectedSpeed, Operation, SpeedUnit, expected_speed


@dataclass(frozen=True)
class GateRule:
    """The gate's requirements; see LearnerSettings."""

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
SPEED_WORDS: dict[SpeedUnit, str] = {"tokens_per_s": "tokens a second", "tokens_per_round": "tokens a round"}


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
    """All three scored on the same records, in the same order. `fault`: why the candidate must be refused
    without scoring (weights, revisions); empty: no reason."""
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
    new, old = speed(candidate, operation), speed(incumbent, operation)
    evidence = _evidence(candidate, incumbent, floor, rule, rng) | _speed_evidence(new, old)
    reason = _objection(evidence, rule) or _slower(new, old)
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


def speed(scores: Scores, operation: Operation) -> ExpectedSpeed:
    """Expected speed of the draft with these scores, at least one; every position has the same weight."""
    weights = [len(score.expected_N) for score in scores]
    longest = max(operation.draft_lengths)
    rounds = [score.tokens_per_round(longest) for score in scores]
    return expected_speed(np.average(rounds, axis=0, weights=weights).tolist(), operation)


def _sums(scores: Scores) -> NDArray[np.float64]:
    return np.array([score.expected_N.sum(dtype=np.float64) for score in scores])


def _evidence(
    candidate: Scores,
    incumbent: Scores,
    floor: Scores,
    rule: GateRule,
    rng: np.random.Generator,
) -> dict[str, float]:
    lower = gain_lower_bound(candidate, incumbent, rule.level, rule.num_resamples, rng)
    return {
        "num_held_out_records": float(len(candidate)),
        "acceptance_candidate": acceptance(candidate),
        "acceptance_incumbent": acceptance(incumbent),
        "acceptance_floor": acceptance(floor),
        "gain_lower_bound": lower,
    }


def _speed_evidence(candidate: ExpectedSpeed, incumbent: ExpectedSpeed) -> dict[str, float]:
    """The compared speeds, under the name of their unit, and the draft lengths."""
    return {
        f"{candidate.unit}_candidate": candidate.amount,
        f"{incumbent.unit}_incumbent": incumbent.amount,
        "num_draft_tokens_candidate": float(candidate.num_draft_tokens),
        "num_draft_tokens_incumbent": float(incumbent.num_draft_tokens),
    }


def _objection(evidence: dict[str, float], rule: GateRule) -> str:
    """Reason to refuse; empty if there is none."""
    if not np.isfinite(evidence["acceptance_candidate"]):
        return "the candidate's acceptance is not finite"
    if evidence["gain_lower_bound"] <= rule.min_gain:
        lower = f"{evidence['gain_lower_bound']:+.4f}"
        return f"not better than the incumbent: lower bound of the gain {lower}, not over {rule.min_gain}"
    if evidence["acceptance_candidate"] <= evidence["acceptance_floor"]:
        return "not better than the floor"
    return ""


def _slower(candidate: ExpectedSpeed, incumbent: ExpectedSpeed) -> str:
    """Reason to refuse if the candidate is expected to be slower, else empty; both are in the same unit."""
    if not candidate.amount < incumbent.amount:
        return ""
    return (
        f"expected {SPEED_WORDS[candidate.unit]} are worse than the incumbent's: {candidate.amount:.2f} at "
        f"draft length {candidate.num_draft_tokens}, not {incumbent.amount:.2f} at "
        f"{incumbent.num_draft_tokens}"
    )


def _praise(evidence: dict[str, float]) -> str:
    before, after = evidence["acceptance_incumbent"], evidence["acceptance_candidate"]
    return (
        f"acceptance {before:.3f} -> {after:.3f}, lower bound of the gain {evidence['gain_lower_bound']:+.4f}"
    )
