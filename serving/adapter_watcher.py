"""Follows the adapter feed: swaps drafts, route by route, and reads what operators ordered.

For each route: fetch, validate, stage aside, swap between two rounds; opens and closes the drafts of routes;
reports the replica. One thread that never touches a request. Invariant: the draft that serves a route changes
only to an adapter that was validated whole, or to the floor; a feed that cannot be reached, or has lost its
data, changes nothing.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from buffer.controls import Controls
from buffer.errors import SeamError, StoreUnavailableError, UnknownVersionError
from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.records import AdapterEvent, AdapterManifest, ServingStatus
from buffer.store import AdapterFeed
from serving.engine.draft_pool import BrokenDraftError
from serving.models.adapter import AdapterRejectedError
from serving.router import PromptRouter
from serving.serving_engine import DraftPort

_log = logging.getLogger(__name__)

_MAX_BACKOFF_S = 5.0

Served = tuple[int, str]
"""(draft_version, sha256 of the adapter): a feed that lost its data could use a number again."""

FLOOR: Served = (FLOOR_VERSION, "")


@dataclass
class _Followed:
    """One route: the version that serves here, rejected versions, and why it does not serve what the feed
    points to."""

    served: Served = FLOOR
    rejected: set[Served] = field(default_factory=set)
    complaint: str = ""


class AdapterWatcher:
    """`drafts` None: it only reports. `router` None: prompts are not routed. `status` makes the report."""

    def __init__(
        self,
        drafts: DraftPort[Any] | None,
        feed: AdapterFeed,
        *,
        replica_id: str,
        status: Callable[[], ServingStatus],
        watch_interval_s: float,
        status_interval_s: float,
        router: PromptRouter | None = None,
    ) -> None:
        self._drafts, self._feed, self._router = drafts, feed, router
        self._replica_id, self._status = replica_id, status
        self._watch_interval_s, self._status_interval_s = watch_interval_s, status_interval_s
        self._followed = {} if drafts is None else {DEFAULT_ROUTE: _Followed()}
        self.controls = Controls()
        """What operators ordered, as it was read last."""
        self._feed_error = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="everdraft-watcher", daemon=True)

    @property
    def last_error(self) -> str:
        """Why the replica does not serve what the feed points to; empty when it does."""
        complaints = (followed.complaint for followed in list(self._followed.values()))
        return self._feed_error or "; ".join(complaint for complaint in complaints if complaint)

    @property
    def served_version(self) -> int:
        """The default route's version."""
        default = self._followed.get(DEFAULT_ROUTE)
        return FLOOR_VERSION if default is None else default.served[0]

    def serve_latest_before_ready(self, timeout_s: float) -> int:
        """Swap in what the feed points to, trying for `timeout_s`; the floor if that fails. Returns the
        default route's version. Call before `start`."""
        give_up_s = time.monotonic() + timeout_s
        while not self._try(self.follow_all) and time.monotonic() < give_up_s:
            self._closed.wait(min(self._watch_interval_s, timeout_s))
        self._try(self.report)
        return self.served_version

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread; the drafts that serve stay."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def follow_all(self) -> None:
        """Follow the routes, and the version that the feed points each to. Raises SeamError."""
        self.follow_routes()
        self.follow()

    def follow_routes(self) -> None:
        """Open a draft for each route that the feed serves by an adapter, and close all others. Raises
        SeamError."""
        if self._router is not None:
            self._router.use(self._feed.route_table())
        if self._drafts is None or not self._drafts.max_route_drafts:
            return
        routes = {*self._feed.routes(), *self._followed} - {DEFAULT_ROUTE}
        by_age = sorted(routes, key=lambda route: (route not in self._followed, route))  # open routes first
        self._drafts.follow([route for route in by_age if self._has_draft(route)])
        opened = self._drafts.routes
        self._followed = {route: self._followed.get(route, _Followed()) for route in opened}

    def follow(self) -> None:
        """Read the feed: the orders, and for each open route whether it points to another version, which is
        swapped in. Raises SeamError."""
        self.controls = self._feed.controls() or self.controls
        for route, followed in self._followed.items():
            self._follow(route, followed)

    def report(self) -> None:
        """Publish the replica's status. Raises SeamError."""
        self._feed.report(self._status())

    def _has_draft(self, route: str) -> bool:
        """Whether the route should have a draft: the feed serves it by an adapter. A route that was rolled
        back to the floor is closed, and the default route's draft serves it; a feed that lost its data closes
        nothing."""
        manifest = self._feed.latest(route, self._replica_id)
        return manifest is not None or (route in self._followed and self._is_forgotten(route, manifest))

    def _follow(self, route: str, followed: _Followed) -> None:
        self._notice_broken_draft(route, followed)
        manifest = self._feed.latest(route, self._replica_id)
        wanted = FLOOR if manifest is None else (manifest.draft_version, manifest.sha256)
        if wanted in followed.rejected:
            return
        if wanted != followed.served and not self._is_forgotten(route, manifest):
            try:
                self._serve(route, manifest)
            except (AdapterRejectedError, BrokenDraftError) as error:
                self._reject(route, wanted, str(error))
                return
            followed.served = wanted
        followed.complaint = ""

    def _is_forgotten(self, route: str, manifest: AdapterManifest | None) -> bool:
        """Whether nothing was ever published on the route: the feed is new or lost its data, and does not
        mean the floor."""
        return manifest is None and self._feed.last_version(route) == FLOOR_VERSION

    def _notice_broken_draft(self, route: str, followed: _Followed) -> None:
        """Reject a version that the engine gave up by itself because its logits were not finite."""
        assert self._drafts is not None
        if self._drafts.versions.get(route, FLOOR_VERSION) != followed.served[0]:
            broken, followed.served = followed.served, FLOOR
            self._reject(route, broken, "its logits were not finite; the engine went back to the floor")

    def _serve(self, route: str, manifest: AdapterManifest | None) -> None:
        assert self._drafts is not None
        weights = b"" if manifest is None else self._feed.weights(route, manifest.draft_version)
        self._drafts.swap(route, self._drafts.stage(route, manifest, weights))

    def _reject(self, route: str, wanted: Served, reason: str) -> None:
        """Add a rejection to the history, and remember it, so that the version is not fetched again; the
        incumbent stays."""
        followed = self._followed[route]
        followed.complaint = f"draft_version={wanted[0]} rejected: {reason}"
        if route != DEFAULT_ROUTE:
            followed.complaint = f"route {route}: {followed.complaint}"
        _log.warning("%s; draft_version=%d continues to serve", followed.complaint, followed.served[0])
        event = AdapterEvent(
            kind="rejected_by_replica",
            route=route,
            draft_version=wanted[0],
            reason=f"{self._replica_id}: {reason}",
            at_s=time.time(),
        )
        self._feed.add_event(event)
        followed.rejected.add(wanted)

    def _watch(self) -> None:
        wait_s, next_report_s = self._watch_interval_s, 0.0
        while not self._closed.wait(wait_s):
            is_due = time.monotonic() >= next_report_s
            reached = self._try(self.follow_all if is_due else self.follow)
            if reached and is_due:
                next_report_s = time.monotonic() + self._status_interval_s
                reached = self._try(self.report)
            wait_s = self._watch_interval_s if reached else min(2 * wait_s, _MAX_BACKOFF_S)

    def _try(self, act: Callable[[], None]) -> bool:
        """Returns whether `act` succeeded; an exception of the feed or a swap is kept for `last_error`."""
        try:
            act()
        except (StoreUnavailableError, UnknownVersionError) as error:
            self._feed_error = str(error)
        except SeamError as error:
            self._feed_error = str(error)
            _log.warning("adapter feed: %s; draft_version=%d continues to serve", error, self.served_version)
        except Exception as error:
            self._feed_error = f"{type(error).__name__}: {error}"
            _log.exception(
                "watching adapters failed; draft_version=%d continues to serve", self.served_version
            )
        else:
            self._feed_error = ""
            return True
        return False
