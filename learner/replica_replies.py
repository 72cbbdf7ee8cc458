"""Reads replicas' rejections of adapters from the feed; each is reported once.

Knows no tracker and changes nothing. Invariant: a rejection by one replica never withdraws an adapter that
another replica serves.
"""

from buffer.records import AdapterEvent
from buffer.store import AdapterFeed

_EVENTS_READ = 20
_PATIENCE_S = 5.0
"""Time after a rejection in which the other replicas, too, have fetched, staged and reported."""


class ReplicaReplies:
    """Rejections of one route's adapters; those before `told_until_s` were reported by an earlier learner,
    but still count."""

    def __init__(self, feed: AdapterFeed, route: str, told_until_s: float) -> None:
        self._feed = feed
        self._route = route
        self._told_until_s = told_until_s
        self._seen: dict[tuple[float, int, str], AdapterEvent] = {}

    def new(self) -> list[AdapterEvent]:
        """Rejections that were not reported before."""
        events = [e for e in self._feed.history(self._route, _EVENTS_READ) if e.kind == "rejected_by_replica"]
        by_identity = {(event.at_s, event.draft_version, event.reason): event for event in events}
        fresh = [event for identity, event in by_identity.items() if identity not in self._seen]
        self._seen = by_identity
        return [event for event in fresh if event.at_s >= self._told_until_s]

    def rejected_by_all(self, draft_version: int) -> str:
        """Reason to withdraw this version; empty while some replica may serve it."""
        refusals = [event for event in self._seen.values() if event.draft_version == draft_version]
        if not refusals:
            return ""
        for status in self._feed.statuses():
            early = status.at_s < refusals[-1].at_s + _PATIENCE_S
            if early or status.serving_versions.get(self._route) == draft_version:
                return ""
        return f"refused by replicas: version {draft_version}, {refusals[-1].reason}"
