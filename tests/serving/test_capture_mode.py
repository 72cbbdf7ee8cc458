"""The mode in which a request is captured: the strictest that anybody with a say asks for."""

from itertools import product
from typing import get_args

import pytest
from pydantic import ValidationError

from serving.capture_mode import CaptureMode, CapturePolicy
from serving.settings import ServingSettings

MODES: tuple[CaptureMode, ...] = get_args(CaptureMode)
STRICTNESS = {"off": 0, "memory": 1, "replay": 2}


@pytest.mark.parametrize("store", [None, True, False])
@pytest.mark.parametrize("tenant", [None, *MODES])
def test_the_strictest_holds_and_store_false_always_wins(
    store: bool | None, tenant: CaptureMode | None
) -> None:
    for service, of_route, route in product(MODES, (None, *MODES), (None, "sql", "chat")):
        policy = CapturePolicy(service, {} if of_route is None else {"sql": of_route})
        said = [service, tenant, of_route if route == "sql" else None]
        expected = min((mode for mode in said if mode), key=lambda mode: STRICTNESS[mode])
        found = policy.mode(store=store, route=route, tenant=tenant)
        assert found == ("off" if store is False else expected)


def test_the_modes_that_can_come_up_say_which_stores_are_needed() -> None:
    def modes(**chosen: object) -> frozenset[CaptureMode]:
        return ServingSettings(target="t", draft="d", **chosen).capture_modes

    assert modes() == {"replay"}
    assert modes(capture="memory") == {"memory"}
    assert modes(capture_by_route={"health": "memory", "sql": "off"}) == {"replay", "memory"}
    assert modes(capture="memory", capture_by_route={"sql": "replay"}) == {"memory"}
    assert modes(capture="off", capture_by_route={"sql": "replay"}) == set()
    assert not ServingSettings(target="t", draft="d", capture="off").records


def test_records_of_a_mode_live_as_long_as_it_says() -> None:
    settings = ServingSettings(target="t", memory_ttl_s=60.0, record_ttl_s=600.0)
    assert (settings.record_bounds("memory").max_age_s, settings.record_bounds().max_age_s) == (60.0, 600.0)
    assert (settings.ttl_s("memory"), settings.ttl_s("replay")) == (60.0, 600.0)


@pytest.mark.parametrize(
    "chosen",
    [{"capture": "disk"}, {"capture_by_route": {"sql": "some"}}, {"capture_by_route": {"a b": "off"}}],
)
def test_what_names_no_mode_or_no_route_is_refused(chosen: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="capture"):
        ServingSettings.model_validate({"target": "t"} | chosen)
