"""Server-sent events, and a response that always closes its source."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = "data: [DONE]\n\n"


def event(json_text: str, name: str | None = None) -> str:
    """One event. JSON has no raw line breaks, so one line is enough."""
    return f"data: {json_text}\n\n" if name is None else f"event: {name}\ndata: {json_text}\n\n"


class EventStream(StreamingResponse):
    """Dropped after `timeout_s`, though its client may not have read it. `on_close` runs exactly once: when
    the client disconnected, the events ended, sending failed, or it was dropped."""

    def __init__(
        self,
        events: AsyncIterator[str],
        headers: Mapping[str, str],
        *,
        timeout_s: float,
        on_close: Callable[[], None],
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._timeout_s, self._on_close = timeout_s, on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await super().__call__(scope, receive, send)
        finally:
            self._on_close()
