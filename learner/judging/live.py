"""Two sequential tests that watch a swap; both remain valid however often they are evaluated.

`LiveComparison`: the new draft against the one before, both scored on the *same* records that arrive after
the swap (raw live acceptance is confounded by shifting traffic); a draft that is worse is rolled back.
`SwapCheck`: the acceptance that serving observed against the one expected of the new draft at the same
positions; detects a swap that did not load the intended weights.

Both bet against "nothing is wrong": wealth whose expected growth is at most nil under that hypothesis exceeds
1 / f with probability at most f, ever (Ville), so the false-alarm rate holds at any number of evaluations.
Pure: state in, state out. Knows no models.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from buffer.records import GenerationRecord
from learner.judging.evaluation import RecordScore

BETS = (0.05, 0.1, 0.2, 0.4)
"""Shares of wealth bet on a position of the swap check. The test uses the average wealth over them, because
small effects need small bets."""

LEAST_VALUE = -2.0
"""Lower bound of a value that is bet on: an acceptance estimate lies in [0, 2). No bet may lose more than its
wealth."""

SCALE = 4.0
"""Scale of the comparison: a record's loss x multiplies wealth by 1 + tanh(SCALE * x). There is no expected
growth if losses of each size are no more frequent than gains of that size; if their frequencies differ, log(1
+ tanh) is concave, so wealth shrinks unless the mean is a loss. Bets on the plain mean of values in [-1, 1]
need three times the records, because they must allow for a gain of a whole 1."""

SLIGHT_LOSS = 0.01
"""A loss this small is neither bet on nor a reason to roll back: a draft that gains much on few records loses
a little on many."""

SHORT_RECORD_POSITIONS = 8
"""A record of so few positions counts half."""


@dataclass(frozen=True)
class Evidence:
    """Log wealth of each bettor."""

    log_wealth: tuple[float, ...]
    num_values: int = 0

    def grown(self, gained: Sequence[float], num_values: int) -> "Evidence":
        """`gained`: what the values added to each log wealth."""
        wealth = tuple(before + now for before, now in zip(self.log_wealth, gained, strict=True))
        return Evidence(wealth, self.num_values + num_values)

    @property
    def log_mean_wealth(self) -> float:
        return float(np.logaddexp.reduce(self.log_wealth)) - math.log(len(self.log_wealth))

    def alarms(self, false_alarm: float) -> bool:
        """Never, with probability at least 1 - false_alarm, while nothing is wrong."""
        return self.log_mean_wealth >= -math.log(false_alarm)


def bet_on_mean(values: NDArray[np.float64]) -> list[float]:
    """Log growth of BETS that values have a mean above 0."""
    assert values.size == 0 or values.min() >= LEAST_VALUE
    return [float(np.log1p(bet * values).sum()) for bet in BETS]


def bet_on_losses(losses: NDArray[np.float64]) -> list[float]:
    """Sum of log(1 + tanh(SCALE * loss)), in a form that never takes the log of 0."""
    return [float((math.log(2.0) - np.logaddexp(0.0, -2.0 * SCALE * (losses - SLIGHT_LOSS))).sum())]


@dataclass(frozen=True)
class LiveComparison:
    """New draft against the one it replaced; one value for each record, the incumbent's acceptance minus the
    candidate's."""

    draft_version: int
    false_alarm: float
    max_records: int
    evidence: Evidence = field(default_factory=lambda: Evidence((0.0,)))
    gain_sum: float = 0.0

    def observe(self, candidate: Iterable[RecordScore], incumbent: Iterable[RecordScore]) -> "LiveComparison":
        """Scores on the same records, in the same order. A score that is not finite counts as a loss."""
        pairs = list(zip(candidate, incumbent, strict=True))
        losses = np.array([_loss(after, before) for after, before in pairs], dtype=float)
        return replace(
            self,
            evidence=self.evidence.grown(bet_on_losses(losses), len(losses)),
            gain_sum=self.gain_sum - sum(_lost_acceptance(after, before) for after, before in pairs),
        )

    @property
    def verdict(self) -> str:
        """`rollback`, `keep` (watched long enough) or `watching`."""
        if self.evidence.alarms(self.false_alarm):
            return "rollback"
        return "keep" if self.evidence.num_values >= self.max_records else "watching"

    @property
    def mean_gain(self) -> float:
        """Acceptance of the new draft minus that of the one before, the mean over records."""
        return self.gain_sum / max(1, self.evidence.num_values)


@dataclass(frozen=True)
class SwapCheck:
    """Observed against expected acceptance of the serving draft; one value for each attempted position.

    `margin` allows for what is known to differ: draft keys and values from before the swap, contexts cut
    for training, bounds of the coupled estimate.
    """

    draft_version: int
    false_alarm: float
    margin: float
    evidence: Evidence = field(default_factory=lambda: Evidence((0.0,) * len(BETS)))
    num_accepted: int = 0
    expected_sum: float = 0.0

    def observe(self, scores: Iterable[RecordScore]) -> "SwapCheck":
        """Scores of the serving draft on records whose every round it drafted (`drafted_by`)."""
        check = self
        for score in scores:
            attempted_N = score.attempted_N
            accepted_N = score.accepted_N[attempted_N].astype(float)
            expected_N = score.expected_N[attempted_N].astype(float)
            if not np.isfinite(expected_N).all():
                continue
            check = replace(
                check,
                evidence=check.evidence.grown(
                    bet_on_mean(expected_N - accepted_N - self.margin), len(expected_N)
                ),
                num_accepted=check.num_accepted + int(accepted_N.sum()),
                expected_sum=check.expected_sum + float(expected_N.sum()),
            )
        return check

    @property
    def is_broken(self) -> bool:
        return self.evidence.alarms(self.false_alarm)

    @property
    def observed_acceptance(self) -> float:
        return self.num_accepted / max(1, self.evidence.num_values)

    @property
    def expected_acceptance(self) -> float:
        return self.expected_sum / max(1, self.evidence.num_values)


def drafted_by(record: GenerationRecord, draft_version: int) -> bool:
    """Whether this version of the record's route drafted every round that a draft model drafted. Rounds that
    copied are ignored."""
    by_draft = [trace for trace in record.rounds if trace.num_drafted and trace.is_by_draft]
    return bool(by_draft) and all(trace.is_by(record.route, draft_version) for trace in by_draft)


def _loss(after: RecordScore, before: RecordScore) -> float:
    """Acceptance lost on one record, averaged over its positions and SHORT_RECORD_POSITIONS that lose
    nothing."""
    num_positions = len(before.expected_N)
    lost = (before.acceptance - after.acceptance) * num_positions / (num_positions + SHORT_RECORD_POSITIONS)
    return float(np.nan_to_num(lost, nan=1.0))


def _lost_acceptance(after: RecordScore, before: RecordScore) -> float:
    """Acceptance lost on one record, as it is reported."""
    return float(np.nan_to_num(before.acceptance - after.acceptance, nan=1.0))
