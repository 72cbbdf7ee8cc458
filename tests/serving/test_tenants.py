"""Tenants in the settings: who may be written down together, and what each replica makes of them."""

from typing import Any

import pytest
from pydantic import ValidationError

from serving.settings import ServingSettings
from serving.tenants import Tenant, digest_of, may_tag

ONE, TWO, THREE = (digest_of(f"key-number-{number}") for number in range(3))


def settings(*tenants: dict[str, Any], **others: Any) -> ServingSettings:
    return ServingSettings.model_validate({"target": "t", "tenants": list(tenants), **others})


def tenant(name: str = "acme", key: str = ONE, **others: Any) -> dict[str, Any]:
    return {"name": name, "keys": [key], **others}


@pytest.mark.parametrize(
    ("tenants", "others", "said"),
    [
        ([tenant(), tenant(key=TWO)], {}, "two tenants are called 'acme'"),
        ([tenant(), tenant("globex")], {}, "is given twice"),
        ([tenant() | {"keys": [ONE, ONE]}], {}, "is given twice"),
        ([tenant() | {"keys": []}], {}, "at least 1 item"),
        ([tenant(key="key-number-0")], {}, "pattern"),
        ([tenant("a b")], {}, "pattern"),
        ([tenant(routes=["a b"])], {}, "route='a b'"),
        ([tenant(isolated=True)], {}, "has no routes"),
        ([tenant(isolated=True, routes=[])], {}, "has no routes"),
        ([tenant(isolated=True, routes=["default"])], {}, "owns the route 'default'"),
        ([tenant(isolated=True, routes=["auto-1"])], {}, "owns the route 'auto-1'"),
        (
            [tenant(isolated=True, routes=["x"]), tenant("globex", TWO, routes=["x", "y"])],
            {},
            "route 'x' is of the isolated tenant 'acme' and of 'globex'",
        ),
        ([tenant()], {"api_keys": ["key-number-0"]}, "the tenant 'acme' is in api_keys"),
        ([tenant()], {"admin_key": "key-number-0"}, "the tenant 'acme' is in admin_key"),
        (
            [tenant(isolated=True, routes=["x"])],
            {"engine": "vllm"},
            "the tenant 'acme' is isolated, and engine='vllm' has one draft",
        ),
        ([tenant(requests_per_minute=0)], {}, "requests_per_minute"),
        ([tenant(capture="some")], {}, "capture"),
        ([tenant(limit=3)], {}, "limit"),
    ],
)
def test_what_would_not_hold_is_refused_by_name(
    tenants: list[dict[str, Any]], others: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        settings(*tenants, **others)
    assert said in str(refused.value)
    assert "key-number" not in str(refused.value), "keys are never shown"


def test_isolated_tenants_that_are_not_captured_may_use_vllm() -> None:
    assert settings(tenant(isolated=True, routes=["x"], capture="off"), engine="vllm").tenants


def test_tenants_that_are_not_isolated_may_share_routes() -> None:
    both = settings(tenant(routes=["x"]), tenant("globex", TWO, routes=["x"]))
    assert both.isolated_routes == frozenset()


def test_a_key_may_tag_its_own_routes_and_nobody_elses_isolated_ones() -> None:
    found = settings(
        tenant(isolated=True, routes=["x", "y"]),
        tenant("globex", TWO, routes=["z"]),
        tenant("initech", THREE),
    )
    isolated = found.isolated_routes
    assert isolated == {"x", "y"}
    allowed = {
        holder and holder.name: {
            route for route in ("x", "z", "w", "default") if may_tag(holder, route, isolated)
        }
        for holder in (*found.tenants, None)
    }
    assert allowed == {
        "acme": {"x"},
        "globex": {"z"},
        "initech": {"z", "w", "default"},
        None: {"z", "w", "default"},
    }


def test_a_request_without_a_tag_is_of_an_isolated_tenants_first_route() -> None:
    isolated, other = settings(
        tenant(isolated=True, routes=["x", "y"]), tenant("b", TWO, routes=["z"])
    ).tenants
    assert (isolated.default_route, isolated.cache_salt) == ("x", "acme")
    assert (other.default_route, other.cache_salt) == (None, None)


def test_replicas_share_a_tenants_limits_rounded_up() -> None:
    whole = Tenant(name="a", keys=(ONE,), requests_per_minute=10, max_concurrent=1)
    share = whole.share(3)
    assert (share.requests_per_minute, share.tokens_per_minute, share.max_concurrent) == (4, None, 1)
    assert whole.share(1) == whole
