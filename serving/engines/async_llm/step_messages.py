"""What crosses from vLLM's process to the replica: one message a request and step, over a bounded channel.

A thread of its own sends, over a Unix socket that keeps message boundaries; when the queue is full a message
is dropped and counted. Invariant: neither side ever waits for the other, and a lost message is seen by its
number.
"""

import contextlib
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)

MAX_QUEUE_BYTES = 32 * 2**20
_MAX_MESSAGE_BYTES = 1 << 20
_BUFFER_BYTES = 4 << 20
_IDLE_S = 0.5
ID_SUFFIX = 9
"""vLLM's `-<8 hex>` behind a request's id."""


@dataclass(frozen=True, eq=False)
class StepMessage:
    """One request's part of one step. Legend as in `RoundTrace`; arrays are empty without capture."""

    request_id: str
    """As vLLM names it inside."""
    number: int
    """Of the request's steps, from 0: a gap is a lost message."""
    draft_version: int
    """That proposed the draft tokens; that is loaded, where there are none."""
    num_drafted: int
    emitted: list[int]
    step_s: float
    """Since the step before, told with one request of the step; 0 with the others, and where none ran right
    before."""
    batch_size: int
    captured: "CapturedArrays | None" = None

    @property
    def given_id(self) -> str:
        """The request's id as it was given to vLLM."""
        return self.request_id[:-ID_SUFFIX]

    def encode(self) -> bytes:
        fields = [
            self.request_id,
            self.number,
            self.draft_version,
            self.num_drafted,
            self.emitted,
            self.step_s,
            self.batch_size,
        ]
        return bytes(msgpack.packb([*fields, None if self.captured is None else self.captured.packed()]))

    @classmethod
    def decode(cls, data: bytes) -> "StepMessage":
        unpacked: list[Any] = msgpack.unpackb(data)
        captured = unpacked.pop()
        arrays = None if captured is None else CapturedArrays.unpacked(captured)
        return cls(*[*unpacked, arrays])


@dataclass(frozen=True, eq=False)
class CapturedArrays:
    """The arrays of a RoundTrace."""

    drafted_token_ids_G: NDArray[np.int32]
    drafted_target_logprobs_G: NDArray[np.float32]
    drafted_draft_logprobs_G: NDArray[np.float32]
    emitted_target_logprobs_C: NDArray[np.float32]
    topk_token_ids_EK: NDArray[np.int32]
    topk_logprobs_EK: NDArray[np.float16]
    retemper_E: NDArray[np.float32]

    def packed(self) -> list[Any]:
        arrays = (np.ascontiguousarray(array) for array in vars(self).values())
        return [[array.tobytes(), *array.shape] for array in arrays]

    @classmethod
    def unpacked(cls, packed: list[Any]) -> "CapturedArrays":
        kinds = (np.int32, np.float32, np.float32, np.float32, np.int32, np.float16, np.float32)
        arrays: list[Any] = [
            np.frombuffer(data, kind).reshape(shape)
            for kind, (data, *shape) in zip(kinds, packed, strict=True)
        ]
        return cls(*arrays)


class MessageSender:
    """vLLM's side."""

    def __init__(
        self, path: str, lost: Callable[[], None] = lambda: None, max_queue_bytes: int = MAX_QUEUE_BYTES
    ) -> None:
        """Connects to the receiver; `lost` is called when it is gone. Raises OSError."""
        self.num_dropped = 0
        self._queue: deque[bytes] = deque()
        self._num_bytes, self._max_bytes = 0, max_queue_bytes
        self._lock, self._woken = threading.Lock(), threading.Event()
        self._socket = _socket()
        self._socket.connect(path)
        self._closed = self._broken = False
        self._lost = lost
        for act in (self._send, self._watch):
            threading.Thread(target=act, name="everdraft-steps", daemon=True).start()

    def put(self, message: StepMessage) -> None:
        """Returns at once."""
        data = message.encode()
        with self._lock:
            if (
                self._closed
                or self._broken
                or self._num_bytes + len(data) > self._max_bytes
                or len(data) > _MAX_MESSAGE_BYTES
            ):
                self._drop(1)
                return
            self._num_bytes += len(data)
            self._queue.append(data)
        self._woken.set()

    def close(self) -> None:
        self._closed = True
        self._woken.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # a close alone does not end the read
        self._socket.close()

    def _drop(self, count: int) -> None:
        if not self.num_dropped:
            _log.warning("steps are no longer told of in full: records end early, answers are unaffected")
        self.num_dropped += count

    def _watch(self) -> None:
        """The receiver sends nothing, so that a read ends when it does."""
        with contextlib.suppress(OSError):
            self._socket.recv(1)
        if not self._closed:
            self._lost()

    def _send(self) -> None:
        while not self._closed:
            self._woken.wait()
            self._woken.clear()
            while self._queue:
                data = self._queue.popleft()
                with self._lock:
                    self._num_bytes -= len(data)
                try:
                    self._socket.send(data)
                except OSError:
                    with self._lock:
                        self._broken = True
                        self._drop(1 + len(self._queue))
                        self._queue.clear()
                    return


class MessageReceiver:
    """The replica's side: a thread that hands every message to `receive`."""

    def __init__(self, path: str, receive: Callable[[StepMessage], None]) -> None:
        self._receive = receive
        self._socket = _socket()
        self._socket.bind(path)
        self._socket.listen(8)
        self._socket.settimeout(_IDLE_S)
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="everdraft-steps", daemon=True)]
        self._threads[0].start()

    def close(self, timeout_s: float = 2.0) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout_s)
        self._socket.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError, OSError):
                connection, _ = self._socket.accept()
                thread = threading.Thread(
                    target=self._read, args=(connection,), name="everdraft-steps", daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _read(self, connection: socket.socket) -> None:
        connection.settimeout(_IDLE_S)
        with connection:
            while not self._closed.is_set():
                try:
                    data = connection.recv(_MAX_MESSAGE_BYTES)
                except TimeoutError:
                    continue
                except OSError:
                    return
                if not data:
                    return
                self._receive(StepMessage.decode(data))


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        made.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    return made
