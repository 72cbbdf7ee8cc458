"""The learner's life, one cycle after another: read `run_cycle` first.

Knows no Ray, no Redis, no MLflow: a store, a feed and a tracker are given. Invariants: serving never
waits for it; nothing is published that the gate did not pass; a record is acknowledged only after the
checkpoint that used it; while the store cannot be reached the learner waits and loses nothing.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from buffer.errors import StoreUnavailableError
from buffer.records import DEFAULT_ROUTE, GenerationRecord
from buffer.store import AdapterFeed, RecordStore
from learner import checkpoint
from learner.caution import caution
from learner.draft import TrainableDraft
from learner.draw import replay_draw
from learner.evaluation import observed_rates
from learner.inbox import Inbox
from learner.incumbent import Incumbent
from learner.judge import Judge, Judgement, operation
from learner.progress import Progress
from learner.replies import ReplicaReplies
from learner.rows import record_fault
from learner.schedule import Pace, is_due
from learner.settings import LearnerSettings
from learner.tracker import NullTracker, Tracker
from learner.trainer import Trainer, TrainingReport
from learner.watch import LiveWatch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

POLL_S = 0.25


class LearnerStopped(Exception):
    """The stop event was set while the learner waited; what was not checkpointed is learnt again."""


class Learner:
    """One draft, learnt from every route of one target, published on `route`.

    The constructor reads the checkpoint folder and touches neither store nor feed. `run` and `run_cycle`
    belong to one thread; `pause`, `resume` and `snapshot` may be called from any.
    """

    def __init__(
        self,
        draft: TrainableDraft,
        store: RecordStore,
        feed: AdapterFeed,
        settings: LearnerSettings,
        *,
        target_revision: str,
        tracker_for: Callable[[str], Tracker] | None = None,
        route: str = DEFAULT_ROUTE,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`tracker_for` builds the tracker from the run id that the checkpoint holds, perhaps empty."""
        self._store, self._feed, self._settings, self._now_s = store, feed, settings, now_s
        self._target_revision, self._route = target_revision, route
        self._stop, self._paused = threading.Event(), threading.Event()
        self._trainer = Trainer(draft, settings)
        self._judge = Judge(settings, self._trainer.score)
        self._watch = LiveWatch(settings, self._trainer.score)
        self._replies = ReplicaReplies(feed, route, told_until_s=now_s())
        self._started = False
        found = checkpoint.read_latest(Path(settings.checkpoint_folder))
        tracker = tracker_for(found.mlflow_run_id if found else "") if tracker_for else NullTracker()
        self._restore(found, tracker)

    def run(self, stop: threading.Event) -> None:
        """Cycles until `stop` is set; then returns within about one step."""
        self._stop = stop
        known = {"target_revision": self._target_revision} | self._trainer.draft.identity
        self._progress.tracker.log_params(self._settings.model_dump() | known)
        try:
            while not stop.is_set():
                if self._paused.is_set() or not self.run_cycle():
                    self._progress.state = "paused" if self._paused.is_set() else "waiting"
                    stop.wait(POLL_S)
        except LearnerStopped:
            pass
        finally:
            self._progress.state = "stopped"
            self._progress.tracker.close()

    def run_cycle(self) -> bool:
        """Wait, draw, distil, evaluate, gate, publish, checkpoint, ack. False: nothing was due."""
        self._insist(self._start)
        self._follow_feed()
        self._heed_replicas()
        arrived = self._insist(lambda: self._inbox.read(self._settings.max_records_per_cycle))
        self._watch_live(arrived)
        if not self._is_due():
            return False
        if self._progress.pace.resting:
            self._rest_on_arrivals()
            return False
        self._progress.state = "learning"
        self._progress.took(self._inbox.num_waiting)
        fresh = self._judge.split(self._sound_records())
        report = self._train(fresh)
        judgement = self._evaluate(report)
        if judgement.decision.promote:
            self._publish(judgement)
        else:
            self._refuse(judgement)
        self._progress.cycle_ended(report, judgement, self._trainer.num_steps, self._trainer.busy_s)
        self._save()
        self._insist(self._inbox.ack)
        return True

    def pause(self) -> None:
        """Ends the current cycle early; `snapshot()["state"]` is `paused` once nothing runs."""
        self._paused.set()

    def resume(self) -> None:
        self._paused.clear()

    def snapshot(self) -> dict[str, Any]:
        """Plain data for people: what the learner does, knows and has decided."""
        return self._progress.facts() | {
            "num_steps": self._trainer.num_steps,
            "learner_s": self._trainer.busy_s,
            "learner_saved_s": self._progress.saved_s(self._trainer.busy_s),
            "num_parameters": self._trainer.draft.num_parameters,
            "num_waiting_records": self._inbox.num_waiting,
            "num_held_out_records": self._judge.num_records,
            "draft_version": self._incumbent.version,
            "last_version": self._incumbent.last_version,
        }

    # what run_cycle is made of, in its order

    def _start(self) -> None:
        """Once: take back what was read but not acknowledged, refill the held-out window."""
        if self._started:
            return
        self._inbox.reclaim()
        wanted = self._settings.held_out_window_records
        for key in self._inbox.streams():
            kept = self._store.draw_replay(key, wanted, self._settings.seed)
            self._judge.split([record for record in kept if not self._fault(record)])
        self._started = True

    def _follow_feed(self) -> None:
        """The feed's word is final: after a rollback from outside, learn on from what serves."""
        if self._insist(self._incumbent.sync):
            self._watch.end()
            self._restart_candidate()
            kind, reason = self._insist(self._incumbent.last_turn)
            self._progress.turned(kind, self._incumbent.manifest, self._incumbent.weights, reason)
        self._watch_what_serves()

    def _watch_what_serves(self) -> None:
        """A learner that was killed takes its watch up again; a draft that others published gets one."""
        manifest, state = self._incumbent.manifest, self._incumbent.state
        if manifest is not None and state is not None and manifest.draft_version > self._watch.last_version:
            self._watch.begin(manifest, state, self._insist(self._incumbent.parent))

    def _heed_replicas(self) -> None:
        """What replicas refuse is told, and taken back if none of them serves it."""
        for event in self._insist(self._replies.new):
            self._progress.decided(event.kind, event.draft_version, event.reason)
        if reason := self._insist(lambda: self._replies.condemned(self._incumbent.version)):
            self._roll_back(reason)

    def _watch_live(self, arrived: list[GenerationRecord]) -> None:
        sound = [record for record in arrived if not self._fault(record)]
        if self._progress.arrived(observed_rates(sound)):
            self._judge.hurry()
        reason = self._watch.observe(sound)
        if reason:
            self._roll_back(reason)

    def _is_due(self) -> bool:
        settings, slowdown = self._settings, self._progress.pace.slowdown(self._progress.rule)
        age_s = self._inbox.oldest_age_s(self._now_s())
        least, oldest_s = settings.min_records_per_cycle, settings.max_record_age_s
        return is_due(self._inbox.num_waiting, age_s, slowdown, least, oldest_s)

    def _rest_on_arrivals(self) -> None:
        """Training brings nothing now: held out as ever, else only counted. No checkpoint used them."""
        num_records = self._inbox.num_waiting
        self._judge.split(self._sound_records())
        self._progress.rested(num_records)
        self._insist(self._inbox.ack)

    def _sound_records(self) -> list[GenerationRecord]:
        records = self._inbox.records()
        sound = [record for record in records if not self._fault(record)]
        self._progress.num_refused_records += len(records) - len(sound)
        return sound

    def _train(self, fresh: list[GenerationRecord]) -> TrainingReport:
        _, num_replayed = self._trainer.plan(len(fresh))
        replayed = self._insist(lambda: self._replay(num_replayed))
        return self._trainer.train(fresh, replayed, self._rest)

    def _evaluate(self, report: TrainingReport) -> Judgement:
        candidate = self._trainer.draft.state()
        pinned = self._insist(lambda: self._feed.pinned(self._route))
        fault = self._trainer.draft.fault(candidate) or self._incumbent.unreadable
        if not fault and pinned is not None:
            fault = f"route {self._route!r} is pinned to version {pinned}"
        if not fault and report.num_skipped == len(report.steps):
            fault = f"none of {len(report.steps)} steps changed the candidate"
        history = self._insist(lambda: self._feed.history(self._route))
        return self._judge.judge(
            candidate,
            self._incumbent.state,
            self._incumbent.version,
            fault=fault or self._watch.trial,
            operation=operation(self._insist(self._feed.statuses), self._settings.nominal_num_draft_tokens),
            seed=(self._settings.seed, self._trainer.num_steps),
            now_s=self._now_s(),
            caution=caution(history),
            new_reference=self._progress.pace.num_decisions == 0,
        )

    def _publish(self, judgement: Judgement) -> None:
        parent_state = self._incumbent.state
        state = self._trainer.draft.state()
        evidence, progress = judgement.decision.evidence, self._progress
        manifest = self._insist(
            lambda: self._incumbent.publish(
                state, evidence, progress.num_records_seen, progress.tracker.run_id
            )
        )
        self._watch.begin(manifest, state, parent_state)
        self._stop.wait(self._settings.quiet_after_publish_s)
        progress.turned("promoted", manifest, self._incumbent.weights, judgement.decision.reason)

    def _refuse(self, judgement: Judgement) -> None:
        decision = judgement.decision
        self._insist(lambda: self._incumbent.refuse(decision.reason, decision.evidence))
        number = self._incumbent.last_version + 1
        self._progress.decided("refused", number, decision.reason)
        broken = bool(self._trainer.draft.fault(self._trainer.draft.state()))
        if broken or self._progress.num_refusals_in_a_row >= self._settings.refusals_before_reset:
            self._restart_candidate()

    def _save(self) -> None:
        state = checkpoint.Checkpoint(
            adapter=self._trainer.draft.state(),
            optimizer=self._trainer.optimizer_state(),
            generator_state=self._trainer.rng.bit_generator.state,
            num_steps=self._trainer.num_steps,
            num_records_seen=self._progress.num_records_seen,
            last_version=self._incumbent.last_version,
            acked_entry_ids=self._inbox.entry_ids(),
            incumbent_manifest=self._incumbent.manifest,
            incumbent_weights=self._incumbent.weights,
            mlflow_run_id=self._progress.tracker.run_id,
            pace=asdict(self._progress.pace),
        )
        checkpoint.write(Path(self._settings.checkpoint_folder), state)

    def _restore(self, found: checkpoint.Checkpoint | None, tracker: Tracker) -> None:
        """Go on where the checkpoint stands; without one, start as the floor."""
        settings = self._settings
        pace = Pace.restored(found.pace if found else {})
        self._progress = Progress(
            settings, tracker, pace, found.num_records_seen if found else 0, self._route
        )
        self._incumbent = Incumbent(
            self._feed,
            self._trainer.draft,
            route=self._route,
            target_revision=self._target_revision,
            now_s=self._now_s,
            manifest=found.incumbent_manifest if found else None,
            weights=found.incumbent_weights if found else b"",
            last_version=found.last_version if found else 0,
        )
        self._inbox = Inbox(
            self._store,
            self._target_revision,
            settings.consumer_name,
            found.acked_entry_ids if found else {},
        )
        if found is None:
            return
        if fault := self._trainer.draft.fault(found.adapter):
            logger.warning("checkpoint's adapter does not fit, starting from what serves: %s", fault)
            self._trainer.reset(self._incumbent.state)
            return
        self._trainer.restore(found.adapter, found.optimizer, found.generator_state, found.num_steps)

    # small things

    def _insist(self, act: Callable[[], Result]) -> Result:
        """Until the store or feed can be reached; raises LearnerStopped if told to stop meanwhile."""
        while True:
            try:
                return act()
            except StoreUnavailableError as error:
                self._progress.state, self._progress.last_error = "store unavailable", str(error)
                logger.info("store cannot be reached, trying again: %s", error)
                if self._stop.wait(self._settings.retry_s):
                    raise LearnerStopped from error

    def _rest(self, step_s: float) -> bool:
        """Sleep so that steps take their share of the time; False: end the cycle's training."""
        share = self._settings.max_busy_share
        return not self._stop.wait(step_s * (1 / share - 1)) and not self._paused.is_set()

    def _replay(self, num_records: int) -> list[GenerationRecord]:
        share = self._settings.held_out_share
        found = replay_draw(self._store, self._inbox.streams(), num_records, share, self._trainer.rng)
        return [record for record in found if not self._fault(record)]

    def _fault(self, record: GenerationRecord) -> str:
        if record.expires_at_s <= self._now_s():
            return "expired"
        return record_fault(record, self._target_revision, self._trainer.draft.vocab_size)

    def _roll_back(self, reason: str) -> None:
        self._insist(lambda: self._feed.rollback(self._route, reason))
        self._follow_feed()

    def _restart_candidate(self) -> None:
        self._trainer.reset(self._incumbent.state)
        self._progress.num_refusals_in_a_row = 0
