"""Admission: bounds on waiting requests and prompt tokens; over a bound the client gets a retry time.

Knows neither HTTP nor the engine; `num_slots` requests run, the others wait. A ticket is a request's place:
it is taken before the engine gets the request and released exactly once. Called on one thread. Invariant:
requests of many generations leave a quarter of every bound to those of one, so that a few of them cannot
block everybody else.
"""

import math
from collections import deque
from collections.abc import Callable

_MAX_RETRY_AFTER_S = 30


class QueueFullError(Exception):
    """The request was not queued; `retry_after_s` is an estimate of when there will be room."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Ticket:
    """The place of one API request: `num_requests` generations. `start` and `release` are idempotent."""

    def __init__(self, admission: "Admission", num_requests: int, num_prompt_tokens: int) -> None:
        self._admission = admission
        self.num_requests = num_requests
        self._num_waiting_tokens = num_prompt_tokens
        self._released = False

    def start(self) -> None:
        """The first token was generated: the prompt no longer waits."""
        self._admission._num_waiting_tokens -= self._num_waiting_tokens
        self._num_waiting_tokens = 0

    def release(self) -> None:
        """The request ended, in any way."""
        if not self._released:
            self._released = True
            self.start()
            self._admission._ended(self.num_requests)


class Admission:
    """Counts admitted requests that have not ended."""

    def __init__(
        self,
        *,
        num_slots: int,
        max_queued_requests: int,
        max_queued_prompt_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self._max_requests = num_slots + max_queued_requests
        self._max_queued_requests = max_queued_requests
        self._max_waiting_tokens = max_queued_prompt_tokens
        self._clock = clock
        self._num_waiting_tokens = 0
        self._ends: deque[tuple[float, int]] = deque(maxlen=32)
        self.num_in_flight = 0
        self.num_rejected = 0

    def admit(self, num_requests: int, num_prompt_tokens: int) -> Ticket:
        """Returns a ticket or raises QueueFullError. The size of a single request is bounded in `limits`; a
        prompt longer than all that may wait is admitted while no other waits."""
        shared = num_requests > 1 and self.num_in_flight > 0
        kept_requests = self._max_queued_requests // 4 if shared else 0
        kept_tokens = self._max_waiting_tokens // 4 if shared else 0
        if self.num_in_flight + num_requests > self._max_requests - kept_requests:
            self._refuse(f"max_queued_requests={self._max_queued_requests} reached", num_requests)
        if (
            self._num_waiting_tokens
            and self._num_waiting_tokens + num_prompt_tokens > self._max_waiting_tokens - kept_tokens
        ):
            self._refuse(f"max_queued_prompt_tokens={self._max_waiting_tokens} reached", num_requests)
        self.num_in_flight += num_requests
        self._num_waiting_tokens += num_prompt_tokens
        return Ticket(self, num_requests, num_prompt_tokens)

    def _refuse(self, reason: str, num_requests: int) -> None:
        self.num_rejected += num_requests
        raise QueueFullError(f"{reason}; the request was not queued", self._retry_after_s(num_requests))

    def _retry_after_s(self, num_requests: int) -> int:
        """Seconds until so many have ended, at the rate of the last ends; 1 before any ended."""
        if not self._ends:
            return 1
        span_s = max(self._clock() - self._ends[0][0], 1e-3)
        rate = sum(count for _, count in self._ends) / span_s
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(num_requests / rate)))

    def _ended(self, num_requests: int) -> None:
        self.num_in_flight -= num_requests
        self._ends.append((self._clock(), num_requests))
