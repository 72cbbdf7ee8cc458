"""Tenants: who holds which keys, which routes a key may tag, and how much it may ask for.

Plain data and the checks among several tenants; knows no HTTP and no engine. A key is known by its sha256
digest alone. Invariant: a route of an isolated tenant is that tenant's alone.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from buffer.names import AUTO_PREFIX, DEFAULT_ROUTE
from buffer.route_table import check_route_name
from serving.capture_mode import CaptureMode

DIGEST_PREFIX = "sha256:"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Limit = Annotated[int, Field(ge=1)]


def digest_of(key: str) -> str:
    """How a key is written in the settings: `sha256:` and 64 hexadecimal digits."""
    return DIGEST_PREFIX + hashlib.sha256(key.encode()).hexdigest()


class Tenant(BaseModel):
    """One holder of keys. Limits left out are none; keys of `serving.api_keys` are of no tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Name
    """For metrics and messages: 1 to 64 letters, digits, `_`, `.` or `-`."""
    keys: Annotated[tuple[Digest, ...], Field(min_length=1)]
    """Digests of the tenant's keys, `sha256:` and 64 digits; `everdraft key new` makes both."""
    routes: tuple[str, ...] | None = None
    """Routes that its keys may tag; a tag of any other is refused with 403. None: all but those of isolated
    tenants."""
    isolated: bool = False
    """Its records train drafts of its own routes alone, which serve nobody else, and it shares no prefix
    cache. Its untagged requests are of the first of its routes; until that has a draft of its own,
    `default`'s serves it."""
    requests_per_minute: Limit | None = None
    """API requests; over it 429. Of the whole service: each replica allows its share."""
    tokens_per_minute: Limit | None = None
    """Tokens of prompts and of answers; over it 429 until they are made up for. Shared like the requests."""
    max_concurrent: Limit | None = None
    """Generations that may run or wait at once; over it 429. Shared like the requests."""
    capture: CaptureMode | None = None
    """`off`: its requests are not recorded. `memory`: nothing of them reaches a disk. `replay`, or None: as
    the service does."""

    @field_validator("routes")
    @classmethod
    def _are_names(cls, routes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for route in routes or ():
            check_route_name(route)
        return routes

    @model_validator(mode="after")
    def _isolated_routes_are_its_own(self) -> Self:
        if not self.isolated:
            return self
        if not self.routes:
            raise ValueError(f"tenant {self.name!r} is isolated and has no routes: no draft could be its own")
        for route in self.routes:
            if route == DEFAULT_ROUTE or route.startswith(AUTO_PREFIX):
                raise ValueError(
                    f"tenant {self.name!r} is isolated and owns the route {route!r}, which requests of "
                    "others without a tag may be of; give it a route of another name"
                )
        return self

    @property
    def default_route(self) -> str | None:
        """Of a request without a tag; None: its prompt decides."""
        return self.routes[0] if self.isolated and self.routes else None

    @property
    def cache_salt(self) -> str | None:
        """Keeps its prefixes apart from those of others; None: they are shared."""
        return self.name if self.isolated else None

    def share(self, num_replicas: int) -> "Tenant":
        """As one of so many replicas sees it: limits are divided, rounded up."""
        limits = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
        asked = {name: limit for name in limits if (limit := getattr(self, name)) is not None}
        return self.model_copy(update={name: -(-limit // num_replicas) for name, limit in asked.items()})


def isolated_routes(tenants: Iterable[Tenant]) -> frozenset[str]:
    """Routes that one tenant alone may use."""
    return frozenset(route for tenant in tenants if tenant.isolated for route in tenant.routes or ())


def may_tag(tenant: Tenant | None, route: str, isolated: frozenset[str]) -> bool:
    """Whether a key of this tenant (None: of none) may tag the route; `isolated`: routes of isolated
    tenants."""
    if tenant is None or tenant.routes is None:
        return route not in isolated
    return route in tenant.routes


def check_together(tenants: Sequence[Tenant]) -> None:
    """Raises ValueError for tenants that share a name, a key, or a route that is one's alone."""
    if twice := _twice(tenant.name for tenant in tenants):
        raise ValueError(f"two tenants are called {twice!r}; give each a name of its own")
    if twice := _twice(digest for tenant in tenants for digest in tenant.keys):
        raise ValueError(f"the key {twice[:15]}… is given twice; a key belongs to one tenant")
    for owner in tenants:
        for other in tenants:
            shared = {*isolated_routes([owner])} & {*(other.routes or ())}
            if owner is not other and shared:
                raise ValueError(
                    f"the route {min(shared)!r} is of the isolated tenant {owner.name!r} and of "
                    f"{other.name!r}, whose records would meet there; take it from one of them"
                )


def _twice(values: Iterable[str]) -> str | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)
