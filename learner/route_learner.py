"""Trains and publishes one route's draft: the candidate, the incumbent, the judge and the live watch.

Knows no store, and of other routes only the draft that serves this one until it has its own. Invariants:
nothing is published that did not pass the gate against the draft that serves the route now; a killed learner
continues the route from its checkpoint.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.records import GenerationRecord
from buffer.store import AdapterFeed
from learner import checkpoint
from learner.draft import AdapterState, TrainableDraft
from learner.incumbent import Incumbent
from learner.judging.draft_selection import FLOOR, DraftScores, ExistingDraft
from learner.judging.evaluation import observed_rates
from learner.judging.judge import Judge, Judgement, operation
from learner.judging.rollback_backoff import rollback_backoff
from learner.judging.watch import LiveWatch
from learner.replica_replies import ReplicaReplies
from learner.settings import LearnerSettings
from learner.tracking.progress import Progress
from learner.tracking.tracker import Tracker
from learner.trainer import Trainer, TrainingReport
from learner.training_schedule import TrainingSchedule, is_due

logger = logging.getLogger(__name__)


class RouteLearner:
    """`draft` is shared by all routes, because the base under their weights is the same; each route trains
    its own weights.

    `fallback` is the draft that serves the route while it has none of its own: `default`'s, which itself
    falls back to the floor. `found` is the route's checkpoint, if there is one.
    """

    def __init__(
        self,
        route: str,
        draft: TrainableDraft,
        feed: AdapterFeed,
        settings: LearnerSettings,
        *,
        target_revision: str,
        tracker: Tracker,
        now_s: Callable[[], float],
        fallback: Callable[[], ExistingDraft],
        found: checkpoint.Checkpoint | None,
    ) -> None:
        self.route = route
        self._feed, self._settings, self._now_s = feed, settings, now_s
        self._fallback = fallback
        self.trainer = Trainer(draft, settings)
        self.judge = Judge(settings, self.trainer.score)
        self.watch = LiveWatch(settings, self.trainer.score)
        self.replies = ReplicaReplies(feed, route, told_until_s=now_s())
        schedule = TrainingSchedule.restored(found.schedule if found else {})
        num_records_seen = found.num_records_seen if found else 0
        self.progress = Progress(settings, tracker, schedule, num_records_seen, route)
        self.incumbent = Incumbent(
            feed,
            draft,
            route=route,
            target_revision=target_revision,
            now_s=now_s,
            manifest=found.incumbent_manifest if found else None,
            weights=found.incumbent_weights if found else b"",
            last_version=found.last_version if found else 0,
        )
        self.bootstrap_records: list[GenerationRecord] = []
        """Kept records of the route when it was opened; its first cycle trains on them."""
        self.scores_of_drafts: DraftScores = {}
        """Scores of every draft that existed at the last decision, on this route's held-out records."""
        self.start = FLOOR
        """The draft that the candidate started from when the route was opened or restarted."""
        if found:
            self._restore(found)

    @property
    def serving(self) -> ExistingDraft:
        """The draft that serves this route's requests now."""
        if not self.has_own and self.route != DEFAULT_ROUTE:
            return self._fallback()
        incumbent = self.incumbent
        return ExistingDraft(self.route, incumbent.version, incumbent.state, incumbent.unreadable)

    @property
    def has_own(self) -> bool:
        """Whether a draft of this route passed the gate and serves."""
        return self.incumbent.version != FLOOR_VERSION

    # the steps of a cycle, in order

    def follow_feed(self) -> None:
        """Adopt the draft that the feed says serves; after a rollback from outside, continue training from
        it."""
        if self.incumbent.sync():
            self.watch.end()
            self.restart()
            kind, reason = self.incumbent.last_serving_change()
            self.progress.serving_changed(kind, self.incumbent.manifest, self.incumbent.weights, reason)
        self._watch_what_serves()

    def handle_replica_rejections(self) -> None:
        """Report replicas' rejections, and roll back a version that no replica serves."""
        for event in self.replies.new():
            self.progress.decided(event.kind, event.draft_version, event.reason)
        if reason := self.replies.rejected_by_all(self.incumbent.version):
            self._roll_back(reason)

    def watch_live(self, sound: Sequence[GenerationRecord]) -> None:
        """Evaluate arrived records; roll back a draft that is worse on live traffic or was swapped wrongly;
        let one that passed its trial on one replica serve on all."""
        if self.progress.arrived(observed_rates(sound)):
            self.judge.hurry()
        reason = self.watch.observe(sound)
        if reason:
            self._roll_back(reason)
        elif self.watch.is_on_canary and not self.watch.trial:
            self._confirm()

    @property
    def is_resting(self) -> bool:
        """Whether training rests now, so that arriving records are not trained on."""
        return self.progress.schedule.resting and not self.bootstrap_records

    @property
    def slowdown(self) -> int:
        """Factor on the usual records and steps of a cycle."""
        return self.progress.schedule.slowdown(self.progress.rule)

    def is_due(self, num_waiting: int, oldest_age_s: float) -> bool:
        least, oldest_s = self._settings.min_records_per_cycle, self._settings.max_record_age_s
        return bool(self.bootstrap_records) or is_due(
            num_waiting, oldest_age_s, self.slowdown, least, oldest_s
        )

    def hold_out(self, records: Sequence[GenerationRecord]) -> list[GenerationRecord]:
        """Keep a share of sound records to judge by; returns the others."""
        return self.judge.split(records)

    def expire(self, now_s: float) -> None:
        """Let go of records that may no longer be held."""
        self.judge.expire(now_s)
        self.bootstrap_records = [each for each in self.bootstrap_records if each.expires_at_s > now_s]

    def forget(self) -> None:
        """Let go of all records."""
        self.judge.forget()
        self.bootstrap_records = []

    def refused_records(self, num_records: int) -> None:
        """Count records that were not fit to train on."""
        self.progress.num_refused_records += num_records

    def skip_training(self, records: Sequence[GenerationRecord], num_waiting: int) -> None:
        """While training rests: hold out a share of the sound records, and count all."""
        self.hold_out(records)
        self.progress.rested(num_waiting)

    def learn(
        self,
        records: Sequence[GenerationRecord],
        num_waiting: int,
        replay: Callable[[int], list[GenerationRecord]],
        *,
        keep_going: Callable[[float], bool],
        sleep: Callable[[float], object],
        is_paused: Callable[[], bool],
    ) -> None:
        """One cycle: distil, evaluate, gate, publish. `records`: the sound ones of `num_waiting`; `replay`
        draws up to so many kept records; `keep_going` gets each step's seconds and says whether to continue;
        `sleep` waits while replicas swap; `is_paused` says, before a candidate is published, whether an
        operator has paused learning meanwhile."""
        self.progress.took(num_waiting)
        fresh = self.hold_out(records) + self.bootstrap_records
        self.bootstrap_records = []
        _, num_replayed = self.trainer.plan(len(fresh), self.slowdown)
        report = self.trainer.train(fresh, replay(num_replayed), keep_going, self.slowdown)
        judgement = self._evaluate(report)
        if judgement.decision.promote and is_paused():
            decision = replace(judgement.decision, promote=False, reason="an operator has paused learning")
            judgement = replace(judgement, decision=decision)
        if judgement.decision.promote:
            self._publish(judgement, sleep)
        else:
            self._refuse(judgement)
        self.progress.cycle_ended(report, judgement, self.trainer.num_steps, self.trainer.busy_s)

    def _evaluate(self, report: TrainingReport) -> Judgement:
        """Judge the candidate against the draft that serves this route now."""
        candidate, serving = self.trainer.candidate, self.serving
        pinned = self._feed.pinned(self.route)
        fault = self.trainer.draft.fault(candidate) or serving.unreadable
        if not fault and pinned is not None:
            fault = f"route {self.route!r} is pinned to version {pinned}"
        if not fault and report.num_skipped == len(report.steps):
            fault = f"none of {len(report.steps)} steps changed the candidate"
        history = self._feed.history(self.route)
        return self.judge.judge(
            candidate,
            serving,
            fault=fault or self.watch.trial,
            operation=operation(self._feed.statuses(), self._settings.nominal_num_draft_tokens),
            seed=(self._settings.seed, self.trainer.num_steps),
            now_s=self._now_s(),
            backoff=rollback_backoff(history),
            new_reference=self.progress.schedule.num_decisions == 0,
        )

    def _publish(self, judgement: Judgement, rest: Callable[[float], object]) -> None:
        """Publish the candidate; `rest` sleeps while replicas swap."""
        parent, state = self.serving, dict(self.trainer.candidate)
        evidence, progress = judgement.decision.evidence, self.progress
        has_others = len(self._feed.statuses()) > 1 and self._settings.live_records_per_cycle > 0
        manifest = self.incumbent.publish(
            state, evidence, progress.num_records_seen, progress.tracker.run_id, on_trial=has_others
        )
        self.judge.promoted((self.route, manifest.draft_version))
        self.watch.begin(manifest, state, parent.state, is_on_canary=has_others)
        rest(self._settings.quiet_after_publish_s)
        progress.serving_changed("promoted", manifest, self.incumbent.weights, judgement.decision.reason)

    def _refuse(self, judgement: Judgement) -> None:
        decision = judgement.decision
        self.incumbent.refuse(decision.reason, decision.evidence)
        self.progress.decided("refused", self.incumbent.last_version + 1, decision.reason)
        broken = bool(self.trainer.draft.fault(self.trainer.candidate))
        if broken or self.progress.num_refusals_in_a_row >= self._settings.refusals_before_reset:
            self.restart()

    def compare(self, existing: Sequence[ExistingDraft]) -> None:
        """Score every draft that exists on this route's held-out records."""
        self.scores_of_drafts = self.judge.compare(existing)

    def restart(self) -> None:
        """Restart the candidate from the draft that serves the route."""
        self.start_from(self.serving)

    def start_from(self, start: ExistingDraft) -> None:
        self.start = start
        self.trainer.reset(start.state)
        self.progress.num_refusals_in_a_row = 0

    def save(self, folder: Path, used_entry_ids: dict[str, list[str]]) -> None:
        state = checkpoint.Checkpoint(
            adapter=self.trainer.trained,
            optimizer=self.trainer.optimizer_state(),
            generator_state=self.trainer.rng.bit_generator.state,
            num_steps=self.trainer.num_steps,
            num_records_seen=self.progress.num_records_seen,
            last_version=self.incumbent.last_version,
            acked_entry_ids=used_entry_ids,
            incumbent_manifest=self.incumbent.manifest,
            incumbent_weights=self.incumbent.weights,
            mlflow_run_id=self.progress.tracker.run_id,
            schedule=asdict(self.progress.schedule),
        )
        checkpoint.write(folder, state)

    def facts(self) -> dict[str, Any]:
        """Plain data for display."""
        return self.progress.facts() | {
            "num_steps": self.trainer.num_steps,
            "learner_s": self.trainer.busy_s,
            "learner_saved_s": self.progress.saved_s(self.trainer.busy_s),
            "num_held_out_records": self.judge.num_records,
            "draft_version": self.incumbent.version,
            "last_version": self.incumbent.last_version,
            "acceptance_by_draft": self.acceptance_by_draft(),
        }

    def acceptance_by_draft(self) -> dict[str, float]:
        """Acceptance of every draft that existed at the last decision, without those that could not be
        scored."""
        acceptances = {
            f"{route}/{version}": score.acceptance
            for (route, version), score in self.scores_of_drafts.items()
        }
        return {name: value for name, value in acceptances.items() if value == value}

    def _watch_what_serves(self) -> None:
        """Watch the serving draft if it is not watched yet: after a restart, or if another process published
        it, or if its trial was left when another was pinned."""
        manifest, state, watch = self.incumbent.manifest, self.incumbent.state, self.watch
        if manifest is None or state is None:
            return
        is_new = manifest.draft_version > watch.last_version
        if not is_new and watch.comparison is not None:
            return
        is_on_canary = self._feed.is_on_trial(self.route)
        if is_new or is_on_canary:
            watch.begin(manifest, state, self._parent(), is_on_canary)

    def _parent(self) -> AdapterState | None:
        """The weights that a rollback would go to."""
        manifest = self.incumbent.manifest
        if manifest and manifest.parent_version == FLOOR_VERSION and self.route != DEFAULT_ROUTE:
            return self._fallback().state
        return self.incumbent.parent()

    def _confirm(self) -> None:
        version = self.incumbent.version
        reason = f"the trial of version {version} on one replica is over: it serves on all"
        self._feed.confirm(self.route, reason)
        self.watch.is_on_canary = False
        self.progress.decided("confirmed", version, reason)

    def _roll_back(self, reason: str) -> None:
        self._feed.rollback(self.route, reason)
        self.follow_feed()

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        """Continue from the checkpoint."""
        if fault := self.trainer.draft.fault(found.adapter):
            logger.warning("checkpoint's adapter does not fit, starting from what serves: %s", fault)
            self.restart()
            return
        self.trainer.restore(found.adapter, found.optimizer, found.generator_state, found.num_steps)
