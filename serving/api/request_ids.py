"""The id under which a request can be found in logs: the client's own if it is valid, else a new one.

An id is valid if it has 1 to 128 visible ASCII characters, so that every header, log and library can hold it.
Invariant: an answer carries X-Request-Id exactly once.
"""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.open_requests import OpenRequests

REQUEST_ID_HEADER = "X-Request-Id"
_MAX_REQUEST_ID_LEN = 128

SERVE_PROXY_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.api.request_ids.proxy_layers"
}
"""Environment variable of a node by which Ray Serve's proxy finds `proxy_layers`."""

_SERVE_ORDERS = frozenset(
    "serve-multiplexed-model-id x-session-id x-request-timeout-seconds x-request-disconnect-disabled".split()
)
"""Headers with which any caller could change how Serve's proxy handles a request: its time limit, its
replica."""


def request_id_of(headers: Headers) -> str:
    """The first given id, if it is valid; else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    fits = 0 < len(given) <= _MAX_REQUEST_ID_LEN and all("!" <= char <= "~" for char in given)
    return given if fits else uuid.uuid4().hex


class ProxyHeaders:
    """Runs before Serve's proxy, which answers 500 to a header that it reads and cannot decode.

    The proxy itself adds the id to the answer, so the app behind it must not.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kept = [pair for pair in scope["headers"] if _name(pair[0]) not in _SERVE_ORDERS]
            scope = {**scope, "headers": kept}
            MutableHeaders(scope=scope)[REQUEST_ID_HEADER] = request_id_of(Headers(scope=scope))
        await self._app(scope, receive, send)


def proxy_layers() -> list[Middleware]:
    """Called by Serve's proxy when it starts."""
    return [Middleware(OpenRequests), Middleware(ProxyHeaders)]


def _name(header: bytes) -> str:
    return header.decode("latin-1").lower().replace("_", "-")
