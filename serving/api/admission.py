"""Admission: bounds on waiting requests and prompt tokens; over a bound the client gets a retry time.

Knows neither HTTP nor the engine; `num_slots` requests run, the others wait. A ticket is a request's place:
it is taken before the engine gets the request and released exactly once. Called on one thread. Invariants:
requests of many generations leave a quarter of every bound to those of one, so that a few of them cannot
block everybody else; where there are several owners, each may let as much wait as it leaves free for the
others (dynamic thresholds, Choudhury and Hahne 1998), so that none can fill the queue.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

_MAX_RETRY_AFTER_S = 30


class QueueFullError(Exception):
    """The request was not queued; `retry_after_s` is an estimate of when there will be room."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass
class _Held:
    """What one owner holds, or all together."""

    num_requests: int = 0
    num_waiting_tokens: int = 0


class Ticket:
    """The place of one API request: `num_requests` generations. `start` and `release` are idempotent."""

    def __init__(
        self, admission: "Admission", num_requests: int, num_prompt_tokens: int, owner: str | None
    ) -> None:
        self._admission, self._owner = admission, owner
        self.num_requests = num_requests
        self._num_waiting_tokens = num_prompt_tokens
        self._released = False

    def start(self) -> None:
        """The first token was generated: the prompt no longer waits."""
        self._admission._started(self._num_waiting_tokens, self._owner)
        self._num_waiting_tokens = 0

    def release(self) -> None:
        """The request ended, in any way."""
        if not self._released:
            self._released = True
            self.start()
            self._admission._ended(self.num_requests, self._owner)


class Admission:
    """Counts admitted requests that have not ended."""

    def __init__(
        self,
        *,
        num_slots: int,
        max_queued_requests: int,
        max_queued_prompt_tokens: int,
        clock: Callable[[], float],
        has_owners: bool = False,
    ) -> None:
        """`has_owners`: requests are of several owners (tenants), who share the queue."""
        self._num_slots = num_slots
        self._max_requests = num_slots + max_queued_requests
        self._max_queued_requests = max_queued_requests
        self._max_waiting_tokens = max_queued_prompt_tokens
        self._clock, self._has_owners = clock, has_owners
        self._all = _Held()
        self._held: defaultdict[str | None, _Held] = defaultdict(_Held)
        self._ends: deque[tuple[float, int]] = deque(maxlen=32)
        self.num_rejected = 0

    @property
    def num_in_flight(self) -> int:
        return self._all.num_requests

    def admit(
        self,
        num_requests: int,
        num_prompt_tokens: int,
        owner: str | None = None,
        max_concurrent: int | None = None,
    ) -> Ticket:
        """Returns a ticket or raises QueueFullError. The size of a single request is bounded in `limits`; a
        prompt longer than all that may wait is admitted while no other waits. `max_concurrent`: of this
        owner."""
        self.check(num_requests, num_prompt_tokens, owner, max_concurrent)
        for held in (self._all, self._held[owner]):
            held.num_requests += num_requests
            held.num_waiting_tokens += num_prompt_tokens
        return Ticket(self, num_requests, num_prompt_tokens, owner)

    def check(
        self,
        num_requests: int = 1,
        num_prompt_tokens: int = 1,
        owner: str | None = None,
        max_concurrent: int | None = None,
    ) -> None:
        """Raises QueueFullError where `admit` would; takes no place."""
        own = self._held[owner].num_requests
        if max_concurrent is not None and own + num_requests > max_concurrent:
            self._refuse(f"max_concurrent={max_concurrent} of this key's tenant reached", num_requests)
        self._check_requests(num_requests, own)
        self._check_tokens(num_requests, num_prompt_tokens, self._held[owner].num_waiting_tokens)

    def _check_requests(self, num_requests: int, own: int) -> None:
        shared = num_requests > 1 and self._all.num_requests > 0
        kept = self._max_queued_requests // 4 if shared else 0
        free = self._max_requests - self._all.num_requests - num_requests
        bound = f"max_queued_requests={self._max_queued_requests}"
        if free < kept:
            self._refuse(f"{bound} reached", num_requests)
        if self._has_owners and own + num_requests - self._num_slots > free:
            self._refuse(f"this key's share of {bound} reached", num_requests)

    def _check_tokens(self, num_requests: int, num_prompt_tokens: int, own: int) -> None:
        shared = num_requests > 1 and self._all.num_requests > 0
        kept = self._max_waiting_tokens // 4 if shared else 0
        waiting = self._all.num_waiting_tokens
        free = self._max_waiting_tokens - waiting - num_prompt_tokens
        bound = f"max_queued_prompt_tokens={self._max_waiting_tokens}"
        if waiting and free < kept:
            self._refuse(f"{bound} reached", num_requests)
        if self._has_owners and own and own + num_prompt_tokens > free:
            self._refuse(f"this key's share of {bound} reached", num_requests)

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

    def _started(self, num_prompt_tokens: int, owner: str | None) -> None:
        for held in (self._all, self._held[owner]):
            held.num_waiting_tokens -= num_prompt_tokens

    def _ended(self, num_requests: int, owner: str | None) -> None:
        for held in (self._all, self._held[owner]):
            held.num_requests -= num_requests
        self._ends.append((self._clock(), num_requests))
