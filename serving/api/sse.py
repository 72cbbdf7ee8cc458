"""Server-sent events, and a response that always closes its source."""

from collections.abc import AsyncIterator, Callable

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = "data: [DONE]\n\n"


def event(json_text: str, name: str | None = None) -> str:
    """One event. JSON has no raw line breaks, so one line is enough."""
    return f"data: {json_text}\n\n" if name is None else f"event: {name}\ndata: {json_text}\n\n"


class EventStream(StreamingResponse):
    """`on_close` runs exactly once: when the client disconnected, the events ended, or sending failed."""

    def __init__(self, events: AsyncIterator[str], on_close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()
