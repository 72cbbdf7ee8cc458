"""A client that disconnects frees its slot within one round, wherever its request is: rounds are counted.

A pacer, which runs beside it, holds the engine in its callback until the test lets one more round happen.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from serving.engine.request import GenerationRequest, SamplingParams, TokenEvent
from serving.engine.scheduler import Scheduler
from serving.local import LocalEngine
from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server

PATIENCE_S = 60.0
LONG = SamplingParams(max_tokens=200, ignore_eos=True, num_draft_tokens=0)
CHUNK = 256
"""Prompt tokens that the engine takes in between two rounds."""


class Pacer:
    """A generation after each of whose rounds the engine waits."""

    def __init__(self, engine: LocalEngine) -> None:
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._free = False
        engine.submit(GenerationRequest("pacer", (5,), LONG), self._on_event)
        self._wait()

    def one_round(self) -> None:
        self._go.release()
        self._wait()

    def let_go(self) -> None:
        self._free = True
        self._go.release()

    def _on_event(self, event: TokenEvent) -> None:
        if not self._free:
            self._waits.release()
            self._go.acquire(timeout=PATIENCE_S)

    def _wait(self) -> None:
        assert self._waits.acquire(timeout=PATIENCE_S), "the pacer made no round"


@pytest.fixture(scope="module")
def two_slots(tiny_pair: tuple[str, str]) -> Iterator[LiveServer]:
    settings = ServingSettings(
        compile="off", target=tiny_pair[0], draft=tiny_pair[1], num_slots=2, max_seq_len=512
    )
    with live_server(settings) as live:
        yield live


@contextmanager
def paced(server: LiveServer) -> Iterator[tuple[Pacer, Scheduler]]:
    engine = server.parts.engine
    assert isinstance(engine, LocalEngine)
    pacer = Pacer(engine)
    try:
        yield pacer, engine.core.scheduler
    finally:
        pacer.let_go()
        server.wait_until_idle(PATIENCE_S)


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.001)


def connected(server: LiveServer, prompt: list[int], stream: bool) -> socket.socket:
    """A client whose request the server has taken."""
    where = urlsplit(server.url)
    assert where.hostname is not None and where.port is not None
    client = socket.create_connection((where.hostname, where.port))
    body = json.dumps(
        {"prompt": prompt, "max_tokens": 100, "ignore_eos": True, "num_draft_tokens": 0, "stream": stream}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    until(lambda: server.parts.context.num_open == 1)
    return client


def leave(server: LiveServer, client: socket.socket) -> None:
    """Until the server has noticed."""
    client.close()
    until(lambda: server.parts.context.num_open == 0)
    assert server.parts.context.admission.num_in_flight == 0


@pytest.mark.parametrize("stream", [True, False])
def test_while_it_waits_for_a_slot(two_slots: LiveServer, stream: bool) -> None:
    with paced(two_slots) as (pacer, scheduler):
        two_slots.parts.engine.submit(GenerationRequest("other", (5,), LONG))
        pacer.one_round()
        client = connected(two_slots, [7, 7], stream)
        pacer.one_round()
        assert (len(scheduler.running), len(scheduler.waiting)) == (2, 1)
        leave(two_slots, client)
        assert len(scheduler.waiting) == 1, "the engine had no round since"
        pacer.one_round()
        assert (len(scheduler.running), len(scheduler.waiting)) == (2, 0)


@pytest.mark.parametrize("stream", [True, False])
def test_while_its_prompt_is_taken_in(two_slots: LiveServer, stream: bool) -> None:
    with paced(two_slots) as (pacer, scheduler):
        client = connected(two_slots, [7 + number % 3 for number in range(CHUNK + 100)], stream)
        pacer.one_round()
        assert scheduler.prefilling is not None and scheduler.prefilling.num_cached == CHUNK
        leave(two_slots, client)
        assert scheduler.prefilling is not None, "the engine had no round since"
        pacer.one_round()
        assert (scheduler.num_active, scheduler.prefilling) == (1, None)


@pytest.mark.parametrize("stream", [True, False])
def test_while_it_generates(two_slots: LiveServer, stream: bool) -> None:
    with paced(two_slots) as (pacer, scheduler):
        client = connected(two_slots, [7, 7], stream)
        for _ in range(3):
            pacer.one_round()
        assert scheduler.num_active == 2 and scheduler.running[1].num_output >= 2
        leave(two_slots, client)
        assert scheduler.num_active == 2, "the engine had no round since"
        pacer.one_round()
        assert scheduler.num_active == 1
