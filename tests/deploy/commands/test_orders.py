"""The commands of an operator, over Redis and over the Admin API: the same words, the same outcome."""

import getpass
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner, Result

from buffer.controls import Controls
from buffer.records import ServingStatus
from buffer.redis_server import EmbeddedRedis
from buffer.store import AdapterFeed, RecordStore, StreamKey
from deploy.cli import app
from serving.settings import ServingSettings
from tests.buffer.samples import make_manifest, make_record
from tests.support.live_server import LiveServer, live_server
from tests.support.tiny_models import save_tiny_pair

KEY = "sk-admin-of-the-test"


@dataclass(frozen=True)
class Place:
    """How the commands get there, and what they change."""

    options: tuple[str, ...]
    environment: dict[str, str]
    who: str
    server: LiveServer

    @property
    def feed(self) -> AdapterFeed:
        return self.server.feed

    @property
    def store(self) -> RecordStore:
        return self.server.store

    def run(self, *arguments: str) -> Result:
        environment = {"COLUMNS": "200", **self.environment}
        return CliRunner().invoke(app, [*arguments, *self.options], env=environment)

    def say(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.exit_code == 0, done.output
        return done.output


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, redis: EmbeddedRedis) -> Iterator[LiveServer]:
    target, _ = save_tiny_pair(tmp_path_factory.mktemp("pair"))
    settings = ServingSettings(
        compile="off",
        target=target,
        num_slots=1,
        max_seq_len=64,
        num_threads=1,
        admin_key=SecretStr(KEY),
        watch_interval_s=0.02,
        status_interval_s=0.05,
    )
    with live_server(settings, "r0", redis.url) as live:
        yield live


@pytest.fixture(params=["redis", "http"])
def place(request: pytest.FixtureRequest, redis: EmbeddedRedis, server: LiveServer) -> Iterator[Place]:
    if request.param == "redis":
        yield Place(("--redis-url", redis.url), {}, getpass.getuser(), server)
    else:
        digest = hashlib.sha256(KEY.encode()).hexdigest()[:8]
        environment = {"EVERDRAFT_ADMIN_KEY": KEY, "EVERDRAFT__REDIS__URL": "redis://127.0.0.1:1"}
        yield Place(("--url", server.url), environment, digest, server)
    server.feed.change_controls(lambda _: Controls())


@pytest.fixture
def route(place: Place, request: pytest.FixtureRequest) -> str:
    """With two drafts, of which the second serves."""
    name = "".join(char if char.isalnum() else "-" for char in request.node.name)[:60]
    for version in (1, 2):
        place.feed.publish(make_manifest(version, version - 1, route=name), b"weights")
    return name


def test_drafts_are_listed_shown_and_changed(place: Place, route: str) -> None:
    listed = place.say("drafts", "list", "--route", route, "--events", "1")
    assert f"drafts of route {route}" in listed and listed.count("promoted") == 1
    assert "serves                      yes" in place.say("drafts", "show", "2", "--route", route)
    assert "draft 1 serves from now on" in place.say("drafts", "rollback", "--route", route)
    assert "the floor is pinned" in place.say("drafts", "pin", "0", "--route", route, "--reason", "compare")
    assert "serves, pinned" in place.say("drafts", "list", "--route", route)
    assert "draft 1 serves from now on" in place.say("drafts", "unpin", "--route", route)
    reasons = [event.reason for event in place.feed.history(route, 3)]
    assert reasons == ["by an operator", "compare", "by an operator"]


def test_learning_pauses_and_resumes(place: Place, route: str) -> None:
    assert f"learning is paused on {route}" in place.say("learning", "pause", "--route", route)
    assert "whose learning is paused" in place.say("drafts", "list", "--route", route)
    assert "learning is paused\n" in place.say("learning", "pause")
    refused = place.run("learning", "resume", "--route", route)
    assert refused.exit_code == 2 and "without a route" in refused.stderr
    assert "learning goes on" in place.say("learning", "resume")
    assert place.feed.controls() == Controls()


def test_the_share_of_records_is_ordered_shown_and_left_to_the_setting(place: Place) -> None:
    assert "records: by serving.capture_rate" in place.say("capture")
    assert "records: 0 % by order" in place.say("capture", "0")
    assert place.feed.controls() == Controls(capture_rate=0.0)
    assert "records: by serving.capture_rate" in place.say("capture", "--reset")
    for wrong in (("1.5",), ("0.5", "--reset")):
        assert place.run("capture", *wrong).exit_code == 2
    assert place.feed.controls() == Controls()


def test_replicas_drain_by_name_or_all(place: Place) -> None:
    place.feed.report(ServingStatus("r0", 0.0, {}, ()))
    assert "draining: r0" in place.say("drain", "--replica", "r0")
    unknown = place.run("drain", "--replica", "r7")
    assert unknown.exit_code == 2 and "'r0'" in unknown.stderr
    assert "draining" not in place.say("drain", "--replica", "r0", "--undo")
    assert "all replicas drain" in place.say("drain")
    assert "draining" not in place.say("drain", "--undo")
    assert place.feed.controls() == Controls()


def test_records_are_deleted_by_what_is_given(place: Place) -> None:
    revision = place.server.parts.engine.target_revision
    for route in ("default", "sql"):
        records = [make_record(f"cmpl-{number}-0-0-0", expires_at_s=4e9) for number in range(3)]
        place.store.append(StreamKey(revision, route), records)
    assert "2 records deleted" in place.say("records", "purge", "--request-id", "cmpl-0")
    assert "0 records deleted" in place.say("records", "purge", "--older-than", "3600")
    assert "2 records deleted" in place.say("records", "purge", "--route", "sql")
    nothing = place.run("records", "purge")
    assert nothing.exit_code == 2 and "must be given" in nothing.stderr
    assert place.store.size(StreamKey(revision, "default")).num_records == 2
    place.say("records", "purge", "--route", "default")


def test_the_log_says_who_did_what(place: Place) -> None:
    place.say("capture", "0")
    last = place.say("admin", "log", "-n", "1").split()
    assert last[1] == place.who and last[3:] == ["capture.set", "rate=0.0", "allowed"]


def test_status_shows_the_orders(place: Place, redis: EmbeddedRedis) -> None:
    place.say("drain")
    shown = CliRunner().invoke(app, ["status", "--redis-url", redis.url], env={"COLUMNS": "200"})
    assert "all replicas drain" in shown.output


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        (lambda live: live.url, "", "EVERDRAFT_ADMIN_KEY"),
        (lambda live: live.url, "sk-a-wrong-one", "401"),
        (lambda live: f"{live.url}/nowhere", KEY, "404"),
        (lambda live: "http://127.0.0.1:1", KEY, "no answer"),
        (lambda live: "127.0.0.1:8000", KEY, "http://"),
        (lambda live: "ftp://127.0.0.1", KEY, "http://"),
    ],
)
def test_an_endpoint_that_cannot_be_administered_is_a_fault(
    server: LiveServer, url: Callable[[LiveServer], str], key: str, said: str
) -> None:
    options = ["--url", url(server), *(["--admin-key", key] if key else [])]
    for command in (["drafts", "list"], ["drain"], ["records", "purge", "--route", "default"]):
        done = CliRunner().invoke(app, [*command, *options], env={"EVERDRAFT_ADMIN_KEY": ""})
        assert done.exit_code == 2 and said in done.stderr, done.output
        assert not key or key not in done.output
    assert server.feed.controls() in (None, Controls())


def test_a_url_and_a_target_contradict_each_other(server: LiveServer) -> None:
    options = ["--url", server.url, "--admin-key", KEY, "--target-revision", "a"]
    done = CliRunner().invoke(app, ["drain", *options])
    assert done.exit_code == 2 and "--target-revision" in done.stderr
