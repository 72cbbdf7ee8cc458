"""Server-sent events, and a response that always closes its source."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = "data: [DONE]\n\n"


_OBFUSCATION = ',"obfuscation":"{}"'


def event(json_text: str, name: str | None = None, *, padded_to: int = 0) -> str:
    """One event. JSON has no raw line breaks, so one line is enough. `padded_to`: its bytes are a multiple of
    so many, by random characters in OpenAI's field `obfuscation`; 0: as long as it is."""
    text = f"data: {json_text}\n\n" if name is None else f"event: {name}\ndata: {json_text}\n\n"
    if padded_to == 0:
        return text
    missing = -(len(text.encode()) + len(_OBFUSCATION.format(""))) % padded_to
    padding = secrets.token_urlsafe(missing)[:missing]
    return text.removesuffix("}\n\n") + _OBFUSCATION.format(padding) + "}\n\n"


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
