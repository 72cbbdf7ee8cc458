"""Two RecordStores as one: records of capture mode `replay` in one, those of mode `memory` in the other.

A stream's key says in which of them it lies, so an entry is acknowledged, drawn and deleted where it came
from. Knows no Redis. Invariant: no record of a key with `in_memory` reaches the durable store.
"""

from collections.abc import Sequence
from dataclasses import replace

from buffer.records import GenerationRecord
from buffer.store import Delivery, PurgeStep, RecordFilter, RecordStore, StreamKey, StreamSize


class TwoStores:
    """A RecordStore over two; closes both."""

    def __init__(self, durable: RecordStore, in_memory: RecordStore) -> None:
        self._durable, self._in_memory = durable, in_memory

    @property
    def num_rerouted_records(self) -> int:
        return self._durable.num_rerouted_records + self._in_memory.num_rerouted_records

    def append(self, key: StreamKey, records: Sequence[GenerationRecord]) -> int:
        return self._of(key).append(_own(key), records)

    def read_new(self, key: StreamKey, consumer: str, max_records: int) -> list[Delivery]:
        return self._of(key).read_new(_own(key), consumer, max_records)

    def claim(self, key: StreamKey, consumer: str, min_idle_s: float) -> list[Delivery]:
        return self._of(key).claim(_own(key), consumer, min_idle_s)

    def ack(self, key: StreamKey, entry_ids: Sequence[str]) -> None:
        self._of(key).ack(_own(key), entry_ids)

    def draw_replay(self, key: StreamKey, num_records: int, seed: int) -> list[GenerationRecord]:
        return self._of(key).draw_replay(_own(key), num_records, seed)

    def purge(self, key: StreamKey, meant: RecordFilter, cursor: int = 0) -> PurgeStep:
        return self._of(key).purge(_own(key), meant, cursor)

    def drop_expired(self, key: StreamKey) -> None:
        self._of(key).drop_expired(_own(key))

    def rewrite_files(self) -> str:
        """The other store has none."""
        return self._durable.rewrite_files()

    def size(self, key: StreamKey) -> StreamSize:
        return self._of(key).size(_own(key))

    def keys(self) -> list[StreamKey]:
        durable, in_memory = self._durable.keys(), self._in_memory.keys()
        return [*durable, *(replace(key, in_memory=True) for key in in_memory)]

    def close(self) -> None:
        self._durable.close()
        self._in_memory.close()

    def _of(self, key: StreamKey) -> RecordStore:
        return self._in_memory if key.in_memory else self._durable


def _own(key: StreamKey) -> StreamKey:
    """As the store itself knows it."""
    return replace(key, in_memory=False)
