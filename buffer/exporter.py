"""Hands records from serving to a store without ever making serving wait.

`submit` puts a record into a bounded queue and returns; one daemon thread encodes and appends in batches. A
circuit breaker stops the attempts while the store cannot be reached. It knows no engine and no Redis.
Invariants: `submit` neither blocks nor raises; every submitted record is exported, dropped and counted, or
queued.
"""

import logging
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from buffer.breaker import CircuitBreaker
from buffer.errors import StoreUnavailableError
from buffer.records import GenerationRecord
from buffer.store import RecordStore, StreamKey

RecordMaker = Callable[[], GenerationRecord]
Submission = tuple[StreamKey, GenerationRecord | RecordMaker, int]
"""Stream key, the record or a callable that makes it, and the bytes that it holds."""

MAX_QUEUE_BYTES = 64 * 2**20

QUEUE_FULL = "queue_full"
STORE_UNAVAILABLE = "store_unavailable"
BREAKER_OPEN = "breaker_open"
INVALID_RECORD = "invalid_record"
CLOSED = "closed"
DROP_REASONS = (QUEUE_FULL, STORE_UNAVAILABLE, BREAKER_OPEN, INVALID_RECORD, CLOSED)

_POLL_S = 0.1
"""The thread notices `close` within this time."""

log = logging.getLogger(__name__)


class RecordExporter:
    """Owns one thread. `clock` is monotonic seconds, for the breaker's back-off. `on_exported` is told on
    that thread of records that the store has, and must not raise."""

    def __init__(
        self,
        store: RecordStore,
        *,
        max_queue_records: int = 2_048,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
        max_batch_records: int = 64,
        breaker: CircuitBreaker | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_exported: Callable[[Sequence[GenerationRecord]], object] | None = None,
    ) -> None:
        self._store, self._on_exported = store, on_exported
        self._max_batch_records = max_batch_records
        self._breaker = breaker or CircuitBreaker()
        self._clock = clock
        self._queue: queue.Queue[Submission] = queue.Queue(max_queue_records)
        self._max_queue_bytes = max_queue_bytes
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._num_submitted = 0
        self._num_exported = 0
        self._dropped: Counter[str] = Counter()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="record-exporter", daemon=True)
        self._thread.start()

    @property
    def num_submitted(self) -> int:
        return self._num_submitted

    @property
    def num_exported(self) -> int:
        """Records handed to the store, including those that it already had."""
        return self._num_exported

    @property
    def num_rerouted_records(self) -> int:
        """See `RecordStore.num_rerouted_records`."""
        return self._store.num_rerouted_records

    @property
    def num_dropped_records(self) -> int:
        return sum(self.dropped_by_reason.values())

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        """Every one of DROP_REASONS -> count."""
        with self._lock:
            return {reason: self._dropped[reason] for reason in DROP_REASONS}

    @property
    def breaker_open(self) -> bool:
        return self._breaker.is_open

    def submit(self, key: StreamKey, record: GenerationRecord | RecordMaker, num_bytes: int = 0) -> bool:
        """Queue a record, or a callable that makes it on the exporter's thread; until it is exported it
        holds `num_bytes`. False: dropped."""
        with self._lock:
            self._num_submitted += 1
        if self._closing.is_set():
            return self._drop(CLOSED)
        if not self._breaker.allows(self._clock()):
            return self._drop(BREAKER_OPEN)
        if not self._hold(num_bytes):
            return self._drop(QUEUE_FULL)
        try:
            self._queue.put_nowait((key, record, num_bytes))
        except queue.Full:
            self._hold(-num_bytes)
            return self._drop(QUEUE_FULL)
        return True

    def close(self, timeout_s: float = 5.0) -> None:
        """Refuse new records, flush what is queued for up to `timeout_s`, drop and count the rest."""
        self._closing.set()
        self._thread.join(timeout_s)
        self._drop(CLOSED, len(self._drain(self._queue.qsize())))

    def _run(self) -> None:
        while not (self._closing.is_set() and self._queue.empty()):
            wait_s = self._breaker.wait_s(self._clock())
            if wait_s > 0.0:
                if self._closing.wait(min(wait_s, _POLL_S)):
                    return  # the store cannot be reached: `close` counts what is left
                continue
            try:
                first = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            batch = [first, *self._drain(self._max_batch_records - 1)]
            self._export(batch)
            self._hold(-sum(num_bytes for *_, num_bytes in batch))

    def _hold(self, num_bytes: int) -> bool:
        """Count bytes in (negative: out). False: they would exceed the bound, and nothing was counted."""
        with self._lock:
            if num_bytes > 0 and self._held_bytes + num_bytes > self._max_queue_bytes:
                return False
            self._held_bytes += num_bytes
            return True

    def _drain(self, max_records: int) -> list[Submission]:
        drained: list[Submission] = []
        while len(drained) < max_records:
            try:
                drained.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return drained

    def _export(self, batch: Sequence[Submission]) -> None:
        by_key: defaultdict[StreamKey, list[GenerationRecord]] = defaultdict(list)
        for key, submitted, _ in batch:
            record = self._made(submitted)
            if record is not None:
                by_key[key].append(record)
        for key, records in by_key.items():
            self._append(key, records)

    def _made(self, submitted: GenerationRecord | RecordMaker) -> GenerationRecord | None:
        try:
            return submitted() if callable(submitted) else submitted
        except Exception:  # one bad record must not end the thread
            log.exception("a record could not be made and is dropped")
            self._drop(INVALID_RECORD)
            return None

    def _append(self, key: StreamKey, records: list[GenerationRecord]) -> None:
        """Append until stored or the breaker opens; a batch with a bad record goes one by one."""
        while self._breaker.allows(self._clock()):
            try:
                self._store.append(key, records)
            except StoreUnavailableError as error:
                self._breaker.failed(self._clock())
                if self._breaker.is_open:
                    log.warning("%d records dropped: %s", len(records), error)
            except Exception:  # as in `_made`
                self._append_singly(key, records)
                return
            else:
                self._breaker.succeeded()
                with self._lock:
                    self._num_exported += len(records)
                if self._on_exported is not None:
                    self._on_exported(records)
                return
        self._drop(STORE_UNAVAILABLE, len(records))

    def _append_singly(self, key: StreamKey, records: list[GenerationRecord]) -> None:
        if len(records) > 1:
            for record in records:
                self._append(key, [record])
            return
        log.exception("a record could not be stored and is dropped")
        self._drop(INVALID_RECORD)

    def _drop(self, reason: str, num_records: int = 1) -> bool:
        with self._lock:
            self._dropped[reason] += num_records
        return False
