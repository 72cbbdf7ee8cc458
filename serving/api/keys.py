"""API keys: client keys open the API, one admin key opens what changes weights or learning.

A client key may be a tenant's. Keeps sha256 digests only and compares all of them in constant time. Knows no
HTTP framework. Invariant: a request without a key is never allowed where a key is needed.
"""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Literal

from serving.tenants import DIGEST_PREFIX, Tenant

Realm = Literal["open", "client", "admin"]

MIN_KEY_CHARS = 8
_SHOWN_DIGITS = 8

_CLIENT_PREFIXES = ("/v1", "/tokenize", "/detokenize", "/tokenizer_info")
_ADMIN_PREFIXES = ("/admin",)


def check_key(key: str) -> None:
    """Raises ValueError for a key that is unsafe or that no header could carry; never shows the key."""
    if not key:
        raise ValueError("is empty, which would guard nothing")
    if key != key.strip():
        raise ValueError("begins or ends with whitespace, which no client sends")
    if len(key) < MIN_KEY_CHARS:
        raise ValueError(
            f"has {len(key)} characters, which can be guessed; it must have {MIN_KEY_CHARS} or more"
        )
    if not all("!" <= char <= "~" for char in key):
        raise ValueError("holds whitespace or characters outside ASCII, which a header cannot carry")


def realm_of(path: str) -> Realm:
    """Which key a path asks for. `/health`, `/ready`, `/version` and `/metrics` are open."""
    if _is_under(path, _ADMIN_PREFIXES):
        return "admin"
    return "client" if _is_under(path, _CLIENT_PREFIXES) else "open"


def _is_under(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


class KeyRing:
    """Answers whether an Authorization header opens a realm, and whose it is. Raises ValueError for an
    invalid key."""

    def __init__(
        self, api_keys: Sequence[str] = (), admin_key: str | None = None, tenants: Sequence[Tenant] = ()
    ) -> None:
        for key in (*api_keys, *(() if admin_key is None else (admin_key,))):
            check_key(key)
        self._tenants = tuple(
            (bytes.fromhex(digest.removeprefix(DIGEST_PREFIX)), tenant)
            for tenant in tenants
            for digest in tenant.keys
        )
        self._clients = (*map(_digest, api_keys), *(digest for digest, _ in self._tenants))
        self._admin = () if admin_key is None else (_digest(admin_key),)

    def opens(self, realm: Realm, authorization: str | None) -> bool:
        """Without client keys the API is open; without an admin key `/admin` is shut."""
        if not self.asks(realm):
            return True
        given = _bearer(authorization)
        if not given:
            return False
        accepted = self._admin if realm == "admin" else self._clients
        matches = [secrets.compare_digest(_digest(given), digest) for digest in accepted]
        return any(matches)

    def tenant_of(self, authorization: str | None) -> Tenant | None:
        """Whose key it is; None: of no tenant, or none at all."""
        given = _bearer(authorization)
        if not given or not self._tenants:
            return None
        digest = _digest(given)
        matches = [tenant for known, tenant in self._tenants if secrets.compare_digest(digest, known)]
        return matches[0] if matches else None

    def asks(self, realm: Realm) -> bool:
        """Whether a key is needed in this realm."""
        return realm == "admin" or (realm == "client" and bool(self._clients))


def shown_digest(authorization: str | None) -> str:
    """The first digits of the given key's digest, by which it may be named; `no key` if there is none."""
    given = _bearer(authorization)
    return _digest(given).hex()[:_SHOWN_DIGITS] if given else "no key"


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()
