"""Clients of a service under load: a request is sent when it is due, whether or not others were answered.

Runs in a process of its own, on one event loop, beside the service and not within it. Invariant: times count
from when a request was due, so that a service that stalls cannot hide the requests that came meanwhile.
"""

import asyncio
import json
import random
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, repeat, takewhile
from typing import Any

import aiohttp

REQUEST_TIMEOUT_S = 300.0
_LEAD_S = 0.2
"""From the making of the clients to the time that all others count from."""
_REASON_CHARACTERS = 200


@dataclass(frozen=True)
class LoadSpec:
    """Streamed chat requests to `url`: the questions in turn, answers of at most so many tokens."""

    url: str
    questions: tuple[str, ...]
    max_tokens: int
    temperature: float = 0.0

    def bodies(self) -> Iterator[bytes]:
        """Endless."""
        return cycle([self._body(question) for question in self.questions])

    def _body(self, question: str) -> bytes:
        asked = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "return_token_ids": True,
        }
        return json.dumps(asked).encode()


@dataclass(frozen=True)
class Timing:
    """What came of one request; seconds since the first of its run could be due."""

    due_s: float
    sent_s: float
    ended_s: float
    status: int = 0
    """0: no answer came."""
    retry_after: str | None = None
    chunks: tuple[tuple[float, int], ...] = ()
    """When tokens came, and how many at once."""
    fault: str = ""
    """Why it failed; empty for an answer, and for a refusal by 429."""

    @property
    def is_answered(self) -> bool:
        return self.status == 200 and not self.fault

    @property
    def is_refused(self) -> bool:
        return self.status == 429

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.chunks)


@dataclass(frozen=True)
class Sent:
    """A run of requests. `began_at_s`: Unix time of its second 0. `processor_s`: what the clients took."""

    began_at_s: float
    timings: tuple[Timing, ...]
    processor_s: float


def poisson_arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """When requests of a Poisson process are due, in seconds; endless."""
    rng = random.Random(seed)
    return accumulate(rng.expovariate(rate_per_s) for _ in repeat(None))


def until(seconds: float, arrivals: Iterator[float]) -> tuple[float, ...]:
    return tuple(takewhile(lambda due_s: due_s < seconds, arrivals))


def open_loop(spec: LoadSpec, due_s: Sequence[float]) -> Sent:
    """Every request when it is due; returns when all have ended."""
    return asyncio.run(_Clients(spec).open_loop(due_s))


def closed_loop(spec: LoadSpec, num_clients: int, seconds: float) -> Sent:
    """Each client's next request when its last one has ended; none is sent after `seconds`."""
    return asyncio.run(_Clients(spec).closed_loop(num_clients, seconds))


class _Clients:
    """Used for one run."""

    def __init__(self, spec: LoadSpec) -> None:
        self._url = f"{spec.url}/v1/chat/completions"
        self._bodies = spec.bodies()
        self._began_s = time.perf_counter() + _LEAD_S
        self._began_at_s = time.time() + _LEAD_S

    async def open_loop(self, due_s: Sequence[float]) -> Sent:
        async with self._session() as http:
            asked = []
            for due in due_s:
                await asyncio.sleep(due - self._now_s())
                asked.append(asyncio.create_task(self._ask(http, due)))
            return self._sent([await each for each in asked])

    async def closed_loop(self, num_clients: int, seconds: float) -> Sent:
        timings: list[Timing] = []

        async def client(http: aiohttp.ClientSession) -> None:
            await asyncio.sleep(-self._now_s())
            while (now_s := self._now_s()) < seconds:
                timings.append(await self._ask(http, now_s))

        async with self._session() as http:
            await asyncio.gather(*(client(http) for _ in range(num_clients)))
        return self._sent(timings)

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
            headers={"Content-Type": "application/json"},
        )

    def _now_s(self) -> float:
        return time.perf_counter() - self._began_s

    def _sent(self, timings: Sequence[Timing]) -> Sent:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return Sent(self._began_at_s, tuple(timings), used.ru_utime + used.ru_stime)

    async def _ask(self, http: aiohttp.ClientSession, due_s: float) -> Timing:
        sent_s, pieces = self._now_s(), list[tuple[float, bytes]]()
        status, retry_after = 0, None
        try:
            async with http.post(self._url, data=next(self._bodies)) as response:
                status, retry_after = response.status, response.headers.get("Retry-After")
                while piece := await response.content.readany():
                    pieces.append((self._now_s(), piece))
            chunks, fault = _read(pieces) if status == 200 else ((), _refusal(status, pieces))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            chunks, fault = (), f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]
        return Timing(due_s, sent_s, self._now_s(), status, retry_after, chunks, fault)


def _refusal(status: int, pieces: Sequence[tuple[float, bytes]]) -> str:
    """Empty for 429, which is an answer too."""
    said = b"".join(piece for _, piece in pieces).decode(errors="replace")
    return "" if status == 429 else f"{status}: {said}"[:_REASON_CHARACTERS]


def _read(pieces: Sequence[tuple[float, bytes]]) -> tuple[tuple[tuple[float, int], ...], str]:
    """(chunks, fault) of a stream. An event came when its last byte did. Raises ValueError for one that is no
    JSON."""
    chunks, held, fault, ended = list[tuple[float, int]](), b"", "", False
    for at_s, piece in pieces:
        *events, held = (held + piece).split(b"\n\n")
        for event in events:
            said = event.removeprefix(b"data: ")
            ended = said == b"[DONE]"
            content: dict[str, Any] = {} if ended else json.loads(said)
            if "error" in content:
                fault = str(content["error"])[:_REASON_CHARACTERS]
            num_tokens = sum(len(choice.get("token_ids") or ()) for choice in content.get("choices", ()))
            if num_tokens:
                chunks.append((at_s, num_tokens))
    return tuple(chunks), fault or ("" if ended else "the stream broke off")
