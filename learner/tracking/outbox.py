"""Runs jobs against a service that may be slow or unreachable, in order, in a thread of its own.

Knows no MLflow. Invariants: `submit` neither raises nor waits; a job that does not fit into the queue or is
refused is dropped and counted; a job that fails for another reason is retried until it succeeds.
"""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from buffer.redaction import redacted

logger = logging.getLogger(__name__)
Session = TypeVar("Session")


class Outbox(Generic[Session]):
    """`connect` makes the session that every job is given; `is_refusal` says for which errors a retry is
    useless. Both run in the outbox's thread."""

    def __init__(
        self,
        connect: Callable[[], Session],
        is_refusal: Callable[[Exception], bool],
        *,
        name: str,
        max_queued: int,
        retry_s: float,
    ) -> None:
        self._connect, self._is_refusal = connect, is_refusal
        self._name, self._retry_s = name, retry_s
        self.num_dropped = 0
        self._queue: queue.Queue[Callable[[Session], None]] = queue.Queue(max_queued)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"{name}-outbox", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[Session], None]) -> None:
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            self.num_dropped += 1

    def close(self, timeout_s: float) -> None:
        """Run the queued jobs, for at most so long."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        session = self._connected()
        while session is not None:
            try:
                job = self._queue.get(timeout=0.2)
            except queue.Empty:
                if self._stop.is_set():
                    return
                continue
            while not self._done(job, session):
                if self._stop.wait(self._retry_s):
                    return

    def _connected(self) -> Session | None:
        """Retries until it succeeds or the outbox is closed."""
        while True:
            try:
                return self._connect()
            except Exception as error:  # third parties let their backends' exceptions through
                logger.info("%s cannot be reached, trying again: %s", self._name, redacted(str(error)))
                if self._stop.wait(self._retry_s):
                    return None

    def _done(self, job: Callable[[Session], None], session: Session) -> bool:
        """False if the job should be retried."""
        try:
            job(session)
        except Exception as error:  # as above
            if not self._is_refusal(error):
                logger.info("%s cannot be reached, trying again: %s", self._name, redacted(str(error)))
                return False
            logger.warning("%s refused a write, dropped: %s", self._name, redacted(str(error)))
            self.num_dropped += 1
        return True
