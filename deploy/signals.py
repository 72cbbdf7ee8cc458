"""Waiting for someone to say stop."""

import signal
import threading
from collections.abc import Callable
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)


def wait_for_stop(every_second: Callable[[], None]) -> threading.Event:
    """Return at the first SIGINT or SIGTERM, with an event that is set by the next one.

    Must be called on the main thread, and after libraries that set handlers of their own (Ray does).
    """
    stop, again = threading.Event(), threading.Event()

    def note(_: int, __: FrameType | None) -> None:
        (again if stop.is_set() else stop).set()

    for number in STOPPING:
        signal.signal(number, note)
    while not stop.wait(timeout=1.0):
        every_second()
    return again
