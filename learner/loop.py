"""The learner's main loop, one cycle after another: read `run_cycle` first.

Knows no Ray, no Redis, no MLflow: store, feed and tracker are passed in. Invariants: serving never waits for
the learner; nothing is published that did not pass the gate, or while an operator has paused learning; a
record is acknowledged only after the checkpoint that used it was written, or untrained; while the store
cannot be reached the learner waits and loses nothing; no record is held past its expiry, or after a purge.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from buffer.controls import Controls
from buffer.names import DEFAULT_ROUTE
from buffer.records import GenerationRecord
from buffer.retrying import RetryingFeed, RetryingStore
from buffer.store import AdapterFeed, RecordStore, StreamKey
from learner import checkpoint
from learner.draft import TrainableDraft
from learner.draw import replay_draw
from learner.judging.draft_selection import ExistingDraft
from learner.record_inbox import CLAIM_IDLE_S, RecordInbox
from learner.route_learner import RouteLearner
from learner.routes import Routes
from learner.rows import record_fault
from learner.settings import LearnerSettings
from learner.tracking.tracker import NullTracker, Tracker
from learner.trainable import state_bytes

logger = logging.getLogger(__name__)

POLL_S = 0.25
ORDERS_S = 1.0
"""How often orders are read while training."""
SUMMED = (
    "num_steps",
    "learner_s",
    "learner_saved_s",
    "num_records_seen",
    "num_rested_records",
    "num_refused_records",
    "num_waiting_records",
)
"""Figures of `snapshot` that are summed over all routes; the others are those of `default`."""


class LearnerStopped(Exception):
    """The stop event was set while the learner waited; work since the last checkpoint is repeated after a
    restart."""


class Learner:
    """Trains one draft for each open route of a target; the draft of `default` serves all other routes.

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
        now_s: Callable[[], float] = time.time,
        free_bytes: Callable[[], float] = lambda: math.inf,
        isolated_routes: Collection[str] = (),
    ) -> None:
        """`tracker_for` builds the tracker from the run id in the checkpoint, which may be empty.
        `free_bytes`: of the memory that training state lies in. `isolated_routes`: their records train no
        other draft, and their drafts start no other; a record that says so of itself is kept apart in any
        case."""
        self._draft, self._settings = draft, settings
        wait_for_store = partial(self._wait_to_try_again, "store unavailable")
        self._store, self._feed = RetryingStore(store, wait_for_store), RetryingFeed(feed, wait_for_store)
        self._target_revision, self._now_s, self._free_bytes = target_revision, now_s, free_bytes
        self._stop, self._paused = threading.Event(), threading.Event()
        self._state, self._last_error, self._started = "waiting", "", False
        self._streams: list[StreamKey] = []
        self._controls, self._orders_read_s, self._last_purge = Controls(), 0.0, ""
        self._reclaim_at_s = 0.0
        folder = checkpoint.folder_of_target(Path(settings.checkpoint_folder), target_revision)
        latest = checkpoint.read_latest(folder)
        self._tracker = tracker_for(latest.mlflow_run_id if latest else "") if tracker_for else NullTracker()
        self._routes = Routes(
            self._build,
            self._store,
            self._feed,
            settings,
            folder=folder,
            target_revision=target_revision,
            is_sound=lambda record, route: not self._fault(record, route),
            now_s=now_s,
            wait_for_disk=partial(self._wait_to_try_again, "checkpoint cannot be written"),
            has_memory=self._has_memory,
            isolated=isolated_routes,
        )
        self._inbox = RecordInbox(
            self._store, target_revision, settings.consumer_name, self._routes.used_entry_ids()
        )

    def run(self, stop: threading.Event) -> None:
        """Runs cycles until `stop` is set; then returns within about one step."""
        self._stop = stop
        identity = {"target_revision": self._target_revision} | self._draft.identity
        self._tracker.log_params(self._settings.model_dump() | identity)
        try:
            while not stop.is_set():
                if not (self._idle() if self._paused.is_set() else self.run_cycle()):
                    is_paused = self._paused.is_set() or self._controls.is_learning_paused
                    self._state = "paused" if is_paused else "waiting"
                    stop.wait(POLL_S)
        except LearnerStopped:
            pass
        finally:
            self._state = "stopped"
            self._tracker.close()

    def run_cycle(self) -> bool:
        """One cycle: read, draw, distil, evaluate, gate, publish, checkpoint, acknowledge. False: no route
        was due."""
        self._follow_orders()
        self._let_go()
        self._start()
        self._read()
        if not self._controls.is_learning_paused:
            self._routes.review(self._streams)
        self._ack_untrained()
        draft = self._due()
        if draft is None:
            return False
        self._state = "learning"
        streams = self._routes.streams_of(draft, self._streams)
        draft.learn(
            self._sound_records(draft, streams),
            self._inbox.num_waiting(streams),
            partial(self._replay, draft),
            keep_going=partial(self._rest, draft.route),
            sleep=self._stop.wait,
            is_paused=lambda: self._follow_orders().pauses(draft.route),
        )
        self._routes.save(draft, self._inbox.entry_ids(streams))
        self._inbox.ack(streams)
        self._routes.decided(draft)
        return True

    def pause(self) -> None:
        """For this process: no cycle begins, and the current one ends early; `snapshot()["state"]` is
        `paused` once nothing runs. An operator's pause is another thing: it comes through the feed, and what
        serves is watched meanwhile."""
        self._paused.set()

    def resume(self) -> None:
        self._paused.clear()

    def snapshot(self) -> dict[str, Any]:
        """State of the learner as plain data for display, also by route."""
        routes = {draft.route: self._facts(draft) for draft in self._routes}
        return (
            routes[DEFAULT_ROUTE]
            | {name: sum(facts[name] for facts in routes.values()) for name in SUMMED}
            | {
                "state": self._state,
                "last_error": self._last_error,
                "num_parameters": self._draft.num_parameters,
                "num_dropped_metrics": self._tracker.num_dropped,
                "mlflow_run_id": self._tracker.run_id,
                "routes": routes,
            }
        )

    # the steps of run_cycle, in order

    def _follow_orders(self) -> Controls:
        self._controls = self._feed.controls() or self._controls
        self._orders_read_s = time.monotonic()
        return self._controls

    def _let_go(self) -> None:
        """Of what has expired, here and in the store that persists nothing; of everything after a purge,
        when what is left is read again."""
        if self._is_purged:
            self._last_purge = self._controls.last_purge
            self._inbox.forget()
            self._routes.forget()
            if self._started:
                self._read_again()
        self._expire()
        for key in self._streams:
            if key.in_memory:
                self._store.drop_expired(key)

    def _start(self) -> None:
        if not self._started:
            self._routes.start()
            self._read_again()
            self._started = True

    def _read_again(self) -> None:
        """Reclaim what was read but not acknowledged, refill the held-out windows."""
        self._reclaim()
        self._streams = self._inbox.streams()
        wanted = self._settings.held_out_window_records
        for draft in self._routes:
            for key in self._routes.streams_of(draft, self._streams):
                kept = self._store.draw_replay(key, wanted, self._settings.seed)
                sound = [record for record in kept if not self._fault(record, draft.route)]
                self._routes.remember(sound)
                draft.hold_out(sound)

    def _reclaim(self) -> None:
        """Reclaim unacknowledged records: this consumer's own, and those of a consumer that is gone."""
        self._inbox.reclaim()
        self._reclaim_at_s = self._now_s() + CLAIM_IDLE_S

    def _read(self) -> None:
        """For each route: follow the feed, handle replica rejections, read new records, watch the last
        swap."""
        if self._now_s() >= self._reclaim_at_s:
            self._reclaim()
        self._streams = self._inbox.streams()
        for draft in self._routes:
            draft.follow_feed()
            draft.handle_replica_rejections()
        for draft in self._routes:
            streams = self._routes.streams_of(draft, self._streams)
            arrived = self._inbox.read(streams, self._settings.max_records_per_cycle)
            sound = [record for record in arrived if not self._fault(record, draft.route)]
            self._routes.arrived(sound)
            draft.watch_live(sound)
        for key in self._routes.untrained_streams(self._streams):
            arrived = self._inbox.read([key], self._settings.max_records_per_cycle)
            self._routes.arrived([record for record in arrived if not self._fault(record, key.route)])
            self._inbox.ack([key])  # they stay in the store, and train the route's draft once it has one

    def _ack_untrained(self) -> None:
        """Acknowledge records of routes whose training rests or is paused: some are held out, the others only
        counted. No checkpoint used them; they stay in the store for replay."""
        for draft in self._routes:
            if not ((draft.is_resting or self._controls.pauses(draft.route)) and self._is_due(draft)):
                continue
            streams = self._routes.streams_of(draft, self._streams)
            draft.skip_training(self._sound_records(draft, streams), self._inbox.num_waiting(streams))
            self._inbox.ack(streams)

    def _due(self) -> RouteLearner | None:
        """Of the routes that are due and not paused, the one whose records have waited longest."""
        due = (draft for draft in self._routes if not self._controls.pauses(draft.route))
        return max(filter(self._is_due, due), key=self._oldest_age_s, default=None)

    def _is_due(self, draft: RouteLearner) -> bool:
        num_waiting = self._inbox.num_waiting(self._routes.streams_of(draft, self._streams))
        return draft.is_due(num_waiting, self._oldest_age_s(draft))

    def _sound_records(self, draft: RouteLearner, streams: Sequence[StreamKey]) -> list[GenerationRecord]:
        records = self._inbox.records(streams)
        sound = [record for record in records if not self._fault(record, draft.route)]
        draft.refused_records(len(records) - len(sound))
        return sound

    def _replay(self, draft: RouteLearner, num_records: int) -> list[GenerationRecord]:
        """Kept records for replay: a route's own; for `default`, whose draft may have to serve them again,
        those of all routes that are not isolated."""
        own = self._routes.streams_of(draft, self._streams)
        streams = self._routes.shared_streams(self._streams) if draft.route == DEFAULT_ROUTE else own
        share = self._settings.held_out_share
        drawn = replay_draw(self._store, streams, num_records, share, draft.trainer.rng)
        return [record for record in drawn if not self._fault(record, draft.route)]

    # helpers

    def _idle(self) -> bool:
        """What goes on while this process is paused: nothing is held longer than it may be."""
        self._follow_orders()
        self._let_go()
        return False

    @property
    def _is_purged(self) -> bool:
        """Whether an operator deleted records since this learner let go of them last."""
        return self._controls.last_purge != self._last_purge

    def _expire(self) -> None:
        for holder in (self._inbox, self._routes):
            holder.expire(self._now_s())

    def _build(
        self, route: str, found: checkpoint.Checkpoint | None, fallback: Callable[[], ExistingDraft]
    ) -> RouteLearner:
        return RouteLearner(
            route,
            self._draft,
            self._feed,
            self._settings,
            target_revision=self._target_revision,
            tracker=self._tracker,
            now_s=self._now_s,
            fallback=fallback,
            found=found,
        )

    def _has_memory(self) -> bool:
        """Whether one more route's training state fits now."""
        needed = state_bytes(self._draft.num_parameters, self._draft.export_dtype.itemsize)
        return needed < self._free_bytes()

    def _wait_to_try_again(self, state: str, error: Exception) -> None:
        """No record is acknowledged meanwhile, so none is lost if this process ends. Raises LearnerStopped if
        stopped."""
        if self._state != state:
            logger.warning("%s, trying again: %s", state, error)
        self._state, self._last_error = state, str(error)
        self._expire()
        if self._stop.wait(self._settings.retry_s):
            raise LearnerStopped from error

    def _rest(self, route: str, step_s: float) -> bool:
        """Sleep so that steps take their share of the time; False: end the cycle's training."""
        share = self._settings.max_busy_share
        if self._stop.wait(step_s * (1 / share - 1)) or self._paused.is_set():
            return False
        if time.monotonic() - self._orders_read_s >= ORDERS_S:
            self._follow_orders()
        return not (self._controls.pauses(route) or self._is_purged)

    def _fault(self, record: GenerationRecord, route: str) -> str:
        """Why the record may not train the draft of this route; empty: it may."""
        if record.expires_at_s <= self._now_s():
            return "expired"
        if record.isolated and record.route != route:
            return "isolated"
        return record_fault(record, self._target_revision, self._draft.vocab_size)

    def _oldest_age_s(self, draft: RouteLearner) -> float:
        return self._inbox.oldest_age_s(self._routes.streams_of(draft, self._streams), self._now_s())

    def _facts(self, draft: RouteLearner) -> dict[str, Any]:
        streams = self._routes.streams_of(draft, self._streams)
        return draft.facts() | {
            "num_waiting_records": self._inbox.num_waiting(streams),
            "is_paused": self._controls.pauses(draft.route),
        }
