"""Logs are JSON with the request's id, and hold nothing that users wrote, whatever goes wrong."""

import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.api.completions import CompletionRenderer
from serving.engine.core import EngineCore
from serving.log_lines import REQUEST_ID, JsonFormatter, LogPlan, where_raised
from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server

SECRET = "xyzzy-plugh-4711"
ROOT = logging.getLogger()


class Lines:
    """What was logged so far, as text."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.settimeout(30.0)
        self._text: list[str] = []

    def until(self, holds: Callable[[str], bool]) -> str:
        """All lines, once this holds: a request's line follows its answer. Raises TimeoutError."""
        while not holds("\n".join(self._text)):
            self._text.append(self._connection.recv(2**16).decode())
        return "\n".join(self._text)


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Lines]:
    """JSON, as a process that reads it gets it."""
    before = (ROOT.handlers[:], ROOT.level)
    ROOT.handlers = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "lines"))
        listener.listen()
        LogPlan("json", str(tmp_path / "lines")).begin(process="replica", replica="r7")
        [handler] = ROOT.handlers
        connection, _ = listener.accept()
        with connection:
            yield Lines(connection)
        handler.close()
    ROOT.handlers, level = before
    ROOT.setLevel(level)
    logging.raiseExceptions = True
    for name in ("buffer", "serving", "learner", "deploy"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def server(tiny_pair: tuple[str, str]) -> Iterator[LiveServer]:
    target, draft = tiny_pair
    settings = ServingSettings(
        compile="off", target=target, draft=draft, model_name="tiny", num_slots=2, max_seq_len=256
    )
    with live_server(settings) as live:
        yield live


def ask(server: LiveServer, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    given = {"prompt": SECRET, "max_tokens": 8, **body}
    return httpx.post(f"{server.url}{path}", json=given, headers={"X-Request-Id": "ask-1"}, timeout=60)


def test_a_request_is_a_line_with_its_ids(server: LiveServer, lines: Lines) -> None:
    answer = ask(server).json()
    [line] = map(json.loads, lines.until(lambda text: '"answered"' in text).splitlines())
    assert line["request_id"] == "ask-1" and line["answer_id"] == answer["id"]
    assert (line["process"], line["replica"], line["level"]) == ("replica", "r7", "INFO")
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/completions", 200)
    assert 0.0 < line["seconds"] < 60.0
    assert line["time"].endswith("+00:00") and line["logger"] == "serving.api.auth_middleware"


def raising(*_: object, **__: object) -> Any:
    """A fault that quotes what was asked, as templates and parsers do."""
    raise RuntimeError(f"cannot go on with {SECRET}")


def send_whatever_goes_wrong(server: LiveServer, patch: pytest.MonkeyPatch) -> None:
    """Answers, refusals and failures of every layer, each about the secret."""
    assert ask(server).status_code == 200
    assert ask(server, stream=True).status_code == 200
    chat = {"messages": [{"role": "user", "content": SECRET}], "prompt": None}
    assert ask(server, "/v1/chat/completions", **chat).status_code in (200, 400)
    for refused in (
        {"temperature": SECRET},
        {"max_tokens": 10_000},
        {"stop": [SECRET] * 20},
        {"model": SECRET},
        {"metadata": {"route": SECRET + " !"}},
        {"structured_outputs": {"regex": SECRET + "("}},
        {SECRET: 1},
    ):
        assert 400 <= ask(server, **refused).status_code < 500, refused
    assert httpx.get(f"{server.url}/v1/models/{SECRET}", timeout=60).status_code == 404
    assert httpx.post(f"{server.url}/{SECRET}?q={SECRET}", timeout=60).status_code == 404
    assert httpx.post(f"{server.url}/v1/completions", content=f'{{"{SECRET}', timeout=60).status_code == 400
    with patch.context() as broken:
        broken.setattr(server.parts.context.codec, "encode", raising)
        assert ask(server).status_code == 500
    with patch.context() as broken:
        broken.setattr(CompletionRenderer, "answer", raising)
        assert ask(server).status_code == 500
        broken.setattr(CompletionRenderer, "chunks", raising)
        assert "server_error" in ask(server, stream=True).text
    with patch.context() as broken:
        broken.setattr(EngineCore, "_round", raising)
        assert ask(server).status_code == 500


def is_told(text: str) -> bool:
    """The last request, and the failure of its round."""
    _, failed, after = text.partition("a round failed")
    return bool(failed) and '"status": 500' in after


def test_no_line_holds_what_users_wrote(
    server: LiveServer, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_whatever_goes_wrong(server, monkeypatch)
    text = lines.until(is_told)
    assert SECRET not in text
    told = [json.loads(line) for line in text.splitlines()]
    failures = [line for line in told if line["level"] == "ERROR"]
    assert len([line for line in failures if "ask-1" in line["message"]]) >= 2
    assert any("RuntimeError < raising" in line["message"] for line in failures)
    assert any("RuntimeError < raising" in line.get("exception", "") for line in failures), "the engine's"


def test_the_search_finds_a_message_that_quotes_a_request(
    server: LiveServer, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: were exceptions told with their message, as Python's own formatter does, it would show."""
    monkeypatch.setattr(JsonFormatter, "formatException", logging.Formatter.formatException, raising=False)
    monkeypatch.setattr("serving.log_lines.where_raised", repr)
    send_whatever_goes_wrong(server, monkeypatch)
    assert SECRET in lines.until(is_told)


def test_plain_logs_tell_a_failed_request_without_its_text(
    server: LiveServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.parts.context.codec, "encode", raising)
    assert ask(server).status_code == 500
    assert "request ask-1 failed: RuntimeError < raising" in caplog.text
    assert SECRET not in caplog.text


def test_plain_logs_are_left_as_they_are() -> None:
    before = (ROOT.handlers[:], ROOT.level, logging.getLogger("serving").level)
    LogPlan().begin(process="replica")
    assert before == (ROOT.handlers, ROOT.level, logging.getLogger("serving").level)


def test_a_line_outside_of_requests_has_no_request_id() -> None:
    record = logging.LogRecord("serving.x", logging.WARNING, "x.py", 1, "draft %d serves", (3,), None)
    line = json.loads(JsonFormatter({"process": "replica"}).format(record))
    assert line["message"] == "draft 3 serves" and "request_id" not in line
    token = REQUEST_ID.set("ask-2")
    try:
        assert json.loads(JsonFormatter({}).format(record))["request_id"] == "ask-2"
    finally:
        REQUEST_ID.reset(token)


def test_an_exception_is_told_by_where_it_was_raised() -> None:
    try:
        raising()
    except RuntimeError as error:
        told = where_raised(error)
    assert told.startswith("RuntimeError < raising (") and __file__ in told and SECRET not in told
