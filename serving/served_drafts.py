"""The drafts that serve, one a route: opened, staged, swapped and closed for whoever follows the feed.

The default route's draft is there from the start. A further route's is made when the route first has an
adapter, with merged weights, a runner and keys and values of its own, and given up when it closes. Knows no
feed. Invariant: never more than `max_route_drafts` further drafts, which is what memory was planned for.
"""

import logging
from collections.abc import Callable, Iterable, Mapping

from buffer.names import DEFAULT_ROUTE
from buffer.records import AdapterManifest
from serving.engine.engine import Engine
from serving.engine.proposal import Drafter
from serving.engine.stats import SwapReport
from serving.models.adapter import check_config
from serving.models.draft_weights import DraftWeights, StagedWeights

_log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0

NewDraft = Callable[[], tuple[Drafter, DraftWeights]]
"""The draft as loaded, with weights and caches that nobody shares."""


class ServedDrafts:
    """What an adapter watcher does to drafts. One thread at a time."""

    def __init__(
        self, engine: Engine, default: DraftWeights, new_draft: NewDraft, max_route_drafts: int = 0
    ) -> None:
        """`default`: weights of the draft that the engine was built with."""
        self.max_route_drafts = max_route_drafts
        self._engine, self._new_draft = engine, new_draft
        self._weights = {DEFAULT_ROUTE: default}
        self._failed: set[str] = set()
        """Wanted routes whose draft could not be made; the default route's serves them."""

    @property
    def default(self) -> DraftWeights:
        """Of the default route."""
        return self._weights[DEFAULT_ROUTE]

    @property
    def routes(self) -> list[str]:
        """Those with a draft of their own, `default` first, then the oldest."""
        return list(self._weights)

    @property
    def versions(self) -> Mapping[str, int]:
        """route -> version that serves now; the engine may have gone to the floor by itself."""
        return self._engine.draft_versions

    def follow(self, wanted: Iterable[str]) -> None:
        """Close what is not among these routes, and open what is, in their order, while there is room. A new
        draft serves its floor until weights are swapped in."""
        wanted = [route for route in wanted if route != DEFAULT_ROUTE]
        self._failed.intersection_update(wanted)
        for route in self.routes:
            if route not in (DEFAULT_ROUTE, *wanted):
                self._engine.close_draft(route).result(_TIMEOUT_S)
                del self._weights[route]
        for route in wanted:
            has_room = len(self._weights) <= self.max_route_drafts
            if has_room and route not in self._weights and route not in self._failed:
                self._open(route)

    def stage(self, route: str, manifest: AdapterManifest | None, weights: bytes = b"") -> StagedWeights:
        """Validate a version and merge it aside; None: the floor. Nothing live is touched. Raises
        AdapterRejectedError."""
        if manifest is None:
            return self._weights[route].stage_floor()
        check_config(manifest.adapter_config_json, manifest.rank, manifest.alpha)
        return self._weights[route].stage(
            weights,
            draft_version=manifest.draft_version,
            adapter_config_json=manifest.adapter_config_json,
            sha256=manifest.sha256,
            draft_revision=manifest.draft_revision,
            target_revision=manifest.target_revision,
        )

    def swap(self, route: str, staged: StagedWeights) -> SwapReport:
        """Make it live between two rounds, and wait for it. Raises BrokenDraftError, EngineClosedError."""
        return self._engine.swap(staged, route).result(_TIMEOUT_S)

    def serve_floor(self, route: str = DEFAULT_ROUTE) -> None:
        """The draft as loaded."""
        self.swap(route, self.stage(route, None))

    def _open(self, route: str) -> None:
        try:
            drafter, weights = self._new_draft()
        except Exception:
            _log.exception("route %s gets no draft of its own", route)
            self._failed.add(route)
            return
        self._engine.open_draft(route, drafter, weights.stage_floor).result(_TIMEOUT_S)
        self._weights[route] = weights
