"""From a plan to an HTTP answer, whole or streamed. The one place where a client that leaves is noticed.

Knows neither endpoint: a Renderer gives the answer its shape.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

from fastapi import Request
from fastapi.responses import Response

from serving.api import sse
from serving.api.choices import ChoiceDelta
from serving.api.context import AppContext
from serving.api.errors import ApiError, internal_error
from serving.api.figures import metrics, usage
from serving.api.plan import Plan
from serving.api.response_schema import Body, Metrics, Usage
from serving.api.run import Run, start_run

_log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Nobody reads this status; access logs do."""


class Renderer(Protocol):
    """The shape of one endpoint's answers."""

    def opening(self) -> Iterator[Body]:
        """Chunks that need no token."""
        ...

    def chunk(self, delta: ChoiceDelta) -> Body: ...

    def closing(self, usage: Usage, metrics: Metrics) -> Body:
        """The chunk that `include_usage` asks for."""
        ...

    def answer(self, choices: list[ChoiceDelta], usage: Usage, metrics: Metrics) -> Body:
        """The whole answer, from each choice's joined deltas."""
        ...


async def respond(context: AppContext, request: Request, plan: Plan, renderer: Renderer) -> Response:
    """Raises ApiError if the request cannot start, or if it fails and is not streamed."""
    run = start_run(context, plan)
    if plan.body.stream:
        return sse.EventStream(_events(run, plan, renderer), on_close=run.close)
    try:
        body = await _unless_client_leaves(request, run, plan, renderer)
    finally:
        run.close()
    if body is None:
        return Response(status_code=CLIENT_LEFT)
    return Response(body.to_json(), media_type="application/json")


async def _unless_client_leaves(request: Request, run: Run, plan: Plan, renderer: Renderer) -> Body | None:
    """None when the client left first. A task each; neither outlives the call."""
    answer = asyncio.ensure_future(_whole(run, plan, renderer))
    left = asyncio.ensure_future(_client_left(request))
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        left.cancel()
        await asyncio.gather(answer, left, return_exceptions=True)


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(run: Run, plan: Plan, renderer: Renderer) -> Body:
    deltas: list[list[ChoiceDelta]] = [[] for _ in range(plan.num_choices)]
    async for delta in run.deltas():
        deltas[delta.index].append(delta)
    choices = [ChoiceDelta.join(of_choice) for of_choice in deltas]
    return renderer.answer(choices, *_figures(run, plan))


async def _events(run: Run, plan: Plan, renderer: Renderer) -> AsyncIterator[str]:
    """After the headers an error is an event too; `[DONE]` comes last in any case."""
    try:
        for chunk in renderer.opening():
            yield sse.event(chunk.to_json())
        async for delta in run.deltas():
            if _says_something(delta, plan):
                yield sse.event(renderer.chunk(delta).to_json())
        if plan.body.include_usage:
            yield sse.event(renderer.closing(*_figures(run, plan)).to_json())
    except ApiError as error:
        yield sse.event(error.body.model_dump_json())
    except Exception:
        _log.exception("request %s failed after its headers were sent", plan.api_id)
        yield sse.event(internal_error().body.model_dump_json())
    yield sse.DONE


def _says_something(delta: ChoiceDelta, plan: Plan) -> bool:
    """Whether a chunk is worth sending: held-back text alone is not."""
    wants_tokens = plan.body.return_token_ids or plan.sampling.logprobs is not None
    return bool(delta.text or delta.finish_reason or (wants_tokens and delta.token_ids))


def _figures(run: Run, plan: Plan) -> tuple[Usage, Metrics]:
    generations = run.generations
    return usage(plan.num_prompt_tokens, run.num_output_tokens, generations), metrics(generations)
