"""Waiting for someone to say stop."""

import signal
import threading
from collections.abc import Callable
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)


def wait_for_stop(every_second: Callable[[], None]) -> None:
    """Return at the first SIGINT or SIGTERM. Later ones are taken in too: stopping has begun.

    Must be called on the main thread, and after libraries that set handlers of their own (Ray does).
    """
    stop = threading.Event()

    def note(_: int, __: FrameType | None) -> None:
        stop.set()

    for number in STOPPING:
        signal.signal(number, note)
    while not stop.wait(timeout=1.0):
        every_second()
