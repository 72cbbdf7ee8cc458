"""A queue from other threads to one coroutine, which takes items in batches; each batch costs one wake-up."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class EventQueue(Generic[T]):
    """Belongs to the event loop that runs when it is made. Posts never block and never raise."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._items: deque[T] = deque()

    def post(self, items: Iterable[T], act: Callable[[], None] | None = None) -> None:
        """Post at least one item, from any thread; `act` runs on the loop soon, whether or not anybody takes
        the items. Once the loop is closed, items are lost."""
        with self._lock:
            first = not self._items
            self._items.extend(items)
        if first or act is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._notice, act)

    async def take(self, timeout_s: float) -> list[T]:
        """Everything posted since the last take, at least one item. Raises TimeoutError."""
        await asyncio.wait_for(self._arrived.wait(), timeout_s)
        with self._lock:
            items = list(self._items)
            self._items.clear()
        self._arrived.clear()
        return items

    def _notice(self, act: Callable[[], None] | None) -> None:
        if self._items:
            self._arrived.set()
        if act is not None:
            act()
