"""What replicas said of the adapters they were given: each refusal is heard once.

Knows no tracker and changes nothing. Invariant: one replica's refusal never condemns an adapter that another
replica serves.
"""

from buffer.records import AdapterEvent
from buffer.store import AdapterFeed

_EVENTS_READ = 20
_PATIENCE_S = 5.0
"""After a refusal: the other replicas, too, fetch, stage and report before one speaks for all."""


class ReplicaReplies:
    """Of one route; refusals before `told_until_s` were told by an earlier learner, but still count."""

    def __init__(self, feed: AdapterFeed, route: str, told_until_s: float) -> None:
        self._feed = feed
        self._route = route
        self._told_until_s = told_until_s
        self._heard: dict[tuple[float, int, str], AdapterEvent] = {}

    def new(self) -> list[AdapterEvent]:
        """Refusals by replicas that were not heard before."""
        events = [e for e in self._feed.history(self._route, _EVENTS_READ) if e.kind == "rejected_by_replica"]
        found = {(event.at_s, event.draft_version, event.reason): event for event in events}
        fresh = [event for name, event in found.items() if name not in self._heard]
        self._heard = found
        return [event for event in fresh if event.at_s >= self._told_until_s]

    def rejected_by_all(self, draft_version: int) -> str:
        """Why this version should not be offered any longer; empty while some replica may serve it."""
        refusals = [event for event in self._heard.values() if event.draft_version == draft_version]
        if not refusals:
            return ""
        for status in self._feed.statuses():
            early = status.at_s < refusals[-1].at_s + _PATIENCE_S
            if early or status.serving_versions.get(self._route) == draft_version:
                return ""
        return f"refused by replicas: version {draft_version}, {refusals[-1].reason}"
