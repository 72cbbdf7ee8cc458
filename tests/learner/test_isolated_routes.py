"""What an isolated tenant's requests taught is served to that tenant alone, and reaches nobody else.

The witness is a second learner that never saw those records: the drafts of all others are the same, bit for
bit.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from buffer.codec import encode
from buffer.store import StreamKey
from tests.support.routes_testbed import Records, RoutesTestbed, two_topics, untagged

OWN = "acme"


@pytest.fixture(scope="module")
def traffic() -> dict[str, Records]:
    return two_topics()


def of_acme(records: Records, *, isolated: bool = True) -> Records:
    return [
        replace(
            record,
            route=OWN,
            isolated=isolated,
            record_id=f"own-{record.record_id}",
            request_id=f"own-{record.request_id}",
        )
        for record in records
    ]


def what_others_get(testbed: RoutesTestbed) -> tuple[object, ...]:
    """Every version of `default`'s draft, and how prompts without a tag find their route."""
    weights = [testbed.feed.weights("default", one.draft_version) for one in testbed.feed.versions("default")]
    table = testbed.feed.route_table()
    assert weights and table is not None
    return (*weights, encode(table))


def beside_acme(folder: Path, traffic: dict[str, Records], own: Records, isolated: bool) -> RoutesTestbed:
    """A learner with no memory for routes, so that all that may train `default`'s draft does."""
    testbed = RoutesTestbed(folder, isolated_routes=[OWN] if isolated else [])
    testbed.free_bytes = 0.0
    others = {topic: records[:100] for topic, records in untagged(traffic).items()}
    testbed.live({**others, OWN: own[:100]} if own else others)
    return testbed


def test_others_get_what_they_would_get_without_the_isolated_tenant(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    without = beside_acme(tmp_path / "without", traffic, [], isolated=True)
    own = of_acme(traffic["law"])
    beside = beside_acme(tmp_path / "beside", traffic, own, isolated=True)
    assert what_others_get(beside) == what_others_get(without)
    assert beside.store.size(StreamKey("target-1", OWN)).num_pending == 0, "they were read all the same"


def test_the_witness_sees_a_tenant_that_is_not_isolated(tmp_path: Path, traffic: dict[str, Records]) -> None:
    """The control of the test above."""
    without = beside_acme(tmp_path / "without", traffic, [], isolated=False)
    own = of_acme(traffic["law"], isolated=False)
    beside = beside_acme(tmp_path / "beside", traffic, own, isolated=False)
    assert what_others_get(beside) != what_others_get(without)


def test_a_record_that_says_so_trains_no_other_draft_whatever_the_settings(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    """As with `everdraft learn`, whose settings may have no tenants."""
    testbed = RoutesTestbed(tmp_path)
    testbed.free_bytes = 0.0
    testbed.live({OWN: of_acme(traffic["law"])[:100]})
    assert testbed.learner.snapshot()["routes"]["default"]["num_steps"] == 0
    assert testbed.feed.latest("default") is None


def test_an_isolated_route_gets_a_draft_that_its_records_trained(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    testbed = RoutesTestbed(tmp_path, isolated_routes=[OWN])
    testbed.live({OWN: of_acme(traffic["law"])[:170]})
    assert testbed.open_routes() == {OWN}
    assert testbed.draft(OWN).draft_version > 0
    assert testbed.learner.snapshot()["routes"]["default"]["num_steps"] == 0
    testbed.clock.now_s += 601.0
    testbed.learn()
    assert testbed.open_routes() == set()
    testbed.live({OWN: of_acme(traffic["law"])[170:200]})
    assert testbed.learner.snapshot()["routes"]["default"]["num_steps"] == 0, "nor when it is closed"


@pytest.mark.parametrize("told", [True, False])
def test_no_other_route_starts_from_an_isolated_draft(
    tmp_path: Path, traffic: dict[str, Records], told: bool
) -> None:
    """Without isolation it would be the best there is: `test_a_new_route_starts_from_the_best_draft_there_is`
    is the control."""
    testbed = RoutesTestbed(tmp_path, isolated_routes=[OWN] if told else [])
    testbed.live({OWN: of_acme(traffic["law"])[:170], "verse": traffic["verse"][:170]})
    assert testbed.draft(OWN).draft_version > 0 or not told
    testbed.live({"law": traffic["law"][:75]})
    [opened] = testbed.events("law", "opened")
    assert f"of {OWN}" not in opened.reason
    assert f"{OWN}/" not in " ".join(testbed.learner.snapshot()["routes"]["law"]["acceptance_by_draft"])


def test_centroids_from_before_a_route_was_isolated_are_dropped(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    testbed = RoutesTestbed(tmp_path)
    testbed.live({topic: records[:170] for topic, records in traffic.items()})
    before = testbed.feed.route_table()
    assert before is not None and "law" in before.routes
    testbed.isolated_routes = ["law"]
    testbed.learner = testbed.build()
    testbed.learner.run_cycle()
    after = testbed.feed.route_table()
    assert after is not None and "law" not in after.routes
