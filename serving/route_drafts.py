"""Drafts for routes beyond `default`: made when a route first has an adapter, given up when it closes.

Each has merged weights, a runner and keys and values of its own, on the caller's thread until it serves.
Invariant: never more than `max_drafts` of them, which is what memory was planned for.
"""

import logging
from collections.abc import Callable, Iterable

from serving.engine.engine import Engine
from serving.engine.proposal import Drafter
from serving.models.draft_weights import DraftWeights

_log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0

NewDraft = Callable[[], tuple[Drafter, DraftWeights]]
"""The draft as loaded, with weights and caches that nobody shares."""


class RouteDrafts:
    """Who makes them, how many at most, and which are open. One thread at a time."""

    def __init__(self, engine: Engine, new_draft: NewDraft, max_drafts: int) -> None:
        self._engine, self._new_draft = engine, new_draft
        self._max_drafts = max_drafts
        self._weights: dict[str, DraftWeights] = {}
        self._failed: set[str] = set()
        """Wanted routes whose draft could not be made; the default route's serves them."""

    def __getitem__(self, route: str) -> DraftWeights:
        """Of an open route."""
        return self._weights[route]

    @property
    def routes(self) -> list[str]:
        """Those that are open, the oldest first."""
        return list(self._weights)

    def follow(self, wanted: Iterable[str]) -> None:
        """Close what is not among these routes, and open what is, in their order, while there is room. A new
        draft serves its floor until weights are swapped in."""
        wanted = list(wanted)
        self._failed.intersection_update(wanted)
        for route in self.routes:
            if route not in wanted:
                self._engine.close_draft(route).result(_TIMEOUT_S)
                del self._weights[route]
        for route in wanted:
            has_room = len(self._weights) < self._max_drafts
            if has_room and route not in self._weights and route not in self._failed:
                self._open(route)

    def _open(self, route: str) -> None:
        try:
            drafter, weights = self._new_draft()
        except Exception:
            _log.exception("route %s gets no draft of its own", route)
            self._failed.add(route)
            return
        self._engine.open_draft(route, drafter, weights.stage_floor).result(_TIMEOUT_S)
        self._weights[route] = weights
