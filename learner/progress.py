"""What the learner did for one route and decided, for people: counters, last figures, the tracker's lines.

Knows no draft and no store. Invariant: `facts` is plain data and never waits for the tracker.
"""

import logging
from typing import Any

from buffer.records import DEFAULT_ROUTE
from learner.judge import Judgement
from learner.schedule import Pace
from learner.settings import LearnerSettings
from learner.tracking import Tracker
from learner.trainer import TrainingReport

logger = logging.getLogger(__name__)


class Progress:
    """`pace` and `num_records_seen` come from the checkpoint, if there is one. What is told of another route
    than `default` bears its name in front."""

    def __init__(
        self,
        settings: LearnerSettings,
        tracker: Tracker,
        pace: Pace,
        num_records_seen: int,
        route: str = DEFAULT_ROUTE,
    ) -> None:
        self._settings = settings
        self._prefix = "" if route == DEFAULT_ROUTE else f"{route}/"
        self.tracker = tracker
        self.pace = pace
        self.num_records_seen = num_records_seen
        self.num_refused_records = 0
        self.num_refusals_in_a_row = 0
        self._last_decision: dict[str, Any] | None = None
        self._figures: dict[str, float | None] = {}

    def arrived(self, num_accepted: int, num_attempted: int, num_records: int) -> None:
        """Follows live acceptance; a shift wakes a slowed learner."""
        pace = self.pace.after_records(num_accepted, num_attempted, num_records)
        self.pace = pace.woken(self._settings.shift_drop)

    def decided(self, kind: str, draft_version: int, reason: str, step: int) -> None:
        """`kind` as in AdapterEvent."""
        logger.info("%sdraft version %d %s: %s", self._prefix, draft_version, kind, reason)
        self._last_decision = {"kind": kind, "draft_version": draft_version, "reason": reason}
        self.num_refusals_in_a_row = self.num_refusals_in_a_row + 1 if kind == "refused" else 0
        self.tracker.log_decision(f"{self._prefix}decision.step{step}.v{draft_version}", f"{kind}: {reason}")

    def cycle_ended(self, report: TrainingReport, judgement: Judgement, num_records: int, step: int) -> None:
        """Figures of the cycle go to the tracker and set the pace of the next."""
        self.num_records_seen += num_records
        settings, acceptance = self._settings, judgement.acceptance_candidate
        gain = acceptance - judgement.acceptance_incumbent
        self.pace = self.pace.after_evaluation(gain, settings.stall_gain, settings.max_slowdown)
        figures = {
            "loss": report.mean_loss,
            "acceptance_candidate": acceptance,
            "acceptance_incumbent": judgement.acceptance_incumbent,
            "acceptance_floor": judgement.acceptance_floor,
            "training_s": report.compute_s,
            "num_skipped_steps": float(report.num_skipped),
            "num_records_seen": float(self.num_records_seen),
        }
        known = {name: value for name, value in figures.items() if value == value}
        self._figures = {name: known.get(name) for name in figures}
        self.tracker.log_metrics({self._prefix + name: value for name, value in known.items()}, step)

    def facts(self) -> dict[str, Any]:
        """None where a figure is not known yet."""
        return {
            "loss": None,
            "acceptance_candidate": None,
            "acceptance_incumbent": None,
            "acceptance_floor": None,
            **self._figures,
            "last_decision": self._last_decision,
            "num_records_seen": self.num_records_seen,
            "num_refused_records": self.num_refused_records,
            "slowdown": self.pace.slowdown,
            "live_acceptance": self.pace.short_acceptance,
        }
