"""Clients of the endpoint: real HTTP requests, several at once, and what came of each.

Knows nothing of Ray, Redis or learning; sees only what any client sees. A failed request is an RequestOutcome
with an error, never an exception.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from deploy.demo.corpus import Prompt
from serving.engine.counters import acceptance_rate

REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Ask:
    """One request to send."""

    prompt: Prompt
    max_tokens: int
    temperature: float = 0.0
    num_draft_tokens: int | None = None
    """0: no speculation."""
    store: bool = True
    """False: OpenAI's opt-out; the request is never recorded."""


@dataclass(frozen=True)
class RequestOutcome:
    """One answer, or why there is none."""

    ask: Ask
    token_ids: tuple[int, ...] = ()
    text: str = ""
    num_attempted: int = 0
    num_accepted: int = 0
    draft_version: int = 0
    """The last version that proposed for it."""
    latency_s: float = 0.0
    error: str = ""

    @property
    def domain(self) -> str:
        return self.ask.prompt.domain

    @property
    def question(self) -> str:
        """What was asked; a prompt's key will not do, since prompts cut from one passage share it."""
        return self.ask.prompt.messages[-1]["content"]


def acceptance_of(outcomes: Sequence[RequestOutcome]) -> float:
    """Accepted over judged draft tokens; 0 where none was judged."""
    return acceptance_rate(
        sum(outcome.num_accepted for outcome in outcomes), sum(outcome.num_attempted for outcome in outcomes)
    )


def answers(outcomes: Sequence[RequestOutcome]) -> dict[str, tuple[int, ...]]:
    """Token ids by question."""
    return {outcome.question: outcome.token_ids for outcome in outcomes}


class Clients:
    """Up to `num_clients` requests at a time against one endpoint."""

    def __init__(self, url: str, num_clients: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._num_clients = num_clients
        self._clock = clock

    def send(
        self,
        asks: Iterable[Ask],
        on_outcome: Callable[[RequestOutcome], None] = lambda outcome: None,
        time_limit_s: float = float("inf"),
    ) -> list[RequestOutcome]:
        """Send all asks in order, each as soon as a client is free; no new one once `time_limit_s` are over.

        Returns the outcomes in the order in which they finished.
        """
        return asyncio.run(self._send(asks, on_outcome, self._clock() + time_limit_s))

    async def _send(
        self, asks: Iterable[Ask], on_outcome: Callable[[RequestOutcome], None], deadline_s: float
    ) -> list[RequestOutcome]:
        outcomes: list[RequestOutcome] = []
        coming = iter(asks)
        limits = httpx.Limits(max_connections=self._num_clients)

        async def client() -> None:
            for ask in coming:
                if self._clock() >= deadline_s:
                    return
                outcome = await _send_one(http, ask)
                outcomes.append(outcome)
                on_outcome(outcome)

        async with httpx.AsyncClient(
            base_url=self._url, timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False
        ) as http:
            await asyncio.gather(*(client() for _ in range(self._num_clients)))
        return outcomes


async def _send_one(http: httpx.AsyncClient, ask: Ask) -> RequestOutcome:
    body: dict[str, Any] = {
        "messages": list(ask.prompt.messages),
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "store": ask.store,
        "metadata": {"route": ask.prompt.domain},
        "return_token_ids": True,
        "return_weight_versions": True,
    }
    if ask.num_draft_tokens is not None:
        body["num_draft_tokens"] = ask.num_draft_tokens
    began_s = time.perf_counter()
    try:
        response = await http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        answer = response.json()
    except httpx.HTTPStatusError as error:
        return RequestOutcome(ask, error=f"{error.response.status_code}: {error.response.text[:200]}")
    except (httpx.HTTPError, ValueError) as error:
        return RequestOutcome(ask, error=f"{type(error).__name__}: {error}")
    choice, figures = answer["choices"][0], answer["metrics"]["speculative_decoding"]
    versions = choice["weight_versions"]
    return RequestOutcome(
        ask,
        token_ids=tuple(choice["token_ids"]),
        text=choice["message"]["content"],
        num_attempted=figures["num_attempted_draft_tokens"],
        num_accepted=figures["num_accepted_draft_tokens"],
        draft_version=versions[-1]["version"] if versions else 0,
        latency_s=time.perf_counter() - began_s,
    )


def top_two_gap(url: str, ask: Ask, position: int) -> float:
    """How far apart the target's two best tokens are at an output position, without speculation (nats)."""
    body = {
        "messages": list(ask.prompt.messages),
        "max_tokens": position + 1,
        "temperature": 0.0,
        "num_draft_tokens": 0,
        "store": False,
        "logprobs": True,
        "top_logprobs": 2,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=REQUEST_TIMEOUT_S, trust_env=False)
    best, second = response.raise_for_status().json()["choices"][0]["logprobs"]["content"][-1]["top_logprobs"]
    return float(best["logprob"] - second["logprob"])
