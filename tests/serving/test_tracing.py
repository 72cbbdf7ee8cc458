"""Traces as a collector gets them: over HTTP, from the request to its rounds to its records, without text."""

import contextlib
import gzip
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server

ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "xyzzy-plugh-4711"
CHAT = {
    "messages": [{"role": "user", "content": SECRET}],
    "max_tokens": 24,
    "temperature": 0.0,
    "ignore_eos": True,
}


class Collector:
    """Keeps what is sent to it, as bytes and decoded."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    @property
    def spans(self) -> list[Any]:
        found = []
        for body in self.bodies:
            for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                found += [span for scope in of_resource.scope_spans for span in scope.spans]
        return found

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.bodies.append(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{server.server_port}/v1/traces")
    yield found
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def replica(tiny_pair: tuple[str, str]) -> Iterator[LiveServer]:
    """Spans are flushed when the block is left."""
    target, draft = tiny_pair
    settings = ServingSettings(
        compile="off",
        target=target,
        draft=draft,
        model_name="tiny",
        num_slots=4,
        max_seq_len=256,
        num_draft_tokens=3,
    )
    with live_server(settings) as server:
        yield server


def ask(server: LiveServer, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def wait_for(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30.0
    while not holds():
        assert time.monotonic() < deadline_s, "it did not come within 30 s"
        time.sleep(0.01)


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in span.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def test_a_trace_leads_from_the_caller_to_rounds_and_records(
    tiny_pair: tuple[str, str], collector: Collector
) -> None:
    with replica(tiny_pair) as server:
        sent = {"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Request-Id": "of-the-client"}
        answer = ask(server, {**CHAT, "n": 2}, **sent).json()
        assert server.parts.context.recorder is not None
        wait_for(lambda: "everdraft_records_exported_total{" in scrape(server) and exported(server) == 2)
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    [request] = collector.named("llm_request")
    assert request.parent_span_id.hex() == CALLER
    said = attributes(request)
    assert said["gen_ai.request.id"] == answer["id"]
    assert said["everdraft.request_id"] == "of-the-client"
    assert said["gen_ai.request.model"] == "tiny" and said["gen_ai.request.n"] == 2
    assert said["gen_ai.request.max_tokens"] == 24
    assert said["gen_ai.usage.prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert said["gen_ai.usage.completion_tokens"] == 48
    assert said["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert 0.0 < said["gen_ai.latency.time_to_first_token"] < said["gen_ai.latency.e2e"]

    generations = collector.named("generation")
    assert len(generations) == 2
    exports = {span.parent_span_id: span for span in collector.named("record.export")}
    for generation in generations:
        figures = attributes(generation)
        assert generation.parent_span_id == request.span_id
        rounds = [attributes(event) for event in generation.events if event.name == "round"]
        assert len(rounds) == figures["everdraft.num_rounds"]
        assert sum(each["everdraft.num_tokens"] for each in rounds) == 24
        assert {each["everdraft.draft_version"] for each in rounds} == {0}
        for total in ("num_draft_tokens", "num_accepted_tokens"):
            of_rounds = sum(each[f"everdraft.{total}"] for each in rounds)
            assert of_rounds == figures[f"everdraft.{total}"], total
        times = [event.time_unix_nano for event in generation.events]
        assert times == sorted(times)
        assert generation.start_time_unix_nano <= times[0] and times[-1] <= generation.end_time_unix_nano
        assert "record.submitted" in [event.name for event in generation.events]
        export = attributes(exports[generation.span_id])
        assert export["everdraft.record.id"] == f"{figures['everdraft.generation.id']}-0"
        assert export["everdraft.record.num_rounds"] == len(rounds)


def scrape(server: LiveServer) -> str:
    return httpx.get(f"{server.url}/metrics", timeout=30).text


def exported(server: LiveServer) -> int:
    [line] = [
        line for line in scrape(server).splitlines() if line.startswith("everdraft_records_exported_total{")
    ]
    return int(float(line.rpartition(" ")[2]))


def test_no_text_is_in_a_trace(tiny_pair: tuple[str, str], collector: Collector) -> None:
    """What is sought is there where it was put on purpose, in the request's id."""
    with replica(tiny_pair) as server:
        answer = ask(server, CHAT, **{"X-Request-Id": "seek-me"}).json()
        assert (
            ask(server, {**CHAT, "stop": [SECRET], "user": SECRET, "max_tokens": 10_000}).status_code == 400
        )
    said = answer["choices"][0]["message"]["content"].strip()
    assert len(said) > 8
    everything = b"".join(collector.bodies)
    assert b"seek-me" in everything
    assert SECRET.encode() not in everything and said.encode() not in everything


def test_long_answers_have_events_of_their_first_rounds(
    tiny_pair: tuple[str, str], collector: Collector
) -> None:
    with replica(tiny_pair) as server:
        ask(server, {**CHAT, "max_tokens": 150, "num_draft_tokens": 0, "store": False})
    [generation] = collector.named("generation")
    assert [event.name for event in generation.events] == ["round"] * 100
    assert attributes(generation)["everdraft.num_rounds"] == 150
    assert not collector.named("record.export")


def test_a_client_that_leaves_ends_its_spans(tiny_pair: tuple[str, str], collector: Collector) -> None:
    with replica(tiny_pair) as server:
        body = {**CHAT, "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
        server.wait_until_idle(30.0)
    for name in ("llm_request", "generation"):
        [span] = collector.named(name)
        assert attributes(span)["gen_ai.response.finish_reasons"] == ["abort"]


def test_a_trace_that_the_caller_does_not_keep_is_not_sent(
    tiny_pair: tuple[str, str], collector: Collector
) -> None:
    with replica(tiny_pair) as server:
        assert ask(server, CHAT, traceparent=f"00-{TRACE}-{CALLER}-00").status_code == 200
    assert collector.spans == []


def test_a_collector_that_is_away_costs_nothing_but_the_traces(
    tiny_pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9/v1/traces")
    with replica(tiny_pair) as server:
        assert ask(server, CHAT).status_code == 200


def test_without_a_collector_nothing_is_made(
    tiny_pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "serving.tracing", raising=False)
    with replica(tiny_pair) as server:
        assert ask(server, CHAT).status_code == 200
        assert server.parts.context.tracing is None
    assert "serving.tracing" not in sys.modules


def test_a_collector_without_the_library_is_one_warning(
    tiny_pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "serving.tracing", None)
    with caplog.at_level(logging.WARNING), replica(tiny_pair) as server:
        assert ask(server, CHAT).status_code == 200
    [warning] = [record.getMessage() for record in caplog.records if "OTEL_" in record.getMessage()]
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in warning and "everdraft[otel]" in warning
