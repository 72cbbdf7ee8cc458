"""What may be kept of a request for learning: nothing, for a while in memory, or on disk. Pure.

Knows no HTTP and no store. Invariant: whoever has a say can only make it stricter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

CaptureMode = Literal["off", "memory", "replay"]
"""`off`: no record; `memory`: one that reaches no disk and lives for `memory_ttl_s`; `replay`: one in Redis,
for `record_ttl_s`. The strictest first."""
_STRICTEST_FIRST: tuple[CaptureMode, ...] = get_args(CaptureMode)


@dataclass(frozen=True)
class CapturePolicy:
    """The service's own modes."""

    service: CaptureMode = "replay"
    by_route: Mapping[str, CaptureMode] = field(default_factory=dict)

    def mode(
        self, *, store: bool | None = None, route: str | None = None, tenant: CaptureMode | None = None
    ) -> CaptureMode:
        """`off` where the request says `store: false`; else the strictest of what service, route and tenant
        say. A route that is not known yet (None) and a tenant without a mode say nothing."""
        if store is False:
            return "off"
        said = (self.service, None if route is None else self.by_route.get(route), tenant)
        return min((mode for mode in said if mode is not None), key=_STRICTEST_FIRST.index)
