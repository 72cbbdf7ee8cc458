"""Requests and tokens a minute of each tenant, as token buckets; refusals and headers in OpenAI's form.

Knows tenants and no engine; called on one thread. A bucket holds a minute's allowance and is refilled
steadily. How long an answer will be is not known when it begins, so tokens are taken as they come: a request
may begin while enough are left for its prompt, and what its answer takes beyond them later requests wait for.
Invariant: a tenant gets at most its allowance a minute, but for the bucket's first and the answers under way.
"""

import math
from collections.abc import Callable, Iterable

from serving.api.errors import ApiError
from serving.tenants import Tenant

LIMIT_HEADERS = tuple(
    f"x-ratelimit-{said}-{kind}"
    for kind in ("requests", "tokens")
    for said in ("limit", "remaining", "reset")
)


class TokenBucket:
    """`per_minute` of something. `clock`: monotonic seconds."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level, self._filled_at_s = float(per_minute), clock()

    def left(self) -> float:
        """Negative: more was taken than there was."""
        now_s = self._clock()
        gained = (now_s - self._filled_at_s) * self.per_minute / 60
        self._level, self._filled_at_s = min(float(self.per_minute), self._level + gained), now_s
        return self._level

    def take(self, amount: int) -> None:
        self._level = self.left() - amount

    def wait_s(self, amount: float) -> float:
        """Seconds until there is so much, or until it is full; 0: there is."""
        return max(0.0, min(amount, self.per_minute) - self.left()) * 60 / self.per_minute


class Quota:
    """What one tenant may still ask for."""

    def __init__(self, tenant: Tenant, clock: Callable[[], float]) -> None:
        limits = {"requests": tenant.requests_per_minute, "tokens": tenant.tokens_per_minute}
        self._buckets = {
            kind: TokenBucket(limit, clock) for kind, limit in limits.items() if limit is not None
        }

    def check(self, num_prompt_tokens: int = 1) -> None:
        """Raises ApiError where a request with such a prompt may not begin now; takes nothing."""
        for kind, amount in (("requests", 1), ("tokens", num_prompt_tokens)):
            bucket = self._buckets.get(kind)
            if bucket is not None and (wait_s := bucket.wait_s(amount)):
                raise ApiError(
                    429,
                    f"{kind}_per_minute={bucket.per_minute} of this key's tenant reached; the request was "
                    f"not queued, try again in {math.ceil(wait_s)} s",
                    headers=self.headers() | {"Retry-After": str(math.ceil(wait_s))},
                )

    def begin(self, num_prompt_tokens: int) -> None:
        """A request was admitted."""
        self._take("requests", 1)
        self._take("tokens", num_prompt_tokens)

    def answered(self, num_tokens: int) -> None:
        """So many tokens of an answer came."""
        self._take("tokens", num_tokens)

    def headers(self) -> dict[str, str]:
        """As OpenAI names them; `reset` is when the bucket is full again."""
        found: dict[str, str] = {}
        for kind, bucket in self._buckets.items():
            found[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
            found[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.left())))
            found[f"x-ratelimit-reset-{kind}"] = f"{bucket.wait_s(bucket.per_minute):.3f}s"
        return found

    def _take(self, kind: str, amount: int) -> None:
        if kind in self._buckets:
            self._buckets[kind].take(amount)


class RateLimits:
    """The quotas of all tenants that have limits. `tenants` as one replica sees them."""

    def __init__(self, tenants: Iterable[Tenant], clock: Callable[[], float]) -> None:
        self._quotas = {tenant.name: Quota(tenant, clock) for tenant in tenants}

    def of(self, tenant: Tenant | None) -> Quota | None:
        """None: nothing is limited."""
        return None if tenant is None else self._quotas.get(tenant.name)
