"""The Admin API of two replicas on one real Redis: whichever is asked, both follow."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from buffer.audit import REFUSED_BY_KEY, AuditLine, Caller
from buffer.memory_store import MemoryAdapterFeed
from buffer.records import AdapterEvent
from buffer.redis_server import EmbeddedRedis
from buffer.store import StreamKey
from serving.api.refused_calls import RefusedCalls
from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server
from tests.support.tiny_adapters import tiny_adapter

ADMIN, CLIENT = {"Authorization": "Bearer sk-admin"}, {"Authorization": "Bearer sk-client"}
DIGEST = hashlib.sha256(b"sk-admin").hexdigest()[:8]

Replicas = tuple[LiveServer, LiveServer]


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with EmbeddedRedis() as server:
        yield server.url


@pytest.fixture(scope="module")
def settings(tiny_pair: tuple[str, str]) -> ServingSettings:
    return ServingSettings(
        compile="off",
        target=tiny_pair[0],
        draft=tiny_pair[1],
        model_name="tiny",
        num_slots=2,
        max_seq_len=256,
        num_draft_tokens=3,
        num_threads=1,
        max_route_drafts=0,
        watch_interval_s=0.02,
        status_interval_s=0.05,
        api_keys=(SecretStr("sk-client"),),
        admin_key=SecretStr("sk-admin"),
    )


@pytest.fixture(scope="module")
def replicas(settings: ServingSettings, redis_url: str) -> Iterator[Replicas]:
    with live_server(settings, "r0", redis_url) as first, live_server(settings, "r1", redis_url) as second:
        for version in (1, 2):
            revision = first.parts.engine.target_revision
            adapter = tiny_adapter(
                settings.draft or "",
                draft_version=version,
                target_revision=revision,
                parent_version=version - 1,
            )
            first.feed.publish(*adapter)
        yield first, second


@pytest.fixture(autouse=True)
def nothing_ordered(replicas: Replicas) -> Iterator[None]:
    yield
    for path in ("learning/resume", "undrain"):
        call(replicas[0], "POST", path)
    call(replicas[0], "DELETE", "capture")
    call(replicas[0], "POST", "drafts/default/unpin", {"reason": "test ends"})
    call(replicas[0], "POST", "drafts/default/rollback", {"version": 2, "reason": "test ends"})
    for replica in replicas:
        eventually(lambda replica=replica: replica.parts.context.is_ready)
        eventually(lambda replica=replica: capture_rate(replica) == 1.0)
        eventually(lambda replica=replica: replica.parts.engine.draft_version == 2)


def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)


def ask(server: LiveServer, method: str, path: str, body: Any = None, headers: Any = ADMIN) -> httpx.Response:
    return httpx.request(method, f"{server.url}/admin/{path}", json=body, headers=headers, timeout=30)


def call(server: LiveServer, method: str, path: str, body: Any = None) -> Any:
    answer = ask(server, method, path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer: httpx.Response) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


def generate(server: LiveServer, **body: Any) -> httpx.Response:
    asked = {"prompt": "the quick", "max_tokens": 4, "ignore_eos": True} | body
    return httpx.post(f"{server.url}/v1/completions", json=asked, headers=CLIENT, timeout=60)


def capture_rate(server: LiveServer) -> float:
    return float(call(server, "GET", "status")["capture_rate"])


def served(replicas: Replicas) -> list[int]:
    return [replica.parts.engine.draft_version for replica in replicas]


def audit(server: LiveServer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = call(server, "GET", "audit?lines=1000")
    return found


def test_drafts_are_shown_and_what_serves_changes_on_both(replicas: Replicas) -> None:
    one, other = replicas
    [default] = call(one, "GET", "drafts?route=default&events=2")
    assert (default["route"], default["serving_version"], default["pinned_version"]) == ("default", 2, None)
    assert [manifest["draft_version"] for manifest in default["versions"]] == [1, 2]
    assert len(default["events"]) == 2

    answer = call(other, "POST", "drafts/default/rollback", {"reason": "worse on friday"})
    assert answer == {"route": "default", "draft_version": 1}
    eventually(lambda: served(replicas) == [1, 1])
    assert call(one, "POST", "drafts/default/pin", {"version": 0, "reason": "compare"})["draft_version"] == 0
    eventually(lambda: served(replicas) == [0, 0])
    assert call(other, "POST", "drafts/default/unpin", {"reason": "compared"})["draft_version"] == 1
    eventually(lambda: served(replicas) == [1, 1])
    assert [event.reason for event in one.feed.history("default", 2)] == ["compare", "compared"]

    details = call(one, "GET", "drafts/default/2")
    assert details["manifest"]["draft_version"] == 2 and not details["is_serving"]
    assert "worse on friday" in [event["reason"] for event in details["events"]]
    call(one, "POST", "drafts/default/rollback", {"version": 2, "reason": "back"})
    eventually(lambda: served(replicas) == [2, 2])


def test_figures_that_were_not_measured_do_not_break_the_answer(replicas: Replicas) -> None:
    one, _ = replicas
    one.feed.add_event(AdapterEvent("refused", "default", 3, "too few", 1.0, {"gain": float("nan")}))
    [default] = call(one, "GET", "drafts?events=1")
    assert default["events"][0]["evidence"] == {}


@pytest.mark.parametrize(
    ("method", "path", "body", "param", "named"),
    [
        ("GET", "drafts?route=nowhere", None, "route", "'default'"),
        ("GET", "drafts/nowhere/1", None, "route", "'default'"),
        ("GET", "drafts/default/9", None, "version", "[1, 2]"),
        ("GET", "drafts/default/0", None, "version", "[1, 2]"),
        ("POST", "drafts/nowhere/rollback", {"reason": "x"}, "route", "'default'"),
        ("POST", "drafts/default/rollback", {"version": 9, "reason": "x"}, "version", "[1, 2]"),
        ("POST", "drafts/default/pin", {"version": 9, "reason": "x"}, "version", "[1, 2]"),
        ("POST", "drafts/nowhere/unpin", {"reason": "x"}, "route", "'default'"),
        ("POST", "learning/pause", {"route": "nowhere"}, "route", "'default'"),
        ("POST", "learning/resume", {"route": "nowhere"}, "route", "'default'"),
        ("POST", "drain", {"replica_id": "r9"}, "replica_id", "'r0', 'r1'"),
        ("POST", "undrain", {"replica_id": "r0"}, "replica_id", "none"),
        ("POST", "records/purge", {"route": "nowhere"}, "route", "There are"),
    ],
)
def test_a_name_that_does_not_exist_is_a_404_with_those_that_do(
    replicas: Replicas, method: str, path: str, body: Any, param: str, named: str
) -> None:
    status, at_fault, message = refused(ask(replicas[0], method, path, body))
    assert (status, at_fault) == (404, param)
    assert named in message
    assert replicas[0].feed.routes() == ["default"]


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "drafts/default/rollback", {}, "reason"),
        ("POST", "drafts/default/rollback", {"reason": ""}, "reason"),
        ("POST", "drafts/default/rollback", {"reason": "x" * 501}, "reason"),
        ("POST", "drafts/default/rollback", {"reason": "x", "version": "1"}, "version"),
        ("POST", "drafts/default/rollback", {"reason": "x", "version": -1}, "version"),
        ("POST", "drafts/default/rollback", {"reason": "x", "to": 1}, "to"),
        ("POST", "drafts/default/pin", {"reason": "x"}, "version"),
        ("POST", "drafts/default/unpin", {"reason": 1}, "reason"),
        ("GET", "drafts/default/one", None, "version"),
        ("GET", "drafts?events=201", None, "events"),
        ("GET", "audit?lines=0", None, "lines"),
        ("POST", "learning/pause", {"routes": ["default"]}, "routes"),
        ("PUT", "capture", {}, "rate"),
        ("PUT", "capture", {"rate": 1.5}, "rate"),
        ("PUT", "capture", {"rate": "1"}, "rate"),
        ("PUT", "capture", {"rate": None}, "rate"),
        ("POST", "drain", {"replica": "r0"}, "replica"),
        ("POST", "drain", {"request_id": "r0"}, "request_id"),
        ("POST", "drain", {"tools": []}, "tools"),
        ("POST", "records/purge", {}, "request_id"),
        ("POST", "records/purge", {"older_than_s": -1}, "older_than_s"),
        ("POST", "records/purge", {"older_than": 1}, "older_than"),
    ],
)
def test_a_body_that_would_not_do_what_it_says_is_a_400(
    replicas: Replicas, method: str, path: str, body: Any, param: str
) -> None:
    status, at_fault, message = refused(ask(replicas[0], method, path, body))
    assert (status, at_fault) == (400, param), message


def test_learning_is_paused_for_whoever_follows(replicas: Replicas) -> None:
    one, other = replicas
    assert call(one, "POST", "learning/pause", {"route": "default"})["paused_routes"] == ["default"]
    assert call(one, "POST", "learning/pause")["is_learning_paused"]
    eventually(lambda: call(other, "GET", "status")["controls"]["is_learning_paused"])
    assert call(other, "GET", "drafts")[0]["is_learning_paused"]
    status, param, message = refused(ask(other, "POST", "learning/resume", {"route": "default"}))
    assert (status, param) == (400, "route") and "without a route" in message
    assert call(other, "POST", "learning/resume") | {"last_purge": ""} == {
        "is_learning_paused": False,
        "paused_routes": [],
        "capture_rate": None,
        "are_all_draining": False,
        "draining_replicas": [],
        "last_purge": "",
    }


def test_capture_stops_and_goes_on_at_both(replicas: Replicas) -> None:
    one, other = replicas
    key = StreamKey(one.parts.engine.target_revision, "default")
    assert call(one, "GET", "capture") == {"rate": 1.0, "ordered": None}
    assert call(other, "PUT", "capture", {"rate": 0})["capture_rate"] == 0.0
    for replica in replicas:
        eventually(lambda replica=replica: call(replica, "GET", "capture") == {"rate": 0.0, "ordered": 0.0})
    before = one.store.size(key).num_records
    for replica in replicas:
        assert generate(replica).status_code == 200
        replica.wait_until_idle()
    call(one, "DELETE", "capture")
    eventually(lambda: capture_rate(one) == capture_rate(other) == 1.0)
    last = generate(other).json()["id"]
    eventually(lambda: one.store.size(key).num_records > before)
    records = one.store.draw_replay(key, 1000, seed=0)
    assert one.store.size(key).num_records == before + 1
    assert any(record.request_id.startswith(last) for record in records)


def test_a_drained_replica_refuses_and_finishes_and_the_other_serves(replicas: Replicas) -> None:
    one, other = replicas
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True, "temperature": 0}
    url = f"{other.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=CLIENT, timeout=60) as running:
        lines = running.iter_lines()
        assert next(lines).startswith("data: {")
        assert call(one, "POST", "drain", {"replica_id": "r1"})["draining_replicas"] == ["r1"]
        eventually(lambda: httpx.get(f"{other.url}/ready").status_code == 503)
        answer = generate(other)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "drain" in answer.json()["error"]["message"]
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    assert not call(other, "GET", "status")["is_ready"], "the admin key still opens it"
    assert httpx.get(f"{other.url}/health").status_code == 200
    assert httpx.get(f"{one.url}/ready").status_code == 200 and generate(one).status_code == 200
    call(other, "POST", "undrain", {"replica_id": "r1"})
    eventually(lambda: generate(other).status_code == 200)


def test_a_drain_of_all_holds_for_a_replica_that_starts_later(
    replicas: Replicas, settings: ServingSettings, redis_url: str
) -> None:
    call(replicas[0], "POST", "drain")
    for replica in replicas:
        eventually(lambda replica=replica: httpx.get(f"{replica.url}/ready").status_code == 503)
    with live_server(settings, "r2", redis_url) as late:
        assert generate(late).status_code == 503
        status, param, _ = refused(ask(late, "POST", "undrain", {"replica_id": "r2"}))
        assert (status, param) == (400, "replica_id")
        assert call(late, "GET", "status")["replicas"] == ["r0", "r1", "r2"]
        call(late, "POST", "undrain")
        eventually(lambda: generate(late).status_code == 200)


def test_the_records_of_one_request_are_deleted_and_no_others(replicas: Replicas) -> None:
    one, other = replicas
    key = StreamKey(one.parts.engine.target_revision, "default")
    call(one, "POST", "records/purge", {"older_than_s": 0})
    ids = [generate(replica, n=2).json()["id"] for replica in replicas]
    eventually(lambda: one.store.size(key).num_records == 4)
    assert call(other, "POST", "records/purge", {"request_id": ids[0]}) == {"num_records": 2, "caveat": ""}
    left = {record.request_id for record in one.store.draw_replay(key, 9, seed=0)}
    assert left == {f"{ids[1]}-0"}
    assert call(one, "POST", "records/purge", {"older_than_s": 3600})["num_records"] == 0
    assert call(one, "POST", "records/purge", {"route": "default"})["num_records"] == 2
    assert one.store.size(key).num_records == 0


def test_each_call_leaves_a_line_and_reading_leaves_none(replicas: Replicas) -> None:
    one, other = replicas
    before = len(audit(one))
    for path in ("status", "drafts", "drafts/default/1", "capture"):
        call(one, "GET", path)
    call(one, "PUT", "capture", {"rate": 0.5})
    call(other, "POST", "drafts/default/pin", {"version": 1, "reason": "compare"})
    assert ask(other, "POST", "drafts/default/pin", {"version": 9, "reason": "x"}).status_code == 404
    added = audit(other)[before:]
    assert [(line["operation"], line["outcome"][:7]) for line in added] == [
        ("capture.set", "allowed"),
        ("drafts.pin", "allowed"),
        ("drafts.pin", "allowed"),
        ("drafts.pin", "failed:"),
    ]
    assert {(line["who"], line["address"]) for line in added} == {(DIGEST, "127.0.0.1")}
    assert added[0]["arguments"] == {"rate": 0.5}
    assert added[1]["arguments"] == {"route": "default", "version": 1, "reason": "compare"}


def test_refused_calls_leave_a_line_without_the_key(replicas: Replicas) -> None:
    one, _ = replicas
    secret = "sk-a-wrong-key-of-somebody"
    for number, (headers, who) in enumerate(
        [
            ({}, "no key"),
            ({"Authorization": f"Bearer {secret}"}, hashlib.sha256(secret.encode()).hexdigest()[:8]),
            (CLIENT, hashlib.sha256(b"sk-client").hexdigest()[:8]),
        ]
    ):
        path = f"drafts/knock-{number}/pin"
        assert ask(one, "POST", path, {"version": 1, "reason": "x"}, headers).status_code == 401
        eventually(lambda path=path: any(path in line["operation"] for line in audit(one)))
        [line] = [line for line in audit(one) if path in line["operation"]]
        assert (line["operation"], line["who"]) == (f"POST /admin/{path}", who)
        assert line["outcome"] == "refused: no valid admin key"
    assert secret not in str(audit(one))
    assert one.feed.latest("default").draft_version == 2  # type: ignore[union-attr]


def test_a_malformed_call_leaves_a_line_without_its_body(replicas: Replicas) -> None:
    one, _ = replicas
    before = len(audit(one))
    assert ask(one, "POST", "drain", {"prompt": "a user's words"}).status_code == 400
    assert ask(one, "POST", "nowhere/%0a%22").status_code == 404
    assert ask(one, "PUT", "status").status_code == 405
    eventually(lambda: len(audit(one)) == before + 3)
    assert [(line["operation"], line["outcome"]) for line in audit(one)[before:]] == [
        ("POST /admin/drain", "refused: status 400"),
        ("POST /admin/nowhere/??", "refused: status 404"),
        ("PUT /admin/status", "refused: status 405"),
    ]
    assert "user's words" not in str(audit(one))


class SlowFeed(MemoryAdapterFeed):
    """Writes a line of the audit log once it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def add_audit_line(self, line: AuditLine) -> None:
        assert self.released.wait(60)
        super().add_audit_line(line)


@pytest.mark.asyncio
async def test_callers_without_a_key_wait_for_no_store_and_cannot_fill_the_memory() -> None:
    feed = SlowFeed()
    refused_calls = RefusedCalls(feed)
    for number in range(1_000):
        refused_calls.note(Caller("no key", "somewhere"), "POST", f"/admin/{number}", REFUSED_BY_KEY)
    assert feed.audit_log() == []
    feed.released.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert 100 <= len(feed.audit_log(1_000)) <= 101
    assert feed.audit_log()[0].operation.startswith("POST /admin/")


def test_without_redis_admin_calls_are_503_and_answers_go_on(settings: ServingSettings) -> None:
    quick = settings.model_copy(update={"boot_timeout_s": 0.1})
    with EmbeddedRedis() as server, live_server(quick, "r0", server.url) as alone:
        server.stop()
        for method, path, body in (
            ("POST", "drain", {}),
            ("PUT", "capture", {"rate": 0.0}),
            ("POST", "drafts/default/rollback", {"reason": "x"}),
            ("POST", "records/purge", {"request_id": "cmpl-1"}),
            ("GET", "drafts", None),
            ("GET", "audit", None),
        ):
            status, _, message = refused(ask(alone, method, path, body))
            assert status == 503, (path, message)
            assert ("audit log could not be written" in message) == (method != "GET")
        assert call(alone, "GET", "status")["replicas"] is None
        assert generate(alone).status_code == 200
        assert alone.parts.context.is_ready


def test_a_replica_without_recording_refuses_to_record_by_order(settings: ServingSettings) -> None:
    private = settings.model_copy(update={"capture_rate": 0.0})
    with live_server(private) as server:
        status, param, message = refused(ask(server, "PUT", "capture", {"rate": 0.5}))
        assert (status, param) == (400, "rate") and "without recording" in message
        assert call(server, "PUT", "capture", {"rate": 0})["capture_rate"] == 0.0
        assert server.parts.status().last_error == ""
        server.feed.change_controls(lambda orders: orders.with_capture_rate(0.5))  # over Redis
        eventually(lambda: "without recording" in server.parts.status().last_error)
        assert call(server, "GET", "capture") == {"rate": 0.0, "ordered": 0.5}
