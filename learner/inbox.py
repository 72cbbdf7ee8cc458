"""Records on their way to the learner: read from every route of one target, kept until acknowledged.

Knows no models. Invariant: a record is acknowledged only after the checkpoint that used it was written,
and one that such a checkpoint names is never learnt from twice.
"""

from collections.abc import Iterable, Mapping

from buffer.records import GenerationRecord
from buffer.store import Delivery, RecordStore, StreamKey


class Inbox:
    """`acked_entry_ids`, by route, come from the checkpoint: used already, perhaps not yet acknowledged."""

    def __init__(
        self,
        store: RecordStore,
        target_revision: str,
        consumer: str,
        acked_entry_ids: Mapping[str, Iterable[str]],
    ) -> None:
        self._store = store
        self._target_revision = target_revision
        self._consumer = consumer
        self._used = {route: set(ids) for route, ids in acked_entry_ids.items()}
        self._waiting: dict[StreamKey, list[Delivery]] = {}

    def streams(self) -> list[StreamKey]:
        """The streams of this target, one a route."""
        every = self._store.keys()
        found = [key for key in every if key.target_revision == self._target_revision]
        return sorted(found, key=lambda key: key.route)

    def reclaim(self) -> list[GenerationRecord]:
        """What an earlier life read and never acknowledged."""
        arrived: list[GenerationRecord] = []
        for key in self.streams():
            arrived += self._accept(key, self._store.claim(key, self._consumer))
        return arrived

    def read(self, max_records: int) -> list[GenerationRecord]:
        """What arrived since the last call, while fewer than `max_records` wait; never blocks."""
        arrived: list[GenerationRecord] = []
        for key in self.streams():
            room = max_records - self.num_waiting
            if room > 0:
                arrived += self._accept(key, self._store.read_new(key, self._consumer, room))
        return arrived

    @property
    def num_waiting(self) -> int:
        return sum(len(deliveries) for deliveries in self._waiting.values())

    def records(self) -> list[GenerationRecord]:
        """Everything that waits, by route and arrival."""
        return [delivery.record for deliveries in self._waiting.values() for delivery in deliveries]

    def oldest_age_s(self, now_s: float) -> float:
        return max((now_s - record.created_at_s for record in self.records()), default=0.0)

    def entry_ids(self) -> dict[str, list[str]]:
        """By route: what waits; a checkpoint names these before they are acknowledged."""
        return {
            key.route: [delivery.entry_id for delivery in deliveries]
            for key, deliveries in self._waiting.items()
            if deliveries
        }

    def ack(self) -> None:
        """Everything that waited was used by a checkpoint."""
        for key, deliveries in self._waiting.items():
            if deliveries:
                self._store.ack(key, [delivery.entry_id for delivery in deliveries])
        self._used = {route: set(ids) for route, ids in self.entry_ids().items()}
        self._waiting = {}

    def _accept(self, key: StreamKey, deliveries: list[Delivery]) -> list[GenerationRecord]:
        used = self._used.get(key.route, set())
        known = {delivery.entry_id for delivery in self._waiting.get(key, [])}
        again = [delivery.entry_id for delivery in deliveries if delivery.entry_id in used]
        if again:
            self._store.ack(key, again)
        fresh = [delivery for delivery in deliveries if delivery.entry_id not in used | known]
        self._waiting.setdefault(key, []).extend(fresh)
        return [delivery.record for delivery in fresh]
