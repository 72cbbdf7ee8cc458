"""A TCP link in front of a server, that can be made slow. Knows nothing of what goes over it."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

_CHUNK_BYTES = 64 * 2**10


class SlowLink:
    """Forwards `port` to `server_port` on loopback; `delay_s` is what each chunk of an answer waits."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self.delay_s = 0.0
        self.port = 0
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slow-link", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._is_up.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ends.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._forward())

    async def _forward(self) -> None:
        self._loop, self._ends = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._joined, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._is_up.set()
        await self._ends.wait()
        server.close()

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones = [writer]
        try:
            answers, asks = await asyncio.open_connection("127.0.0.1", self._server_port)
            open_ones.append(asks)
            await asyncio.gather(
                _pump(reader, asks, lambda: 0.0), _pump(answers, writer, lambda: self.delay_s)
            )
        except OSError:
            pass  # as if nobody listened
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
