"""Protocol for storing the learner's metrics, adapters and decisions, by route. Knows no MLflow.

Invariants: no call raises or waits, `close` excepted; steps are records seen.
"""

from collections.abc import Mapping
from typing import Protocol

from buffer.records import AdapterManifest


class Tracker(Protocol):
    """Stores the learner's metrics, adapters and decisions."""

    @property
    def run_id(self) -> str:
        """Id of the run that a resumed learner continues; empty while there is none."""
        ...

    @property
    def num_dropped(self) -> int: ...

    def log_params(self, params: Mapping[str, object]) -> None: ...

    def log_metrics(self, route: str, metrics: Mapping[str, float], num_records_seen: int) -> None: ...

    def log_decision(
        self, route: str, kind: str, draft_version: int, reason: str, num_records_seen: int
    ) -> None:
        """`kind` and `draft_version` as in AdapterEvent."""
        ...

    def log_adapter(self, manifest: AdapterManifest, weights: bytes, reason: str) -> None:
        """Store a durable copy: artifacts of the run and a version in its route's registered model. Does
        nothing if it is stored already."""
        ...

    def mark_serving(self, route: str, draft_version: int, previous_version: int, reason: str) -> None:
        """Point the aliases `serving` and `previous` (the rollback's target) at these versions; the floor (0)
        has no alias."""
        ...

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is queued, for at most so long."""
        ...


class NullTracker:
    """A Tracker that stores nothing."""

    run_id = ""
    num_dropped = 0

    def log_params(self, params: Mapping[str, object]) -> None: ...

    def log_metrics(self, route: str, metrics: Mapping[str, float], num_records_seen: int) -> None: ...

    def log_decision(
        self, route: str, kind: str, draft_version: int, reason: str, num_records_seen: int
    ) -> None: ...

    def log_adapter(self, manifest: AdapterManifest, weights: bytes, reason: str) -> None: ...

    def mark_serving(self, route: str, draft_version: int, previous_version: int, reason: str) -> None: ...

    def close(self, timeout_s: float = 10.0) -> None: ...
