"""Follows the adapter feed: fetch, validate, stage aside, swap between two rounds; and reports the replica.

One thread that never touches a request. Invariant: what serves changes only to an adapter that was validated
whole, or to the floor; a feed that is away, or has forgotten what it published, changes nothing.
"""

import logging
import threading
import time
from collections.abc import Callable

from buffer.errors import SeamError, StoreUnavailableError, UnknownVersionError
from buffer.records import DEFAULT_ROUTE, FLOOR_VERSION, AdapterEvent, AdapterManifest, ServingStatus
from buffer.store import AdapterFeed
from serving.engine.engine import Engine
from serving.engine.live_draft import BrokenDraftError
from serving.models.adapter import AdapterRejectedError, check_config
from serving.models.draft_weights import DraftWeights

_log = logging.getLogger(__name__)

_MAX_BACKOFF_S = 5.0
_SWAP_TIMEOUT_S = 60.0

Served = tuple[int, str]
"""(draft_version, sha256 of the adapter): a number alone could be reused by a feed that lost its memory."""

FLOOR: Served = (FLOOR_VERSION, "")


class AdapterWatcher:
    """`draft_weights` None: nothing to swap, only reports. `status` makes the report."""

    def __init__(
        self,
        engine: Engine,
        draft_weights: DraftWeights | None,
        feed: AdapterFeed,
        *,
        replica_id: str,
        status: Callable[[], ServingStatus],
        watch_interval_s: float,
        status_interval_s: float,
        route: str = DEFAULT_ROUTE,
    ) -> None:
        self._engine, self._draft_weights, self._feed = engine, draft_weights, feed
        self._replica_id, self._route, self._status = replica_id, route, status
        self._watch_interval_s, self._status_interval_s = watch_interval_s, status_interval_s
        self._served: Served = FLOOR
        self._rejected: set[Served] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="everdraft-watcher", daemon=True)
        self.last_error = ""
        """Why the replica does not serve what the feed points to; empty when it does."""

    @property
    def served_version(self) -> int:
        return self._served[0]

    def serve_latest_before_ready(self, timeout_s: float) -> int:
        """Swap in what the feed points to, trying for `timeout_s`; the floor if that fails. Returns the
        version that serves. Call before `start`."""
        give_up_s = time.monotonic() + timeout_s
        while not self._try(self.follow) and time.monotonic() < give_up_s:
            self._closed.wait(min(self._watch_interval_s, timeout_s))
        self._try(self.report)
        return self.served_version

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread; what serves stays."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def follow(self) -> None:
        """One look at the feed, and a swap if it points elsewhere. Raises SeamError."""
        if self._draft_weights is None:
            return
        self._notice_broken_draft()
        manifest = self._feed.latest(self._route)
        wanted = FLOOR if manifest is None else (manifest.draft_version, manifest.sha256)
        if wanted in self._rejected:
            return
        if wanted != self._served and not self._is_forgotten(manifest):
            try:
                self._serve(self._draft_weights, manifest)
            except (AdapterRejectedError, BrokenDraftError) as error:
                self._reject(wanted, str(error))
                return
            self._served = wanted
        self.last_error = ""

    def report(self) -> None:
        """Publish the replica's status. Raises SeamError."""
        self._feed.report(self._status())

    def _is_forgotten(self, manifest: AdapterManifest | None) -> bool:
        """Nothing was ever published there: the feed is new, or it lost its memory and means no floor."""
        return manifest is None and self._feed.last_version(self._route) == FLOOR_VERSION

    def _notice_broken_draft(self) -> None:
        """The engine leaves a draft whose logits are not finite by itself; that draft is rejected."""
        if self._engine.draft_version != self.served_version:
            broken, self._served = self._served, FLOOR
            self._reject(broken, "its logits were not finite; the engine went back to the floor")

    def _serve(self, draft_weights: DraftWeights, manifest: AdapterManifest | None) -> None:
        if manifest is None:
            staged = draft_weights.stage_floor()
        else:
            check_config(manifest.adapter_config_json, manifest.rank, manifest.alpha)
            staged = draft_weights.stage(
                self._feed.weights(self._route, manifest.draft_version),
                draft_version=manifest.draft_version,
                adapter_config_json=manifest.adapter_config_json,
                sha256=manifest.sha256,
                draft_revision=manifest.draft_revision,
                target_revision=manifest.target_revision,
            )
        self._engine.swap(staged).result(timeout=_SWAP_TIMEOUT_S)

    def _reject(self, wanted: Served, reason: str) -> None:
        """Tell the history, and remember, so that it is not fetched again; the incumbent stays."""
        self.last_error = f"draft_version={wanted[0]} rejected: {reason}"
        _log.warning("%s; draft_version=%d serves on", self.last_error, self.served_version)
        event = AdapterEvent(
            kind="rejected_by_replica",
            route=self._route,
            draft_version=wanted[0],
            reason=f"{self._replica_id}: {reason}",
            at_s=time.time(),
        )
        self._feed.add_event(event)
        self._rejected.add(wanted)

    def _watch(self) -> None:
        wait_s, next_report_s = self._watch_interval_s, 0.0
        while not self._closed.wait(wait_s):
            reached = self._try(self.follow)
            if reached and time.monotonic() >= next_report_s:
                next_report_s = time.monotonic() + self._status_interval_s
                reached = self._try(self.report)
            wait_s = self._watch_interval_s if reached else min(2 * wait_s, _MAX_BACKOFF_S)

    def _try(self, act: Callable[[], None]) -> bool:
        """Whether it was done; whatever the feed or a swap raises is kept as `last_error`."""
        try:
            act()
        except (StoreUnavailableError, UnknownVersionError) as error:
            self.last_error = str(error)
        except SeamError as error:
            self.last_error = str(error)
            _log.warning("adapter feed: %s; draft_version=%d serves on", error, self.served_version)
        except Exception as error:
            self.last_error = f"{type(error).__name__}: {error}"
            _log.exception("watching adapters failed; draft_version=%d serves on", self.served_version)
        else:
            return True
        return False
