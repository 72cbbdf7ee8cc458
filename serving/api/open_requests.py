"""How long the oldest request is under way that Serve's proxy has not answered whole.

The proxy passes an answer on after the replica is done with it, so that a service which ends must ask the
proxy, too. Knows no replica. Invariant: a request counts until its last byte was handed to the network, or
its client left.
"""

import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OLDEST_HEADER = "X-Everdraft-Oldest-Request"
"""On answers of `/ready`: seconds since the oldest request under way began, or `none`."""
_READY = "/ready"


class OpenRequests:
    """An ASGI layer around Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._began_s: dict[object, float] = {}
        """In the order in which they began."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == _READY:
            await self._app(scope, receive, self._saying_oldest(send))
        else:
            this = object()
            self._began_s[this] = time.monotonic()
            try:
                await self._app(scope, receive, send)
            finally:
                del self._began_s[this]

    def _saying_oldest(self, send: Send) -> Send:
        async def said(message: Message) -> None:
            if message["type"] == "http.response.start":
                oldest_s = next(iter(self._began_s.values()), None)
                age = "none" if oldest_s is None else f"{time.monotonic() - oldest_s:.3f}"
                MutableHeaders(scope=message)[OLDEST_HEADER] = age
            await send(message)

        return said
