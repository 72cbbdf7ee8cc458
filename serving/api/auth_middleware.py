"""The outermost layer of the app but CORS: request ids, keys, refused admin calls, unhandled exceptions.

A plain ASGI layer, so that bodies are not read before the key is checked and streams are never buffered.
Invariant: every HTTP answer carries X-Request-Id exactly once (see `request_ids`), but for answers to a
browser's preflight, which has no key and never comes here.
"""

import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from buffer.audit import REFUSED_BY_KEY, Caller
from serving.api.errors import ApiError, internal_error
from serving.api.keys import KeyRing, realm_of, shown_digest
from serving.api.refused_calls import RefusedCalls
from serving.api.request_ids import REQUEST_ID_HEADER, request_id_of
from serving.log_lines import FIELDS, REQUEST_ID, where_raised

_log = logging.getLogger(__name__)

AUDITED = "audited"
"""Key of the request's state: an operation has put the call into the audit log."""
TENANT = "tenant"
"""Key of the request's state: the Tenant whose key it brought, or None."""
ANSWER_ID = "answer_id"
"""Key of the request's state: the id of the answer, with which ids in the engine and of records begin."""
_READING = ("GET", "HEAD", "OPTIONS")


class AuthMiddleware:
    """Wraps the app. Needs to be added after all layers that read a body, so that it sees a request first.

    `sends_request_id` False: a proxy in front of the app adds the id to the answer."""

    def __init__(
        self, app: ASGIApp, keys: KeyRing, refused_calls: RefusedCalls, *, sends_request_id: bool = True
    ) -> None:
        self._app = app
        self._keys, self._refused_calls = keys, refused_calls
        self._sends_request_id = sends_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id, began_s = request_id_of(headers), time.monotonic()
        REQUEST_ID.set(request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        authorization = headers.get("authorization")
        scope["state"][TENANT] = self._keys.tenant_of(authorization)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._sends_request_id:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        refusal = self._refusal(_route_path(scope), authorization)
        if refusal is not None:
            self._note(scope, REFUSED_BY_KEY)
            await refusal.response()(scope, receive, send_with_id)
            _tell(scope, status, began_s)
            return
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _log.error("request %s failed: %s", request_id, where_raised(error))
            if not status:
                await internal_error().response()(scope, receive, send_with_id)
        if 400 <= status < 500 and scope["method"] not in _READING and not scope["state"].get(AUDITED):
            self._note(scope, f"refused: status {status}")
        _tell(scope, status, began_s)

    def _note(self, scope: Scope, outcome: str) -> None:
        """An admin call that reached no operation, which would have noted it."""
        path = _route_path(scope)
        if realm_of(path) == "admin":
            self._refused_calls.note(caller_of(scope), scope["method"], path, outcome)

    def _refusal(self, path: str, authorization: str | None) -> ApiError | None:
        realm = realm_of(path)
        if self._keys.opens(realm, authorization):
            return None
        key = "admin key" if realm == "admin" else "API key"
        message = f"A valid {key} is needed: send it as 'Authorization: Bearer KEY'."
        return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


def caller_of(scope: Scope) -> Caller:
    """The key, by its digest, and the address of who connected, which may be a proxy's."""
    host, _ = scope.get("client") or ("unknown", 0)
    return Caller(shown_digest(Headers(scope=scope).get("authorization")), host)


def _tell(scope: Scope, status: int, began_s: float) -> None:
    """A line of the log, but for probes and scrapes that went well. A path may hold anything, so it is told
    by its route."""
    if not _log.isEnabledFor(logging.INFO) or (status < 400 and realm_of(_route_path(scope)) == "open"):
        return
    fields = {
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path", None),
        "status": status,
        "seconds": round(time.monotonic() - began_s, 6),
        ANSWER_ID: scope["state"].get(ANSWER_ID),
    }
    _log.info("answered", extra={FIELDS: fields})


def _route_path(scope: Scope) -> str:
    """The path as the routes see it, without the prefix that the app is mounted under."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root + "/") else path
