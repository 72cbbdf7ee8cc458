"""Who may do what: client keys open the API, one admin key opens what changes weights or learning.

Keeps sha256 digests only and compares all of them in constant time. Knows no HTTP framework.
"""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Literal

Realm = Literal["open", "client", "admin"]

_CLIENT_PREFIXES = ("/v1", "/tokenize", "/detokenize")
_ADMIN_PREFIXES = ("/admin",)


def realm_of(path: str) -> Realm:
    """Which key a path asks for. `/health`, `/ready`, `/version` and `/metrics` are open."""
    if _is_under(path, _ADMIN_PREFIXES):
        return "admin"
    return "client" if _is_under(path, _CLIENT_PREFIXES) else "open"


def _is_under(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


class KeyRing:
    """Answers whether an Authorization header opens a realm."""

    def __init__(self, api_keys: Sequence[str] = (), admin_key: str | None = None) -> None:
        self._clients = tuple(_digest(key) for key in api_keys)
        self._admin = () if admin_key is None else (_digest(admin_key),)

    def opens(self, realm: Realm, authorization: str | None) -> bool:
        """Without client keys the API is open; without an admin key `/admin` is shut."""
        if realm == "open" or (realm == "client" and not self._clients):
            return True
        given = _digest(_bearer(authorization))
        known = self._admin if realm == "admin" else self._clients
        matches = [secrets.compare_digest(given, digest) for digest in known]
        return any(matches)


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()
