"""Records on their way to the learner: read from every stream of one target, kept until acknowledged.

Knows no models, nor which draft learns from which streams: callers name them. Invariant: a record is
acknowledged only after the checkpoint that used it was written, and one that such a checkpoint names is
never learnt from twice.
"""

from collections.abc import Iterable, Mapping, Sequence

from buffer.records import GenerationRecord
from buffer.store import Delivery, RecordStore, StreamKey

CLAIM_IDLE_S = 600.0
"""What another learner holds for so long it is taken not to come back to. A cycle is far shorter: a learner
that lives acknowledges what it read within it."""


class RecordInbox:
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
        """The streams of this target, one a route. What was known of one that is gone is forgotten, but for
        the records that wait."""
        every = self._store.keys()
        found = [key for key in every if key.target_revision == self._target_revision]
        routes = {key.route for key in found}
        self._used = {route: used for route, used in self._used.items() if route in routes}
        self._waiting = {key: held for key, held in self._waiting.items() if held or key in found}
        return sorted(found, key=lambda key: key.route)

    def reclaim(self) -> None:
        """Take in what an earlier life of this consumer read and never acknowledged, and what another one has
        held for CLAIM_IDLE_S."""
        for key in self.streams():
            self._accept(key, self._store.claim(key, self._consumer, CLAIM_IDLE_S))

    def read(self, keys: Sequence[StreamKey], max_records: int) -> list[GenerationRecord]:
        """What arrived since the last call, while fewer than `max_records` of these streams wait; never
        blocks."""
        arrived: list[GenerationRecord] = []
        for key in keys:
            room = max_records - self.num_waiting(keys)
            if room > 0:
                arrived += self._accept(key, self._store.read_new(key, self._consumer, room))
        return arrived

    def num_waiting(self, keys: Sequence[StreamKey]) -> int:
        return sum(len(self._waiting.get(key, ())) for key in keys)

    def records(self, keys: Sequence[StreamKey]) -> list[GenerationRecord]:
        """Everything of these streams that waits, by route and arrival."""
        return [delivery.record for key in keys for delivery in self._waiting.get(key, ())]

    def oldest_age_s(self, keys: Sequence[StreamKey], now_s: float) -> float:
        return max((now_s - record.created_at_s for record in self.records(keys)), default=0.0)

    def entry_ids(self, keys: Sequence[StreamKey]) -> dict[str, list[str]]:
        """By route: what waits; a checkpoint names these before they are acknowledged."""
        return {
            key.route: [delivery.entry_id for delivery in deliveries]
            for key in keys
            if (deliveries := self._waiting.get(key))
        }

    def ack(self, keys: Sequence[StreamKey]) -> None:
        """Everything of these streams that waited was used by a checkpoint."""
        used = self.entry_ids(keys)
        for key in keys:
            if key.route in used:
                self._store.ack(key, used[key.route])
        for key in keys:
            self._used[key.route] = set(used.get(key.route, ()))
            self._waiting.pop(key, None)

    def _accept(self, key: StreamKey, deliveries: list[Delivery]) -> list[GenerationRecord]:
        used = self._used.get(key.route, set())
        known = {delivery.entry_id for delivery in self._waiting.get(key, [])}
        again = [delivery.entry_id for delivery in deliveries if delivery.entry_id in used]
        if again:
            self._store.ack(key, again)
        fresh = [delivery for delivery in deliveries if delivery.entry_id not in used | known]
        self._waiting.setdefault(key, []).extend(fresh)
        return [delivery.record for delivery in fresh]
