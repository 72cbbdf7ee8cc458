"""Decides when a route gets a draft of its own and when it loses it. Pure: state in, decision out.

Knows no drafts, no store and no clock. Invariant: never more than `max_routes` are open; a route that was
closed opens again only after twice as many new records as the last time, so that routes do not open and close
repeatedly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Standing:
    """State of a route other than `default`; plain data, so that it can be stored."""

    is_open: bool = False
    num_records: int = 0
    """Records kept when it was first seen, and all that came since; counted from 0 after each closing."""
    last_record_s: float = 0.0
    num_losses: int = 0
    """Decisions in a row in which its own draft was not the best one for it."""
    num_closings: int = 0

    def after_records(self, num_records: int, now_s: float) -> "Standing":
        return replace(self, num_records=self.num_records + num_records, last_record_s=now_s)

    def after_decision(self, own_is_best: bool) -> "Standing":
        return replace(self, num_losses=0 if own_is_best else self.num_losses + 1)

    def opened(self, now_s: float) -> "Standing":
        return replace(self, is_open=True, last_record_s=now_s, num_losses=0)

    def closed(self) -> "Standing":
        return replace(self, is_open=False, num_records=0, num_losses=0, num_closings=self.num_closings + 1)


@dataclass(frozen=True)
class RoutePolicy:
    """See LearnerSettings."""

    max_routes: int
    min_records: int
    idle_s: float
    losses_before_close: int


def routes_to_open(standings: Mapping[str, Standing], policy: RoutePolicy) -> list[str]:
    """Routes with enough records, those with most first, as far as there is room."""
    room = policy.max_routes - sum(standing.is_open for standing in standings.values())
    ready = [
        route
        for route, standing in standings.items()
        if not standing.is_open and standing.num_records >= policy.min_records * 2**standing.num_closings
    ]
    ready.sort(key=lambda route: (-standings[route].num_records, route))
    return ready[: max(0, room)]


def reason_to_close(standing: Standing, now_s: float, policy: RoutePolicy) -> str:
    """Reason to close the route; empty: it stays open. Whether a route that keeps losing is closed depends on
    which draft beats it."""
    silent_s = now_s - standing.last_record_s
    return f"it starved: no record for {silent_s:.0f} s" if silent_s >= policy.idle_s else ""


def has_lost(standing: Standing, policy: RoutePolicy) -> bool:
    """Whether its own draft has long not been the best and is given up."""
    return standing.num_losses >= policy.losses_before_close
