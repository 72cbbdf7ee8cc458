"""A TCP link in front of a server, that can be made slow. Knows nothing of what goes over it."""

import asyncio
import threading
from typing import Any, Self

from deploy.doorkeeper import hand_on


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

    async def _joined(self, *client: Any) -> None:
        await hand_on(client, "127.0.0.1", self._server_port, lambda: self.delay_s)
