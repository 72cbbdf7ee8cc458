"""What `Engine.submit` returns: follow a generation, wait for it, or cancel it.

Waking a thread costs the engine's thread more than a round's bookkeeping. A caller that waits for the result
is therefore woken once, at the end; only one that iterates is woken for each event.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator

from serving.engine.request import EventCallback, Generation, TokenEvent


class GenerationHandle:
    """Iterate it for TokenEvents, or call `result`. Safe from any thread, read by one."""

    def __init__(
        self, request_id: str, cancel: Callable[[], None], on_event: EventCallback | None = None
    ) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._callback = on_event
        self._events: deque[TokenEvent] = deque()
        self._num_delivered = 0
        self._is_followed = False
        self._woken = threading.Event()
        self._generation: Generation | None = None

    def cancel(self) -> None:
        """End the generation before the next round; its last event says `cancelled`."""
        self._cancel()

    def deliver(self, event: TokenEvent) -> None:
        """Called by the engine thread."""
        try:
            if self._callback is not None:
                self._callback(event)
        finally:
            self._events.append(event)
            self._num_delivered += 1
            if event.generation is not None:
                self._generation = event.generation
            if self._is_followed or event.generation is not None:
                self._woken.set()

    def __iter__(self) -> Iterator[TokenEvent]:
        self._is_followed = True
        while self._events or self._generation is None:
            self._woken.clear()
            while self._events:
                yield self._events.popleft()
            if self._generation is None:
                self._woken.wait()

    def result(self, timeout_s: float | None = None) -> Generation:
        """The finished generation. Raises TimeoutError; the generation then still runs."""
        while self._generation is None:
            num_delivered = self._num_delivered
            if not self._woken.wait(timeout_s) and self._num_delivered == num_delivered:
                raise TimeoutError(
                    f"generation {self.request_id!r} was silent for {timeout_s} s; it still runs"
                )
        return self._generation
