"""Takes in clients while no proxy of Serve listens on the endpoint's port, so that they wait and are not
refused.

Serve starts a dead proxy again, which takes seconds; a client that is refused gives up sooner. The doorkeeper
listens only while nobody else does, holds what connects, and hands it on as bytes once a proxy answers. Knows
no request. Invariant: it never listens beside a proxy for longer than one look, and leaving the block closes
what it holds.
"""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import psutil

_log = logging.getLogger(__name__)

_LOOK_S = 0.2
_READY_S = 15.0
"""How long a new proxy may take to know where requests go."""
_BACKLOG = 1024
_CHUNK_BYTES = 64 * 2**10

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextmanager
def kept_door(host: str, port: int) -> Iterator[None]:
    """Inside the block. A proxy listens when it is entered."""
    keeper = _Doorkeeper(host, port)
    thread = threading.Thread(target=keeper.run, name="doorkeeper", daemon=True)
    thread.start()
    try:
        yield
    finally:
        keeper.stop.set()
        thread.join()


class _Doorkeeper:
    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._handed_on: set[asyncio.Task[None]] = set()
        self.stop = threading.Event()

    def run(self) -> None:
        asyncio.run(self._watch())

    async def _watch(self) -> None:
        while not self.stop.is_set():
            listener = await asyncio.to_thread(self._listener)
            if listener is not None:
                await asyncio.to_thread(self._outlive, listener)
                continue
            try:
                await self._stand_in()
            except OSError as error:
                _log.warning(
                    "nobody listens on %s:%d, and it cannot be held: %s", self._host, self._port, error
                )
                await asyncio.sleep(1.0)

    def _listener(self) -> psutil.Process | None:
        """Who listens on the port, but for this process."""
        own = psutil.Process()
        with suppress(psutil.Error):
            for one in psutil.net_connections("tcp"):
                is_meant = one.status == psutil.CONN_LISTEN and one.laddr[1:2] == (self._port,)
                if is_meant and one.pid and one.pid != own.pid:
                    return psutil.Process(one.pid)
        return None

    def _outlive(self, listener: psutil.Process) -> None:
        """Until it has ended, which the kernel tells at once."""
        while not self.stop.is_set():
            try:
                listener.wait(timeout=_LOOK_S)
            except psutil.TimeoutExpired:
                continue
            except psutil.Error:
                pass
            return

    async def _stand_in(self) -> None:
        clients: list[Client] = []
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        door = socket.create_server(
            (self._host, self._port), family=family, backlog=_BACKLOG, reuse_port=True
        )
        server = await asyncio.start_server(lambda *client: clients.append(client), sock=door)
        while not self.stop.is_set() and await asyncio.to_thread(self._listener) is None:
            await asyncio.sleep(_LOOK_S)
        server.close()
        await asyncio.to_thread(self._proxy_is_ready)
        _log.info("%d clients waited for a proxy", len(clients))
        for client in clients:
            if self.stop.is_set():
                client[1].transport.abort()
                continue
            task = asyncio.create_task(hand_on(client, self._reachable, self._port))
            self._handed_on.add(task)
            task.add_done_callback(self._handed_on.discard)

    def _proxy_is_ready(self) -> None:
        host = f"[{self._reachable}]" if ":" in self._reachable else self._reachable
        direct = build_opener(ProxyHandler({}))
        deadline_s = time.monotonic() + _READY_S
        while not self.stop.is_set() and time.monotonic() < deadline_s:
            with suppress(URLError, OSError):
                direct.open(f"http://{host}:{self._port}/-/healthz", timeout=1.0).close()
                return
            time.sleep(_LOOK_S)


async def hand_on(client: Client, host: str, port: int, delay_s: Callable[[], float] = lambda: 0.0) -> None:
    """Bytes both ways between a client and a server, until both have closed or this task is cancelled. A
    server that does not take it: as if the client had been refused. `delay_s`: what each chunk of an answer
    waits."""
    reader, writer = client
    open_ones = [writer]
    try:
        answers, asks = await asyncio.open_connection(host, port)
        open_ones.append(asks)
        await asyncio.gather(_pump(reader, asks, lambda: 0.0), _pump(answers, writer, delay_s))
    except OSError:
        pass
    finally:
        for one in open_ones:
            one.transport.abort()


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: Callable[[], float]
) -> None:
    with suppress(OSError):
        while chunk := await reader.read(_CHUNK_BYTES):
            await asyncio.sleep(delay_s())
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
