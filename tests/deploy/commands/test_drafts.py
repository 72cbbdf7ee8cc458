"""`everdraft drafts` and `status` against a real Redis server, in this process."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from buffer.records import AdapterEvent, AdapterManifest, DrafterCounts, ServingStatus
from buffer.redis_server import EmbeddedRedis
from buffer.store import AdapterFeed
from deploy.cli import app
from deploy.running import own_note, write_note
from deploy.wiring import open_feed

TARGET = "t" * 64


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def route(server: EmbeddedRedis, request: pytest.FixtureRequest) -> Iterator[str]:
    """A route with two drafts, of which the second serves."""
    name = str(request.node.name).replace("[", "-").rstrip("]")[:60]
    feed = open_feed(server.url, TARGET)
    for version in (1, 2):
        feed.publish(manifest(name, version), b"weights")
    yield name
    feed.close()


@pytest.fixture
def feed(server: EmbeddedRedis) -> Iterator[AdapterFeed]:
    feed = open_feed(server.url, TARGET)
    yield feed
    feed.close()


def manifest(route: str, version: int) -> AdapterManifest:
    return AdapterManifest(
        route=route,
        draft_version=version,
        parent_version=version - 1,
        draft_id="models/draft",
        draft_revision="d" * 64,
        target_revision=TARGET,
        rank=8,
        alpha=16.0,
        target_modules=("q_proj", "v_proj"),
        adapter_config_json="{}",
        sha256="s" * 64,
        num_bytes=123_456,
        created_at_s=time.time() - 90,
        evidence={"acceptance_candidate": 0.5 + version / 10, "acceptance_incumbent": 0.5},
        num_records_seen=100 * version,
    )


def run(server: EmbeddedRedis, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--redis-url", server.url], env={"COLUMNS": "140"})


def test_list_shows_every_draft_and_which_one_serves(server: EmbeddedRedis, route: str) -> None:
    shown = run(server, "drafts", "list", "--route", route)
    assert shown.exit_code == 0, shown.output
    lines = [line.strip() for line in shown.output.splitlines()]
    floor, first, second = (next(line for line in lines if line.startswith(start)) for start in "012")
    assert "the floor" in floor
    assert "serves" in second and "serves" not in floor + first
    assert "0.700" in second and "0.500" in second and "123.5 kB" in second
    assert sum("promoted" in line for line in lines) == 2


def test_show_tells_what_a_draft_fits_and_why_it_was_let_in(server: EmbeddedRedis, route: str) -> None:
    shown = run(server, "drafts", "show", "1", "--route", route)
    assert shown.exit_code == 0, shown.output
    assert "q_proj, v_proj" in shown.output and TARGET in shown.output
    assert "acceptance_candidate" in shown.output


def test_list_gives_every_routes_decisions_with_their_reasons(
    server: EmbeddedRedis, route: str, feed: AdapterFeed
) -> None:
    reasons = {
        "refused": "lower bound of the gain -0.01, not over 0.0",
        "rejected_by_replica": "r0: bytes were corrupted",
    }
    for kind, reason in reasons.items():
        feed.add_event(AdapterEvent(kind, route, 3, reason, time.time()))
    feed.rollback(route, "worse on live traffic")
    feed.publish(manifest(f"{route}-b", 1), b"weights")
    shown = run(server, "drafts", "list").output
    assert f"drafts of route {route}" in shown and f"drafts of route {route}-b" in shown
    for reason in (*reasons.values(), "worse on live traffic", "judged against version 0"):
        assert reason in shown
    assert "rejected by replica" in shown


def test_list_of_a_route_that_never_had_a_draft_names_those_that_had(
    server: EmbeddedRedis, route: str
) -> None:
    shown = run(server, "drafts", "list", "--route", "nowhere").output
    assert "no draft was ever judged" in shown and route in shown


def test_show_tells_what_became_of_a_draft(server: EmbeddedRedis, route: str, feed: AdapterFeed) -> None:
    feed.add_event(AdapterEvent("rejected_by_replica", route, 2, "r0: bytes were corrupted", time.time()))
    shown = run(server, "drafts", "show", "2", "--route", route).output
    assert "r0: bytes were corrupted" in shown and "judged against version 1" in shown
    assert "judged against version 0" not in shown
    assert "serves                      yes" in shown
    feed.rollback(route, "worse on live traffic")
    shown = run(server, "drafts", "show", "2", "--route", route).output
    assert "worse on live traffic" in shown and "serves                      no" in shown


def test_full_weights_are_called_so(server: EmbeddedRedis, route: str, feed: AdapterFeed) -> None:
    feed.publish(replace(manifest(route, 3), rank=0, alpha=0.0, target_modules=()), b"weights")
    shown = run(server, "drafts", "show", "3", "--route", route).output
    assert "full weights, 123.5 kB" in shown and "target_modules              all" in shown


def test_rollback_goes_to_the_parent_and_leaves_its_reason(
    server: EmbeddedRedis, route: str, feed: AdapterFeed
) -> None:
    done = run(server, "drafts", "rollback", "--route", route, "--reason", "worse on friday")
    assert done.exit_code == 0, done.output
    assert "draft 1 serves from now on" in done.output
    latest = feed.latest(route)
    assert latest is not None and latest.draft_version == 1
    assert feed.history(route)[-1].reason == "worse on friday"


def test_rollback_to_the_floor(server: EmbeddedRedis, route: str, feed: AdapterFeed) -> None:
    done = run(server, "drafts", "rollback", "--to", "0", "--route", route)
    assert done.exit_code == 0 and "the floor serves" in done.output
    assert feed.latest(route) is None


def test_a_pin_holds_until_it_is_taken_away(server: EmbeddedRedis, route: str, feed: AdapterFeed) -> None:
    assert run(server, "drafts", "pin", "1", "--route", route).exit_code == 0
    feed.publish(manifest(route, 3), b"weights")
    assert "serves, pinned" in run(server, "drafts", "list", "--route", route).output
    latest = feed.latest(route)
    assert latest is not None and latest.draft_version == 1
    unpinned = run(server, "drafts", "unpin", "--route", route)
    assert "draft 3 serves from now on" in unpinned.output


def test_an_unknown_version_is_a_fault_and_changes_nothing(
    server: EmbeddedRedis, route: str, feed: AdapterFeed
) -> None:
    done = run(server, "drafts", "rollback", "--to", "9", "--route", route)
    assert done.exit_code == 2
    assert "9" in done.stderr and "error:" in done.stderr
    latest = feed.latest(route)
    assert latest is not None and latest.draft_version == 2


def test_status_sums_the_counters_of_all_replicas(server: EmbeddedRedis, feed: AdapterFeed) -> None:
    drafted, copied = (
        DrafterCounts(drafter_id, "default", version, 10, 40, 40, num_accepted, 10 + num_accepted)
        for drafter_id, version, num_accepted in (("draft", 3, 24), ("ngram", None, 8))
    )
    for name in ("a", "b"):
        feed.report(
            ServingStatus(
                replica_id=name,
                at_s=time.time(),
                serving_versions={"default": 3},
                counts=(copied, drafted),
            )
        )
    shown = run(server, "status")
    assert shown.exit_code == 0, shown.output
    rows = [line.split() for line in shown.output.splitlines() if line.startswith("default")]
    assert rows == [
        ["default", "3", "60", "%", "3.40", "68"],
        ["default", "copied", "20", "%", "1.80", "36"],
    ]
    replicas = json.loads(run(server, "status", "--json").output)["replicas"]
    assert [replica["replica_id"] for replica in replicas] == ["a", "b"]
    names = [[each["drafter_id"], each["route"], each["draft_version"]] for each in replicas[0]["counts"]]
    assert names == [["ngram", "default", None], ["draft", "default", 3]]


@pytest.fixture(scope="module")
def shared() -> Iterator[EmbeddedRedis]:
    """A Redis on which two targets have a replica and a draft each."""
    with EmbeddedRedis() as server:
        for target in ("a" * 64, "b" * 64):
            feed = open_feed(server.url, target)
            feed.publish(replace(manifest("default", 1), target_revision=target), b"weights")
            feed.report(ServingStatus(f"replica-{target[0]}", time.time(), {"default": 1}, ()))
            feed.close()
        yield server


def test_status_shows_each_target_by_itself(shared: EmbeddedRedis) -> None:
    lines = run(shared, "status").output.splitlines()
    starts = [line.split(",")[0] for line in lines if line.startswith(("target ", "replica "))]
    assert starts == ["target " + "a" * 16, "replica replica-a", "target " + "b" * 16, "replica replica-b"]
    found = json.loads(run(shared, "status", "--json", "--target-revision", "b").output)
    assert [replica["target_revision"] for replica in found["replicas"]] == ["b" * 64]
    assert found["routes"] == {"b" * 64: {"default": 1}}


def test_a_command_on_drafts_asks_which_target_is_meant(shared: EmbeddedRedis) -> None:
    unclear = run(shared, "drafts", "rollback")
    assert unclear.exit_code == 2
    assert "--target-revision" in unclear.stderr and "a" * 16 in unclear.stderr and "b" * 16 in unclear.stderr
    unknown = run(shared, "drafts", "rollback", "--target-revision", "c")
    assert unknown.exit_code == 2 and "a" * 16 in unknown.stderr
    assert run(shared, "drafts", "rollback", "--target-revision", "bb").exit_code == 0
    found = json.loads(run(shared, "status", "--json").output)
    assert found["routes"] == {"a" * 64: {"default": 1}, "b" * 64: {"default": 0}}


def test_the_everdraft_that_runs_with_the_state_folder_says_which_target_is_meant(
    shared: EmbeddedRedis, tmp_path: Path
) -> None:
    note = own_note(
        url="http://127.0.0.1:1",
        redis_url=shared.url,
        tracking_uri="",
        target="a",
        draft="",
        target_revision="a" * 64,
        learns=False,
    )
    write_note(tmp_path, note)
    shown = run(shared, "drafts", "show", "1", "--state-dir", str(tmp_path))
    assert shown.exit_code == 0 and "a" * 64 in shown.output


def test_a_redis_that_does_not_answer_is_a_fault() -> None:
    done = CliRunner().invoke(app, ["drafts", "list", "--redis-url", "redis://127.0.0.1:1/0"])
    assert done.exit_code == 2
    assert "127.0.0.1:1" in done.stderr


def test_an_address_that_is_none_is_a_fault() -> None:
    done = CliRunner().invoke(app, ["status", "--redis-url", "http://127.0.0.1"])
    assert done.exit_code == 2
    assert "redis.url" in done.stderr


def test_without_a_run_and_without_an_address_the_way_out_is_told(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["drafts", "list", "--state-dir", str(tmp_path)])
    assert done.exit_code == 2
    assert "--redis-url" in done.stderr
