"""What `Engine.submit` returns: follow a generation, wait for it, or cancel it."""

import queue
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
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
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
            self._events.put(event)

    def __iter__(self) -> Iterator[TokenEvent]:
        while self._generation is None:
            event = self._events.get()
            self._generation = event.generation
            yield event

    def result(self, timeout_s: float | None = None) -> Generation:
        """The finished generation. Raises TimeoutError; the generation then still runs."""
        while self._generation is None:
            try:
                event = self._events.get(timeout=timeout_s)
            except queue.Empty:
                raise TimeoutError(
                    f"generation {self.request_id!r} was silent for {timeout_s} s; it still runs"
                ) from None
            self._generation = event.generation
        return self._generation
