"""Administration over the Admin API of a running everdraft, for operators who cannot reach its Redis.

Knows no console. Invariant: no message shows the key; the key goes to the given address alone, so redirects
and proxies are not followed.
"""

import json
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from buffer.administration import DraftDetails, PurgeReport, RouteDrafts
from buffer.audit import AuditLine
from buffer.controls import Controls
from buffer.plain import from_plain
from deploy.errors import AdminCallError

_TIMEOUT_S = 300.0
"""A purge of large streams takes its time."""


class HttpAdministration:
    """`url` is the endpoint's, with or without a path it is mounted under. Every call may raise
    AdminCallError."""

    def __init__(self, url: str, admin_key: str) -> None:
        """Raises AdminCallError for an address that is none."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise AdminCallError(f"--url {url!r} is no http:// or https:// address; nothing was asked")
        self._url, self._key = url.rstrip("/"), admin_key

    def drafts(self, route: str | None = None, max_events: int = 8) -> list[RouteDrafts]:
        query = urlencode({"events": max_events} | ({} if route is None else {"route": route}))
        return [_read(RouteDrafts, each) for each in self._get(f"drafts?{query}")]

    def draft(self, route: str, version: int) -> DraftDetails:
        found: DraftDetails = _read(DraftDetails, self._get(f"drafts/{_quoted(route)}/{version}"))
        return found

    def rollback(self, route: str, reason: str, version: int | None = None) -> int:
        return self._turn(route, "rollback", {"reason": reason, "version": version})

    def pin(self, route: str, version: int, reason: str) -> int:
        return self._turn(route, "pin", {"reason": reason, "version": version})

    def unpin(self, route: str, reason: str) -> int:
        return self._turn(route, "unpin", {"reason": reason})

    def controls(self) -> Controls:
        return _orders(self._get("status")["controls"])

    def replicas(self) -> list[str]:
        return list(self._get("status")["replicas"] or [])

    def pause_learning(self, route: str | None = None) -> Controls:
        return _orders(self._call("POST", "learning/pause", {"route": route}))

    def resume_learning(self, route: str | None = None) -> Controls:
        return _orders(self._call("POST", "learning/resume", {"route": route}))

    def set_capture_rate(self, rate: float | None) -> Controls:
        if rate is None:
            return _orders(self._call("DELETE", "capture"))
        return _orders(self._call("PUT", "capture", {"rate": rate}))

    def drain(self, replica_id: str | None = None) -> Controls:
        return _orders(self._call("POST", "drain", {"replica_id": replica_id}))

    def undrain(self, replica_id: str | None = None) -> Controls:
        return _orders(self._call("POST", "undrain", {"replica_id": replica_id}))

    def purge(
        self,
        *,
        request_id: str | None = None,
        route: str | None = None,
        older_than_s: float | None = None,
    ) -> PurgeReport:
        body = {"request_id": request_id, "route": route, "older_than_s": older_than_s}
        report: PurgeReport = _read(PurgeReport, self._call("POST", "records/purge", body))
        return report

    def audit_log(self, max_lines: int = 100) -> list[AuditLine]:
        return [AuditLine(**line) for line in self._get(f"audit?lines={max_lines}")]

    def _turn(self, route: str, verb: str, body: dict[str, Any]) -> int:
        return int(self._call("POST", f"drafts/{_quoted(route)}/{verb}", body)["draft_version"])

    def _get(self, path: str) -> Any:
        return self._call("GET", path)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self._url}/admin/{path}", data, headers, method=method)
        try:
            with _opener().open(request, timeout=_TIMEOUT_S) as answer:
                return json.load(answer)
        except HTTPError as error:
            with error:
                raise AdminCallError(f"{self._url} answers {error.code}: {_message(error)}") from None
        except (OSError, ValueError) as error:  # URLError is an OSError
            raise AdminCallError(f"{self._url} gives no answer that can be read: {error}") from None


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A redirect is an answer like another, and an error."""


def _opener() -> OpenerDirector:
    return build_opener(ProxyHandler({}), _NoRedirect)


def _message(error: HTTPError) -> str:
    """OpenAI's error object says it; what is not one is not ours."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.reason}; is this an everdraft endpoint?"


def _orders(plain: Any) -> Controls:
    controls: Controls = _read(Controls, plain)
    return controls


def _read(kind: Any, plain: Any) -> Any:
    try:
        return from_plain(kind, plain)
    except ValueError as error:
        text = f"the answer is no {kind.__name__} of this version of everdraft: {error}"
        raise AdminCallError(text) from None


def _quoted(route: str) -> str:
    return quote(route, safe="")
