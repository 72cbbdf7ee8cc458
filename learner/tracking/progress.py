"""One route's counters, last figures and decisions, for display and for the tracker.

Knows no draft and no store. Invariant: `facts` is plain data and never waits for the tracker.
"""

import logging
from collections.abc import Sequence
from typing import Any

from buffer.names import FLOOR_VERSION
from buffer.records import AdapterManifest
from learner.judging.judge import Judgement
from learner.settings import LearnerSettings
from learner.tracking.tracker import Tracker
from learner.trainer import TrainingReport
from learner.training_schedule import ScheduleRule, TrainingSchedule

logger = logging.getLogger(__name__)


class Progress:
    """`schedule` and `num_records_seen` come from the checkpoint, if there is one."""

    def __init__(
        self,
        settings: LearnerSettings,
        tracker: Tracker,
        schedule: TrainingSchedule,
        num_records_seen: int,
        route: str,
    ) -> None:
        self._settings = settings
        self.tracker = tracker
        self.route = route
        self.schedule = schedule
        self.rule = ScheduleRule(
            stall_gain=settings.stall_gain,
            stall_decisions=settings.stall_decisions,
            slow_stretch=settings.slow_stretch,
            first_rest_records=settings.first_rest_records,
            max_rest_records=settings.max_rest_records,
            shift_drop=settings.shift_drop,
        )
        self._num_learnt_records = 0
        self._num_rested_records = 0
        self.num_records_seen = num_records_seen
        self.num_refused_records = 0
        self.num_refusals_in_a_row = 0
        self._last_decision: dict[str, Any] | None = None
        self._figures: dict[str, float | None] = {}

    def arrived(self, rates: Sequence[float]) -> bool:
        """Update live acceptance, one rate for each record. True: traffic shifted."""
        before, self.schedule = self.schedule, self.schedule.after_records(rates, self.rule)
        return self.schedule.num_shifts > before.num_shifts

    def took(self, num_records: int) -> None:
        """Count records that are about to be trained on."""
        self.num_records_seen += num_records
        self._num_learnt_records += num_records

    def rested(self, num_records: int) -> None:
        """Count records that were not trained on."""
        self.schedule = self.schedule.after_rest(num_records)
        self.num_records_seen += num_records
        self._num_rested_records += num_records

    def saved_s(self, busy_s: float) -> float:
        """Estimated seconds that training on the skipped records would have taken."""
        return busy_s * self._num_rested_records / max(1, self._num_learnt_records)

    def decided(self, kind: str, draft_version: int, reason: str) -> None:
        """Log a decision; `kind` as in AdapterEvent."""
        logger.info("route %s, draft version %d %s: %s", self.route, draft_version, kind, reason)
        self._last_decision = {"kind": kind, "draft_version": draft_version, "reason": reason}
        if kind not in ("rejected_by_replica", "confirmed"):  # which are no decisions on the candidate
            self.num_refusals_in_a_row = self.num_refusals_in_a_row + 1 if kind == "refused" else 0
        if kind == "rolled_back":
            self.schedule = self.schedule.resumed()
        self.tracker.log_decision(self.route, kind, draft_version, reason, self.num_records_seen)

    def serving_changed(
        self, kind: str, manifest: AdapterManifest | None, weights: bytes, reason: str
    ) -> None:
        """Another draft serves from now on; `manifest` None is the floor."""
        version, parent = FLOOR_VERSION, FLOOR_VERSION
        if manifest is not None:
            version, parent = manifest.draft_version, manifest.parent_version
            promotion = reason if kind == "promoted" else "promoted before this learner followed the feed"
            self.tracker.log_adapter(manifest, weights, promotion)
        self.tracker.mark_serving(self.route, version, parent, f"{kind.replace('_', ' ')}: {reason}")
        self.decided(kind, version, reason)

    def cycle_ended(
        self, report: TrainingReport, judgement: Judgement, num_steps: int, busy_s: float
    ) -> None:
        """Update the schedule, and send the cycle's figures to the tracker; `num_steps` and `busy_s` are
        totals."""
        acceptance = judgement.acceptance_candidate
        self.schedule = self.schedule.after_decision(
            judgement.held_out_gain, judgement.decision.promote, self.rule
        )
        figures = {
            "loss": report.mean_loss,
            "acceptance_candidate": acceptance,
            "acceptance_incumbent": judgement.acceptance_incumbent,
            "acceptance_floor": judgement.acceptance_floor,
            "training_s": report.compute_s,
            "num_skipped_steps": float(report.num_skipped),
            "num_steps": float(num_steps),
            "held_out_gain": judgement.held_out_gain.gain,
            "slow": float(self.schedule.slow),
            "asleep": float(self.schedule.asleep),
            "learner_s": busy_s,
            "learner_saved_s": self.saved_s(busy_s),
        }
        measured = {name: value for name, value in figures.items() if value == value}
        self._figures = {name: measured.get(name) for name in figures}
        more = {"acceptance_live": self.schedule.short_acceptance}
        if "gain_lower_bound" in judgement.decision.evidence:
            more["gain_lower_bound"] = judgement.decision.evidence["gain_lower_bound"]
        measured |= {name: value for name, value in more.items() if value is not None}
        self.tracker.log_metrics(self.route, measured, self.num_records_seen)

    def facts(self) -> dict[str, Any]:
        """Plain data for display; a figure that is not known yet is None."""
        return {
            "loss": None,
            "acceptance_candidate": None,
            "acceptance_incumbent": None,
            "acceptance_floor": None,
            **self._figures,
            "last_decision": self._last_decision,
            "num_records_seen": self.num_records_seen,
            "num_refused_records": self.num_refused_records,
            "slow": self.schedule.slow,
            "asleep": self.schedule.asleep,
            "num_rested_records": self._num_rested_records,
            "num_shifts": self.schedule.num_shifts,
            "live_acceptance": self.schedule.short_acceptance,
        }
