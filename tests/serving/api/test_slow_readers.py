"""A client that asks for a stream and does not read it keeps no slot and no place from others."""

import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from urllib.parse import urlsplit

import httpx
import pytest

from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server

FAT = {
    "prompt": "a",
    "n": 8,
    "max_tokens": 200,
    "ignore_eos": True,
    "num_draft_tokens": 0,
    "logprobs": 20,
    "stream": True,
}
"""A megabyte of events."""
BUFFER = 2**14


def stalled(server: LiveServer) -> socket.socket:
    """A client that never reads."""
    where = urlsplit(server.url)
    assert where.hostname is not None and where.port is not None
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((where.hostname, where.port))
    body = json.dumps(FAT).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return client


def settings(tiny_pair: tuple[str, str], **others: float) -> ServingSettings:
    """As many places as one such request takes."""
    return ServingSettings.model_validate(
        {
            "compile": "off",
            "target": tiny_pair[0],
            "draft": tiny_pair[1],
            "num_slots": 4,
            "max_seq_len": 256,
            "max_queued_requests": 4,
            "max_generations_per_request": 4,
            **others,
        }
    )


def until(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def has_generated(server: LiveServer, num_tokens: int) -> bool:
    return server.parts.engine.stats().num_output_tokens >= num_tokens


def test_its_places_are_free_once_the_engine_is_done(tiny_pair: tuple[str, str]) -> None:
    roomy = settings(tiny_pair, max_queued_requests=8, max_generations_per_request=8)
    with ExitStack() as clients, live_server(roomy, send_buffer_bytes=BUFFER) as server:
        context = server.parts.context
        for number in range(1, 4):
            clients.enter_context(stalled(server))
            until(partial(has_generated, server, number * 8 * 200), "it was not generated")
            until(lambda: context.admission.num_in_flight == 0, "it keeps its places")
        assert context.num_open == 3, "all of them are stalled"
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "n": 8}, timeout=30)
        assert answer.status_code == 200
        clients.close()
        until(lambda: context.num_open == 0, "they left, and nobody noticed")


@pytest.mark.slow
def test_it_is_dropped_after_its_deadline(tiny_pair: tuple[str, str]) -> None:
    bounded = settings(tiny_pair, request_timeout_s=2.0, max_queued_requests=8, max_generations_per_request=8)
    with live_server(bounded, send_buffer_bytes=BUFFER) as server, stalled(server):
        context = server.parts.context
        until(lambda: context.num_open == 1, "it did not begin")
        until(lambda: context.num_open == 0, "it holds its answer for good")
