"""Clients with OpenAI's SDK and its default retries, that ask without a pause while faults come and go."""

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Self

from openai import AsyncOpenAI, OpenAIError

from deploy.demo.corpus import prompts
from serving.engine.counters import acceptance_rate

NUM_CLIENTS = 4
_THINKS_S = 0.1
_TIMEOUT_S = 60.0
_DOMAIN = "sql"


@dataclass(frozen=True)
class Asked:
    """One request as its client saw it. Times are those of `time.monotonic`."""

    began_s: float
    ended_s: float
    error: str = ""
    num_retries: int = 0
    num_attempted: int = 0
    num_accepted: int = 0
    draft_version: int = 0


class Traffic:
    """Runs inside the block, on a thread of its own; `asked` grows."""

    def __init__(self, url: str, model: str, *, max_tokens: int = 24, num_clients: int = NUM_CLIENTS) -> None:
        self._url, self._model, self._max_tokens = url, model, max_tokens
        self._num_clients = num_clients
        self._prompts = prompts(_DOMAIN, "replay")
        self._stops = threading.Event()
        self._rests = threading.Event()
        self.asked: list[Asked] = []
        self.num_open = 0
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stops.set()
        self._thread.join()

    def rest(self) -> None:
        """Until `go_on`: no new request; returns when none is under way."""
        self._rests.set()
        while self.num_open:
            time.sleep(0.05)

    def go_on(self) -> None:
        self._rests.clear()

    def between(self, begin_s: float, end_s: float) -> list[Asked]:
        """Requests under way at some time in [begin, end)."""
        return [one for one in self.asked if one.began_s < end_s and one.ended_s >= begin_s]

    def acceptance(self, begin_s: float, end_s: float) -> float:
        """Of requests that began in [begin, end)."""
        meant = [one for one in self.asked if begin_s <= one.began_s < end_s]
        accepted = sum(one.num_accepted for one in meant)
        return acceptance_rate(accepted, sum(one.num_attempted for one in meant))

    def _run(self) -> None:
        asyncio.run(self._ask())

    async def _ask(self) -> None:
        async with AsyncOpenAI(base_url=f"{self._url}/v1", api_key="none", timeout=_TIMEOUT_S) as client:
            await asyncio.gather(*(self._client(client) for _ in range(self._num_clients)))

    async def _client(self, client: AsyncOpenAI) -> None:
        while not self._stops.is_set():
            if not self._rests.is_set():
                self.num_open += 1
                self.asked.append(await self._one(client))
                self.num_open -= 1
            await asyncio.sleep(_THINKS_S)

    async def _one(self, client: AsyncOpenAI) -> Asked:
        began_s = time.monotonic()
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=list(next(self._prompts).messages),  # type: ignore[arg-type]
                max_tokens=self._max_tokens,
                temperature=0.0,
                extra_body={"return_weight_versions": True},
            )
            answer = raw.parse().model_dump()
            figures = answer["metrics"]["speculative_decoding"]
            versions = answer["choices"][0]["weight_versions"]
        except (OpenAIError, ValueError, KeyError, TypeError) as error:  # half an answer is none
            return Asked(began_s, time.monotonic(), error=f"{type(error).__name__}: {error}"[:200])
        return Asked(
            began_s,
            time.monotonic(),
            num_retries=raw.retries_taken,
            num_attempted=figures["num_attempted_draft_tokens"],
            num_accepted=figures["num_accepted_draft_tokens"],
            draft_version=versions[-1]["version"] if versions else 0,
        )
