"""When to train: often while it helps, rarely while it does not, at once when traffic shifts.

Training stalls if, over the last decisions together, the candidate gained less than `stall_gain` over the
draft that served before them, both scored on the same held-out records; or if the gain is not significant
(lower bound of a paired bootstrap), which at full speed takes three times as many decisions. First it slows:
cycles wait for several times the records, so that candidates are judged less often and each decision has more
records. If that stalls too it sleeps: records are still read, held out and watched, but not trained on,
except for a probe now and then; each rest is twice as long as the one before unless the probe was promoted. A
probe that gains at least `stall_gain` ends the sleep; a fall of live acceptance ends both sleep and slowness.

Pure: state in, state out. Knows no store and no clock. Invariant: the oldest record's age alone always starts
a cycle or a rest, so that slow traffic is never left unread.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

SHORT, LONG = 30, 300
"""Number of records over which live acceptance is averaged."""
LEAST_BASELINE = 60
"""Records that are needed before a fall can be detected."""
LEAST_DEVIATION = 0.1
"""Lower bound on the deviation of single records' acceptance: a small one over uniform traffic proves
little."""
FALL_EVIDENCE = 6.0
"""Log likelihood ratio at which a fall is detected: on unchanged traffic about once in 10,000 records or
less; a fall of .2 where single records deviate by .25 is detected within some 40."""
PATIENCE = 3
"""At full speed, training slows after this many times `stall_decisions` without a significant gain."""


@dataclass(frozen=True)
class ScheduleRule:
    """See LearnerSettings."""

    stall_gain: float = 0.01
    stall_decisions: int = 6
    slow_stretch: int = 4
    first_rest_records: int = 192
    max_rest_records: int = 3072
    shift_drop: float = 0.1


@dataclass(frozen=True)
class HeldOutGain:
    """Held-out acceptance gained since the reference, and its lower bound; NaN where not scored."""

    gain: float = math.nan
    lower: float = math.nan


@dataclass(frozen=True)
class TrainingSchedule:
    """State of the schedule: counters of decisions and rests, and averages of live acceptance."""

    slow: bool = False
    asleep: bool = False
    num_decisions: int = 0
    """Decisions since the reference, which is the draft that served when counting began. 0: the draft that
    serves now becomes the reference."""
    rest_records: int = 0
    """Length of the present rest; `rest_left` is what remains of it, and a probe is due when that is 0."""
    rest_left: int = 0
    num_shifts: int = 0
    short_acceptance: float | None = None
    long_acceptance: float | None = None
    """Moving averages of live acceptance."""
    variance: float = 0.0
    """Variance of single records around the long average."""
    num_rates: int = 0
    fall: float = 0.0
    """Evidence that live acceptance fell, as a CUSUM of log likelihood ratios."""

    @staticmethod
    def restored(fields: Mapping[str, Any]) -> "TrainingSchedule":
        """The schedule of a checkpoint, perhaps of an older version; a restart begins with a new
        reference."""
        current_fields = {
            name: value for name, value in fields.items() if name in TrainingSchedule.__dataclass_fields__
        }
        return replace(TrainingSchedule(**current_fields), num_decisions=0)

    @property
    def resting(self) -> bool:
        """Whether arriving records are not trained on."""
        return self.asleep and self.rest_left > 0

    def slowdown(self, rule: ScheduleRule) -> int:
        """Factor on the number of records that a cycle waits for."""
        return rule.slow_stretch if self.slow and not self.resting else 1

    def after_rest(self, num_records: int) -> "TrainingSchedule":
        """The schedule after so many records that were not trained on."""
        return replace(self, rest_left=max(0, self.rest_left - num_records))

    def after_decision(
        self, held_out_gain: HeldOutGain, promoted: bool, rule: ScheduleRule
    ) -> "TrainingSchedule":
        """The schedule after a decision; one without a score changes nothing."""
        if math.isnan(held_out_gain.gain) or rule.max_rest_records == 0:
            return self
        if self.asleep:
            if promoted and held_out_gain.gain >= rule.stall_gain:
                return replace(self.resumed(), slow=True)
            rest = self.rest_records if promoted else min(2 * self.rest_records, rule.max_rest_records)
            return replace(self, rest_records=rest, rest_left=rest)
        num_decisions = self.num_decisions + 1
        if num_decisions < rule.stall_decisions:
            return replace(self, num_decisions=num_decisions)
        shown = held_out_gain.lower > 0
        most = rule.stall_decisions if self.slow else PATIENCE * rule.stall_decisions
        if held_out_gain.gain < rule.stall_gain or (not shown and num_decisions >= most):
            if not self.slow:
                return replace(self, slow=True, num_decisions=0)
            rest = min(rule.first_rest_records, rule.max_rest_records)
            return replace(self, asleep=True, num_decisions=0, rest_records=rest, rest_left=rest)
        return replace(self, num_decisions=0 if shown else num_decisions)

    def after_records(self, rates: Iterable[float], rule: ScheduleRule) -> "TrainingSchedule":
        """The schedule after records with these rates of live acceptance; a fall resumes training."""
        schedule = self
        for rate in rates:
            schedule = schedule._after_rate(rate, rule)
        return schedule

    def resumed(self) -> "TrainingSchedule":
        """The schedule at full speed; the draft that serves now becomes the reference."""
        return replace(self, slow=False, asleep=False, num_decisions=0, rest_records=0, rest_left=0)

    def _after_rate(self, rate: float, rule: ScheduleRule) -> "TrainingSchedule":
        if self.long_acceptance is None:
            return replace(self, short_acceptance=rate, long_acceptance=rate, num_rates=1)
        fall = self._fall(rate, self.long_acceptance, rule.shift_drop)
        short = _followed(self.short_acceptance, rate, max(1 / SHORT, 1 / (self.num_rates + 1)))
        if fall >= FALL_EVIDENCE:  # the recent average becomes the baseline
            start = replace(self, long_acceptance=short, short_acceptance=short, num_rates=1, fall=0.0)
            return replace(start, num_shifts=self.num_shifts + 1).resumed()
        weight = max(1 / LONG, 1 / (self.num_rates + 1))
        return replace(
            self,
            short_acceptance=short,
            long_acceptance=_followed(self.long_acceptance, rate, weight),
            variance=_followed(self.variance, (rate - self.long_acceptance) ** 2, weight),
            num_rates=self.num_rates + 1,
            fall=fall,
        )

    def _fall(self, rate: float, usual: float, shift_drop: float) -> float:
        """CUSUM statistic of a fall by `shift_drop` against none, reduced by the uncertainty of the
        baseline."""
        if self.num_rates < LEAST_BASELINE:
            return 0.0
        variance = max(self.variance, LEAST_DEVIATION**2)
        unsure = math.sqrt(variance / min(self.num_rates, 2 * LONG))
        return max(0.0, self.fall + shift_drop / variance * (usual - rate - shift_drop / 2 - unsure))


def is_due(
    num_waiting: int, oldest_age_s: float, slowdown: int, min_records: int, max_record_age_s: float
) -> bool:
    """Whether a cycle should start now."""
    if num_waiting == 0:
        return False
    return num_waiting >= min_records * slowdown or oldest_age_s >= max_record_age_s * slowdown


def _followed(average: float | None, value: float, weight: float) -> float:
    return value if average is None else (1 - weight) * average + weight * value
