"""Operators' orders: the rules, and their way through JSON."""

import pytest

from buffer.controls import Controls
from buffer.errors import CorruptRecordError, OrderRefusedError


def test_nothing_is_ordered_at_first() -> None:
    controls = Controls()
    assert not controls.pauses("default") and not controls.drains("r0")
    assert controls.capture_rate is None


def test_learning_pauses_for_a_route_or_for_all() -> None:
    one = Controls().with_learning_paused("sql")
    assert one.pauses("sql") and not one.pauses("default")
    every = one.with_learning_paused(None)
    assert every.pauses("default") and every.pauses("chat")
    assert every.with_learning_resumed(None) == Controls()
    assert one.with_learning_paused("chat").with_learning_resumed("sql").paused_routes == ("chat",)


def test_drains_name_a_replica_or_all() -> None:
    one = Controls().with_drain("r1")
    assert one.drains("r1") and not one.drains("r0")
    assert one.with_drain(None).drains("a replica that starts later")
    assert one.with_drain(None).without_drain(None) == one.without_drain("r1") == Controls()


def test_an_exception_from_an_order_for_all_is_refused() -> None:
    with pytest.raises(OrderRefusedError, match="without a route"):
        Controls().with_learning_paused(None).with_learning_resumed("sql")
    with pytest.raises(OrderRefusedError, match="without a replica"):
        Controls().with_drain(None).without_drain("r0")


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="capture_rate"):
        Controls().with_capture_rate(rate)


def test_orders_come_back_from_json() -> None:
    orders = Controls().with_learning_paused("sql").with_drain("r1").with_capture_rate(0.25)
    assert Controls.from_json(orders.to_json().encode()) == orders
    assert Controls.from_json("{}") == Controls()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", '{"capture_rate": 2}', '{"draining_replicas": "r0"}', '{"an_order_of_later": 1}', "\xff"],
)
def test_orders_that_cannot_be_read_are_an_error(text: str) -> None:
    with pytest.raises(CorruptRecordError, match="stay in force"):
        Controls.from_json(text)
