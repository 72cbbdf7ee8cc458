"""Requests and tokens a minute, under a clock that is set by hand."""

import pytest

from serving.api.errors import ApiError
from serving.api.rate_limits import Quota, RateLimits, TokenBucket
from serving.tenants import Tenant, digest_of


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def tenant(requests: int | None = None, tokens: int | None = None) -> Tenant:
    return Tenant(
        name="acme",
        keys=(digest_of("key-number-1"),),
        requests_per_minute=requests,
        tokens_per_minute=tokens,
    )


def test_a_bucket_holds_a_minutes_allowance_and_is_refilled_steadily() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.take(60)
    assert (bucket.left(), bucket.wait_s(1), bucket.wait_s(60)) == (0, 1, 60)
    clock.now_s += 15
    assert (bucket.left(), bucket.wait_s(10), bucket.wait_s(20)) == (15, 0, 5)
    clock.now_s += 1000
    assert bucket.left() == 60


def test_what_was_taken_beyond_it_is_made_up_for() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.take(90)
    assert (bucket.left(), bucket.wait_s(1)) == (-30, 31)


def test_more_than_it_can_hold_waits_until_it_is_full() -> None:
    bucket = TokenBucket(60, Clock())
    assert bucket.wait_s(1000) == 0
    bucket.take(1)
    assert bucket.wait_s(1000) == 1


def test_over_its_requests_a_tenant_is_refused_until_the_time_it_is_told() -> None:
    clock = Clock()
    quota = Quota(tenant(requests=6), clock)
    for _ in range(6):
        quota.check()
        quota.begin(100)
    with pytest.raises(ApiError) as refused:
        quota.check()
    assert refused.value.status == 429
    assert "requests_per_minute=6" in str(refused.value)
    assert refused.value.headers == {
        "Retry-After": "10",
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60.000s",
    }
    clock.now_s += 10
    quota.check()


def test_prompts_and_answers_take_tokens() -> None:
    clock = Clock()
    quota = Quota(tenant(tokens=600), clock)
    quota.check(400)
    quota.begin(400)
    with pytest.raises(ApiError, match="tokens_per_minute=600"):
        quota.check(300)
    quota.check(200)
    quota.answered(250)
    with pytest.raises(ApiError) as refused:
        quota.check()
    assert refused.value.headers["Retry-After"] == "6"
    assert refused.value.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now_s += 6
    quota.check()


def test_over_a_long_time_a_tenant_gets_its_allowance_and_no_more() -> None:
    """Requests of 10 tokens and answers of 50, as fast as they are let in, for an hour."""
    clock = Clock()
    quota, num_tokens = Quota(tenant(tokens=600), clock), 0
    for _ in range(3600):
        clock.now_s += 1
        try:
            quota.check(10)
        except ApiError:
            continue
        quota.begin(10)
        quota.answered(50)
        num_tokens += 60
    assert 60 * 600 <= num_tokens <= 61 * 600 + 60


def test_who_has_no_limits_is_told_of_none_and_never_refused() -> None:
    quota = Quota(tenant(), Clock())
    for _ in range(1000):
        quota.check(10**9)
        quota.begin(10**9)
    assert quota.headers() == {}
    assert RateLimits([tenant()], Clock()).of(None) is None
