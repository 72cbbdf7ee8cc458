"""One stream of encoded records in memory: order, deduplication, delivery, bounds.

It takes no lock, reads no clock and never waits: `memory_store` has the lock and the clock. Invariant:
`entries`, `entry_ids` and `num_bytes` always describe the same records.
"""

from collections import deque
from dataclasses import dataclass, field

from buffer.codec import decode
from buffer.records import GenerationRecord
from buffer.store import Bounds, Delivery, RecordFilter


@dataclass
class Entry:
    record_id: str
    payload: bytes
    expires_at_s: float
    appended_at_s: float
    consumer: str | None = None
    """The consumer that it was delivered to and that has not acknowledged it."""
    delivered_at_s: float = 0.0
    acknowledged: bool = False


@dataclass
class Stream:
    """Entries in order of arrival; `unread` holds the entry ids not yet delivered."""

    entries: dict[int, Entry] = field(default_factory=dict)
    entry_ids: dict[str, int] = field(default_factory=dict)
    unread: deque[int] = field(default_factory=deque)
    num_appended: int = 0
    num_bytes: int = 0
    num_dropped: int = 0
    last_append_s: float = 0.0

    def append(self, entry: Entry) -> bool:
        if entry.record_id in self.entry_ids:
            return False
        self.num_appended += 1
        self.entries[self.num_appended] = entry
        self.entry_ids[entry.record_id] = self.num_appended
        self.unread.append(self.num_appended)
        self.num_bytes += len(entry.payload)
        return True

    def remove(self, entry_id: int) -> None:
        entry = self.entries.pop(entry_id)
        del self.entry_ids[entry.record_id]
        self.num_bytes -= len(entry.payload)
        self.num_dropped += not entry.acknowledged

    def purge(self, meant: RecordFilter, now_s: float) -> int:
        found = [i for i, e in self.entries.items() if meant.fits(e.record_id, e.appended_at_s, now_s)]
        for entry_id in found:
            self.entries[entry_id].acknowledged = True  # not lost, but deleted
            self.remove(entry_id)
        return len(found)

    def drop_expired(self, now_s: float) -> None:
        for entry_id in [i for i, entry in self.entries.items() if entry.expires_at_s <= now_s]:
            self.remove(entry_id)

    def trim(self, bounds: Bounds, now_s: float) -> None:
        self.drop_expired(now_s)
        while self.entries and self._exceeds(bounds, now_s):
            self.remove(next(iter(self.entries)))

    def deliver(self, consumer: str, max_records: int, now_s: float) -> list[Delivery]:
        deliveries: list[Delivery] = []
        while self.unread and len(deliveries) < max_records:
            deliveries += self.hand_over(self.unread.popleft(), consumer, now_s)
        return deliveries

    def hand_over(self, entry_id: int, consumer: str, now_s: float) -> list[Delivery]:
        """One delivery, or none if the entry is gone or expired (then it is removed)."""
        entry = self.entries.get(entry_id)
        if entry is None:
            return []
        if entry.expires_at_s <= now_s:
            self.remove(entry_id)
            return []
        entry.consumer, entry.delivered_at_s = consumer, now_s
        return [Delivery(str(entry_id), decode(GenerationRecord, entry.payload))]

    def pending(self) -> dict[int, Entry]:
        return {i: entry for i, entry in self.entries.items() if entry.consumer is not None}

    def _exceeds(self, bounds: Bounds, now_s: float) -> bool:
        too_many = bounds.max_records is not None and len(self.entries) > bounds.max_records
        too_large = bounds.max_bytes is not None and self.num_bytes > bounds.max_bytes
        age_s = now_s - next(iter(self.entries.values())).appended_at_s
        return too_many or too_large or (bounds.max_age_s is not None and age_s > bounds.max_age_s)
