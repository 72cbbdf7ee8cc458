"""What operators ordered of a target's replicas and learner: plain data, and the rules that change it. Pure.

Kept in the adapter feed, so that every process follows the same orders and a restart keeps them. Knows no
storage and no clock. Invariant: orders that were read are sound; a rule that refuses changes nothing.
"""

import json
from dataclasses import dataclass, replace

from buffer.errors import CorruptRecordError, OrderRefusedError
from buffer.plain import from_plain, to_plain


@dataclass(frozen=True)
class Controls:
    """The orders in force. As made, nothing is ordered."""

    is_learning_paused: bool = False
    """The learner neither trains nor promotes, whatever the route."""
    paused_routes: tuple[str, ...] = ()
    """Routes whose drafts are neither trained nor promoted."""
    capture_rate: float | None = None
    """Share of requests that replicas record. None: that of their settings."""
    are_all_draining: bool = False
    """No replica takes new requests, those that start later included."""
    draining_replicas: tuple[str, ...] = ()
    """Ids of replicas that take no new requests."""
    last_purge: str = ""
    """Names the last deletion of records. A learner that sees another name than before lets go of all that it
    read, and reads again what is left."""

    def __post_init__(self) -> None:
        if self.capture_rate is not None and not 0.0 <= self.capture_rate <= 1.0:
            raise ValueError(f"capture_rate={self.capture_rate} is no share from 0 to 1; nothing was ordered")

    def pauses(self, route: str) -> bool:
        """Whether the draft of this route is neither trained nor promoted."""
        return self.is_learning_paused or route in self.paused_routes

    def drains(self, replica_id: str) -> bool:
        """Whether this replica takes no new requests."""
        return self.are_all_draining or replica_id in self.draining_replicas

    def with_learning_paused(self, route: str | None) -> "Controls":
        """Of one route, or (None) of all."""
        if route is None:
            return replace(self, is_learning_paused=True)
        return replace(self, paused_routes=tuple(sorted({*self.paused_routes, route})))

    def with_learning_resumed(self, route: str | None) -> "Controls":
        """Of one route, or (None) of all, those that were paused by name included."""
        if route is None:
            return replace(self, is_learning_paused=False, paused_routes=())
        if self.is_learning_paused:
            raise OrderRefusedError(
                f"route={route!r}: learning is paused for all routes; resume it without a route"
            )
        return replace(self, paused_routes=tuple(name for name in self.paused_routes if name != route))

    def with_capture_rate(self, rate: float | None) -> "Controls":
        return replace(self, capture_rate=rate)

    def with_purge(self, name: str) -> "Controls":
        return replace(self, last_purge=name)

    def with_drain(self, replica_id: str | None) -> "Controls":
        """Of one replica, or (None) of all."""
        if replica_id is None:
            return replace(self, are_all_draining=True)
        return replace(self, draining_replicas=tuple(sorted({*self.draining_replicas, replica_id})))

    def without_drain(self, replica_id: str | None) -> "Controls":
        """Of one replica, or (None) of all, those that were named included."""
        if replica_id is None:
            return replace(self, are_all_draining=False, draining_replicas=())
        if self.are_all_draining:
            raise OrderRefusedError(
                f"replica_id={replica_id!r}: all replicas drain; undo it without a replica's id"
            )
        return replace(
            self, draining_replicas=tuple(name for name in self.draining_replicas if name != replica_id)
        )

    def to_json(self) -> str:
        return json.dumps(to_plain(self))

    @staticmethod
    def from_json(text: str | bytes) -> "Controls":
        """Raises CorruptRecordError, also for orders that this build does not know: they are not ignored."""
        try:
            given = json.loads(text)
            controls: Controls = from_plain(Controls, to_plain(Controls()) | given)
        except (ValueError, TypeError) as error:
            raise CorruptRecordError(
                f"the operator's orders cannot be read, and those that were read last stay in force: {error}"
            ) from error
        return controls
