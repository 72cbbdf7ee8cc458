"""A circuit breaker: it opens after failures, then allows one try per back-off, and closes after a success.

It knows neither the operation that is tried nor a clock: callers pass the time. Invariant: while open, at
most one try per back-off, and the back-off never exceeds `max_backoff_s`.
"""


class CircuitBreaker:
    """Not thread-safe for writers: one thread reports; any thread may read `allows`."""

    def __init__(
        self, *, max_failures: int = 2, min_backoff_s: float = 0.2, max_backoff_s: float = 10.0
    ) -> None:
        self._max_failures = max_failures
        self._min_backoff_s = min_backoff_s
        self._max_backoff_s = max_backoff_s
        self._num_failures = 0
        self._open_until_s = float("-inf")

    @property
    def is_open(self) -> bool:
        """The last tries failed, and none has succeeded since."""
        return self._num_failures >= self._max_failures

    def allows(self, now_s: float) -> bool:
        """Whether a try makes sense now: closed, or open with the back-off over."""
        return self.wait_s(now_s) <= 0.0

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next try is allowed; 0 when it is."""
        return max(0.0, self._open_until_s - now_s) if self.is_open else 0.0

    def succeeded(self) -> None:
        self._num_failures = 0

    def failed(self, now_s: float) -> None:
        self._num_failures += 1
        num_doublings = min(self._num_failures - self._max_failures, 60)
        if num_doublings >= 0:
            backoff_s = min(self._min_backoff_s * 2.0**num_doublings, self._max_backoff_s)
            self._open_until_s = now_s + backoff_s
