"""Refuses a body that is too large before it is read whole: by its declared length, else by the bytes read.

A plain ASGI layer behind the keys. Invariant: the app reads at most the bound, and the client gets an OpenAI
error; what it still sends is dropped.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.limits import RequestLimits


class BodyLimit:
    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._limits.max_body_bytes:
            await self._limits.body_too_large().response()(scope, receive, send)
            return
        await _Reading(self._app, self._limits)(scope, receive, send)


class _Reading:
    """One request whose body has no declared length, or an acceptable one that may be false."""

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app, self._limits = app, limits
        self._num_bytes = 0
        self._answered = False

    @property
    def _is_over(self) -> bool:
        return self._num_bytes > self._limits.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted() -> Message:
            """Over the bound the app is told that the client disconnected, so that it stops."""
            if self._is_over:
                return {"type": "http.disconnect"}
            message = await receive()
            self._num_bytes += len(message.get("body", b""))
            return {"type": "http.disconnect"} if self._is_over else message

        async def send_unless_over(message: Message) -> None:
            """Over the bound, sends the client the error once, in place of the app's own answer."""
            if not self._is_over:
                await send(message)
            elif not self._answered:
                self._answered = True
                await self._limits.body_too_large().response()(scope, receive, send)

        await self._app(scope, counted, send_unless_over)
