"""The outermost layer of the app but CORS: request ids, keys, and the answer to an unhandled exception.

A plain ASGI layer, so that bodies are not read before the key is checked and streams are never buffered.
Invariant: every HTTP answer carries X-Request-Id exactly once (see `request_ids`), but for answers to a
browser's preflight, which has no key and never comes here.
"""

import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import ApiError, internal_error
from serving.api.keys import KeyRing, realm_of
from serving.api.request_ids import REQUEST_ID_HEADER, request_id_of

_log = logging.getLogger(__name__)


class AuthMiddleware:
    """Wraps the app. Needs to be added after all layers that read a body, so that it sees a request first.

    `sends_request_id` False: a proxy in front of the app adds the id to the answer."""

    def __init__(self, app: ASGIApp, keys: KeyRing, *, sends_request_id: bool = True) -> None:
        self._app = app
        self._keys = keys
        self._sends_request_id = sends_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._sends_request_id:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        refusal = self._refusal(_route_path(scope), headers.get("authorization"))
        if refusal is not None:
            await refusal.response()(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            _log.exception("request %s failed", request_id)
            if not started:
                await internal_error().response()(scope, receive, send_with_id)

    def _refusal(self, path: str, authorization: str | None) -> ApiError | None:
        realm = realm_of(path)
        if self._keys.opens(realm, authorization):
            return None
        key = "admin key" if realm == "admin" else "API key"
        message = f"A valid {key} is needed: send it as 'Authorization: Bearer KEY'."
        return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


def _route_path(scope: Scope) -> str:
    """The path as the routes see it, without the prefix that the app is mounted under."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root + "/") else path
