"""When a route opens and closes, without models."""

from learner.routing.policy import RoutePolicy, Standing, has_lost, reason_to_close, routes_to_open

POLICY = RoutePolicy(max_routes=2, min_records=100, idle_s=60.0, losses_before_close=3)


def test_a_route_opens_once_it_has_records_enough_the_richest_first_as_long_as_there_is_room() -> None:
    standings = {
        "open": Standing(is_open=True, num_records=500),
        "poor": Standing(num_records=99),
        "rich": Standing(num_records=200),
        "richest": Standing(num_records=300),
    }
    assert routes_to_open(standings, POLICY) == ["richest"]
    assert routes_to_open({name: standings[name] for name in ("poor", "rich")}, POLICY) == ["rich"]
    full = {"a": Standing(is_open=True), "b": Standing(is_open=True), "rich": Standing(num_records=200)}
    assert routes_to_open(full, POLICY) == []
    assert routes_to_open({"rich": Standing(num_records=200)}, RoutePolicy(0, 1, 1.0, 1)) == []


def test_a_closed_route_must_earn_it_again_with_twice_the_records() -> None:
    standing = Standing(num_records=150).opened(0.0).closed()
    assert standing.num_records == 0
    assert routes_to_open({"a": standing.after_records(199, 1.0)}, POLICY) == []
    assert routes_to_open({"a": standing.after_records(200, 1.0)}, POLICY) == ["a"]
    twice = standing.opened(1.0).closed()
    assert routes_to_open({"a": twice.after_records(399, 1.0)}, POLICY) == []
    assert routes_to_open({"a": twice.after_records(400, 1.0)}, POLICY) == ["a"]


def test_a_route_starves_by_the_age_of_its_last_record() -> None:
    standing = Standing().opened(10.0)
    assert reason_to_close(standing, 69.0, POLICY) == ""
    assert "no record for 60 s" in reason_to_close(standing, 70.0, POLICY)
    assert reason_to_close(standing.after_records(1, 50.0), 70.0, POLICY) == ""


def test_only_losses_in_a_row_count() -> None:
    standing = Standing()
    for own_is_best in (False, False, True, False, False):
        standing = standing.after_decision(own_is_best)
    assert not has_lost(standing, POLICY)
    assert has_lost(standing.after_decision(False), POLICY)
