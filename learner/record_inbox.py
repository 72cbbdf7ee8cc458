"""Reads the records of every stream of one target, and keeps them until they are acknowledged.

Knows no models, nor which draft is trained on which streams: callers name them. Invariant: a record is
acknowledged only after the checkpoint that used it was written, and one that such a checkpoint names is never
trained on twice.
"""

from collections.abc import Iterable, Mapping, Sequence

from buffer.records import GenerationRecord
from buffer.store import Delivery, RecordStore, StreamKey

CLAIM_IDLE_S = 600.0
"""Idle time after which another consumer's records are claimed. A cycle is far shorter: a live learner
acknowledges what it read within it."""


class RecordInbox:
    """`acked_entry_ids`, by name of the stream, come from the checkpoint: already used, but perhaps not yet
    acknowledged."""

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
        self._used = {stream: set(ids) for stream, ids in acked_entry_ids.items()}
        self._waiting: dict[StreamKey, list[Delivery]] = {}

    def streams(self) -> list[StreamKey]:
        """The streams of this target, by route. State of deleted streams is dropped, except for records
        that wait."""
        every = self._store.keys()
        found = [key for key in every if key.target_revision == self._target_revision]
        names = {key.name for key in found}
        self._used = {stream: used for stream, used in self._used.items() if stream in names}
        self._waiting = {key: held for key, held in self._waiting.items() if held or key in found}
        return sorted(found, key=lambda key: key.name)

    def reclaim(self) -> None:
        """Claim what an earlier process of this consumer read and never acknowledged, and what another
        consumer has held for CLAIM_IDLE_S."""
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
        """All waiting records of these streams, by route and arrival."""
        return [delivery.record for key in keys for delivery in self._waiting.get(key, ())]

    def oldest_age_s(self, keys: Sequence[StreamKey], now_s: float) -> float:
        return max((now_s - record.created_at_s for record in self.records(keys)), default=0.0)

    def entry_ids(self, keys: Sequence[StreamKey]) -> dict[str, list[str]]:
        """Entry ids of waiting records, by stream; a checkpoint names them before they are acknowledged."""
        return {
            key.name: [delivery.entry_id for delivery in deliveries]
            for key in keys
            if (deliveries := self._waiting.get(key))
        }

    def ack(self, keys: Sequence[StreamKey]) -> None:
        """Acknowledge all waiting records of these streams: a checkpoint used them."""
        used = self.entry_ids(keys)
        for key in keys:
            if key.name in used:
                self._store.ack(key, used[key.name])
        for key in keys:
            self._used[key.name] = set(used.get(key.name, ()))
            self._waiting.pop(key, None)

    def expire(self, now_s: float) -> None:
        """Let go of waiting records of capture mode `memory` that may no longer be held. Their store counts
        them as dropped."""
        for key in [key for key in self._waiting if key.in_memory]:
            held = self._waiting[key]
            self._waiting[key] = [delivery for delivery in held if delivery.record.expires_at_s > now_s]

    def forget(self) -> None:
        """Let go of all waiting records; what is left of them in the store can be reclaimed."""
        self._waiting.clear()

    def _accept(self, key: StreamKey, deliveries: list[Delivery]) -> list[GenerationRecord]:
        used = self._used.get(key.name, set())
        waiting = {delivery.entry_id for delivery in self._waiting.get(key, [])}
        again = [delivery.entry_id for delivery in deliveries if delivery.entry_id in used]
        if again:
            self._store.ack(key, again)
        fresh = [delivery for delivery in deliveries if delivery.entry_id not in used | waiting]
        self._waiting.setdefault(key, []).extend(fresh)
        return [delivery.record for delivery in fresh]
