"""The drafts of all routes on a replica: opened, staged, swapped and closed for the adapter watcher.

The default route's draft exists from the start. A further route's draft is created when the route first has
an adapter, with its own merged weights, runner, keys and values, and deleted when the route closes. Knows no
feed. Invariant: there are never more than `max_route_drafts` further drafts, each with memory that was
planned, or free when it opened.
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
"""Creates a drafter with the draft's loaded weights; it shares no weights and no cache with others."""


class ServedDrafts:
    """The operations of an adapter watcher on drafts. Used by one thread at a time."""

    def __init__(
        self,
        engine: Engine,
        default: DraftWeights,
        new_draft: NewDraft,
        max_route_drafts: int = 0,
        has_memory: Callable[[], bool] = lambda: True,
    ) -> None:
        """`default`: the weights of the draft that the engine was built with. `has_memory`: whether one more
        draft would fit now."""
        self.max_route_drafts = max_route_drafts
        self._engine, self._new_draft, self._has_memory = engine, new_draft, has_memory
        self._weights = {DEFAULT_ROUTE: default}
        self._failed: set[str] = set()
        """Wanted routes whose draft could not be created; the default route's draft serves them."""

    @property
    def default(self) -> DraftWeights:
        """The default route's weights."""
        return self._weights[DEFAULT_ROUTE]

    @property
    def routes(self) -> list[str]:
        """Routes with a draft of their own, `default` first, then the oldest."""
        return list(self._weights)

    @property
    def versions(self) -> Mapping[str, int]:
        """route -> version that serves now; the engine may have fallen back to the floor by itself."""
        return self._engine.draft_versions

    def follow(self, wanted: Iterable[str]) -> None:
        """Close the drafts of all other routes, and open drafts for these, in their order, while there is
        room. A new draft serves its floor until weights are swapped in."""
        wanted = list(wanted)
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
        """Validate a version and merge it into separate tensors; None: the floor. Live weights do not change.
        Raises AdapterRejectedError."""
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
        """Make staged weights live between two rounds, and wait for that. Raises BrokenDraftError,
        EngineClosedError."""
        return self._engine.swap(staged, route).result(_TIMEOUT_S)

    def _open(self, route: str) -> None:
        if not self._has_memory():
            _log.warning("route %s gets no draft of its own: too little memory is free", route)
            self._failed.add(route)
            return
        try:
            drafter, weights = self._new_draft()
        except Exception:
            _log.exception("route %s gets no draft of its own", route)
            self._failed.add(route)
            return
        self._engine.open_draft(route, drafter, weights.stage_floor).result(_TIMEOUT_S)
        self._weights[route] = weights
