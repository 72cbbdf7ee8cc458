"""One client cannot take the service from the others: not by a body, not by many, not by leaving early."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import httpx
import pytest

from tests.support.live_server import LiveServer

Attack = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]

HEALTH_TIMEOUT_S = 5.0
"""Meant to be a few milliseconds; this many on a machine that does ten other things."""
JSON = {"content-type": "application/json"}
DEFAULT_QUEUE = 256


def completion(**fields: object) -> Attack:
    content = json.dumps({"max_tokens": 1, **fields}).encode()
    return lambda client: client.post("/v1/completions", content=content, headers=JSON)


def chunked(byte: bytes, num_chunks: int) -> Attack:
    """A body of no declared length."""

    async def body() -> AsyncIterator[bytes]:
        for _ in range(num_chunks):
            yield byte * 2**16

    return lambda client: client.post("/v1/completions", content=body(), headers=JSON)


ATTACKS: dict[str, Attack] = {
    "many prompts times many choices": completion(prompt=[[5]] * 30, n=128),
    "two thousand prompts": completion(prompt=[[5]] * 2000),
    "two thousand texts": completion(prompt=["a"] * 2000),
    "as many generations as are allowed": completion(prompt=[[5]] * (DEFAULT_QUEUE // 4)),
    "as many, streamed, long": completion(
        prompt=[[5]] * (DEFAULT_QUEUE // 4), max_tokens=200, ignore_eos=True, stream=True
    ),
    "as many choices, long": completion(prompt=[5], n=DEFAULT_QUEUE // 4, max_tokens=200, ignore_eos=True),
    "a list of many faults": completion(prompt=[0.5] * 150_000),
    "an endless body": chunked(b" ", 10_000),
    "a deep body": lambda client: client.post("/v1/completions", content=b"[" * 500_000, headers=JSON),
}


async def attack_until(stop: asyncio.Event, url: str, attack: Attack, patience_s: float) -> int:
    """Again and again, leaving if there is no answer by then. Returns how often."""
    times = 0
    while not stop.is_set():
        async with httpx.AsyncClient(base_url=url) as client:
            with contextlib.suppress(TimeoutError, httpx.HTTPError):
                await asyncio.wait_for(attack(client), patience_s)
        times += 1
        await asyncio.sleep(0.05)
    return times


async def ask_for_health(stop: asyncio.Event, url: str) -> list[float]:
    """Seconds each answer took. Raises httpx.ReadTimeout."""
    took_s: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=HEALTH_TIMEOUT_S) as client:
        while not stop.is_set():
            began_s = time.perf_counter()
            assert (await client.get("/health")).status_code == 200
            took_s.append(time.perf_counter() - began_s)
            await asyncio.sleep(0.02)
    return took_s


async def ordinary_traffic(url: str, num_requests: int) -> list[int]:
    """Statuses, twenty clients at a time."""
    statuses: list[int] = []

    async def client_of(share: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            for number in range(share):
                body = {"prompt": "ordinary", "max_tokens": 1 + number % 3}
                statuses.append((await client.post("/v1/completions", json=body)).status_code)

    await asyncio.gather(*(client_of(num_requests // 20) for _ in range(20)))
    return statuses


async def beside(
    url: str, attacks: list[Attack], num_requests: int, patience_s: float = 0.2
) -> tuple[list[int], list[float]]:
    """(statuses of ordinary requests, seconds of /health) while every attack goes on."""
    stop = asyncio.Event()
    attackers = [asyncio.ensure_future(attack_until(stop, url, attack, patience_s)) for attack in attacks]
    health = asyncio.ensure_future(ask_for_health(stop, url))
    try:
        statuses = await ordinary_traffic(url, num_requests)
    finally:
        stop.set()
    assert min(await asyncio.gather(*attackers)) > 0
    return statuses, await health


def nothing_is_left(server: LiveServer) -> None:
    server.wait_until_idle(timeout_s=30.0)
    assert server.parts.context.admission.num_in_flight == 0


@pytest.mark.asyncio
async def test_no_ordinary_request_is_refused_beside_any_attack(server: LiveServer) -> None:
    statuses, took_s = await beside(server.url, list(ATTACKS.values()), 200)
    assert statuses == [200] * 200
    assert took_s
    nothing_is_left(server)


@pytest.mark.asyncio
async def test_clients_of_many_generations_that_stay_leave_room_for_others(server: LiveServer) -> None:
    """Five such requests fill the places of the queue and all slots exactly; six clients ask for them."""
    num_places = DEFAULT_QUEUE + server.parts.engine.stats().num_slots
    large = completion(prompt=[[5]] * (num_places // 5), max_tokens=4, ignore_eos=True)
    answered: list[int] = []

    async def counted(client: httpx.AsyncClient) -> httpx.Response:
        answer = await large(client)
        answered.append(answer.status_code)
        return answer

    statuses, _ = await beside(server.url, [counted] * 6, 40, patience_s=10.0)
    assert statuses == [200] * 40
    assert set(answered) <= {200, 429} and 200 in answered
    nothing_is_left(server)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [[5]] * 30, "n": 128}, "n"),
        ({"prompt": [[5]] * 2000}, "prompt"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"prompt": [[5]] * 5000}, "prompt"),
        ({"prompt": "a", "n": 65}, "n"),
        ({"prompt": [[5] * 200] * 60, "n": 1, "max_tokens": 100}, "max_tokens"),
        ({"prompt": [5] * 40_000, "n": 2}, "prompt"),
        ({"prompt": "fox " * 20_000, "n": 64}, "prompt"),
        ({"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(5000)), 1)}, "logit_bias"),
        ({"prompt": "a", "stop": ["x" * 2000]}, "stop"),
        ({"prompt": "a", "metadata": dict.fromkeys(map(str, range(17)), "")}, "metadata"),
    ],
)
def test_what_asks_for_too_much_is_refused_by_name_before_anything_is_queued(
    server: LiveServer, body: dict[str, object], param: str
) -> None:
    rejected = server.parts.context.admission.num_rejected
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert param in error["message"]
    assert server.parts.context.admission.num_rejected == rejected
    nothing_is_left(server)


def test_the_message_says_value_and_bound(server: LiveServer) -> None:
    body = {"prompt": [[5]] * 30, "n": 128}
    message = httpx.post(f"{server.url}/v1/completions", json=body).json()["error"]["message"]
    assert "3840" in message and "64" in message and "max_generations_per_request" in message


def test_chat_is_bounded_alike(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for body, param in (
        ({"messages": messages, "n": 65}, "n"),
        ({"messages": messages * 5000}, "messages"),
        ({"messages": [{"role": "user", "content": "fox " * 30_000}], "n": 64}, "messages"),
    ):
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_request_as_large_as_allowed_is_answered(server: LiveServer) -> None:
    body = {"prompt": [[5]] * (DEFAULT_QUEUE // 4), "max_tokens": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert len(answer.json()["choices"]) == DEFAULT_QUEUE // 4


def declared(num_bytes: int) -> bytes:
    return b" " * num_bytes


def undeclared(num_bytes: int) -> Iterator[bytes]:
    for start in range(0, num_bytes, 2**16):
        yield b" " * min(2**16, num_bytes - start)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", [declared, undeclared])
def test_a_body_too_large_is_refused_with_413_before_it_is_read_whole(
    server: LiveServer, path: str, body: Callable[[int], bytes | Iterator[bytes]]
) -> None:
    bound = server.parts.context.limits.max_body_bytes
    url = server.url + path
    refused = httpx.post(url, content=body(bound + 1), headers=JSON)
    assert (refused.status_code, refused.json()["error"]["type"]) == (413, "invalid_request_error")
    assert str(bound) in refused.json()["error"]["message"]
    assert httpx.post(url, content=body(bound), headers=JSON).status_code == 400


def test_as_many_tokens_as_are_allowed_are_decoded_and_no_more(server: LiveServer) -> None:
    bound = server.parts.context.limits.max_prompt_tokens
    refused = httpx.post(f"{server.url}/detokenize", json={"tokens": [5] * (bound + 1)}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [5] * bound}, timeout=60).status_code == 200


def test_a_body_nested_beyond_any_parser_is_a_bad_request(server: LiveServer) -> None:
    deep = json.dumps({"prompt": "a", "metadata": "@"}).replace('"@"', "[" * 100_000 + "]" * 100_000)
    answer = httpx.post(f"{server.url}/v1/completions", content=deep, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
