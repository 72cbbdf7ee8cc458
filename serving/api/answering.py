"""Runs a request plan and sends the HTTP answer, whole or streamed. Only here a disconnect is noticed.

Knows neither endpoint: a Renderer formats the answer.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import ExitStack
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from serving.api import sse
from serving.api.active_request import ActiveRequest, open_request
from serving.api.auth_middleware import ANSWER_ID
from serving.api.choices import ChoiceDelta
from serving.api.context import AppContext
from serving.api.errors import ApiError, internal_error
from serving.api.figures import metrics, usage
from serving.api.incoming import off_loop
from serving.api.request_plan import RequestPlan
from serving.api.request_schema import GenerationBody
from serving.api.response_schema import Body, Metrics, Usage
from serving.log_lines import where_raised

_log = logging.getLogger(__name__)

_LAST_EVENTS_S = 5.0
"""How long a client may take to read what is left at the deadline, the error included."""
PADDING_BYTES = 256
"""Where a request asks for obfuscation and the service has no `stream_padding_bytes`."""
CLIENT_LEFT = 499
"""Status for access logs; the client that would get it has disconnected."""


class Renderer(Protocol):
    """The shape of one endpoint's answers."""

    @property
    def end_of_stream(self) -> str:
        """What comes last of all, whatever happened."""
        ...

    def opening(self) -> Iterable[Body]:
        """Chunks that need no token."""
        ...

    def chunks(self, delta: ChoiceDelta) -> Iterable[Body]:
        """None where all that came is held back."""
        ...

    def closing(self, usage: Usage, metrics: Metrics) -> Iterable[Body]:
        """Chunks behind the last token."""
        ...

    def failure(self, error: ApiError) -> str:
        """The event of an error behind the headers."""
        ...

    def answer(self, choices: list[ChoiceDelta], usage: Usage, metrics: Metrics) -> Body:
        """The whole answer, from each choice's joined deltas."""
        ...


class DataEvents:
    """What a Renderer inherits whose events have no names: OpenAI's chat and completions."""

    end_of_stream = sse.DONE

    def failure(self, error: ApiError) -> str:
        return sse.event(error.body.model_dump_json())


async def respond(context: AppContext, request: Request, plan: RequestPlan, renderer: Renderer) -> Response:
    """Raises ApiError if the request cannot start, or if it fails and is not streamed."""
    setattr(request.state, ANSWER_ID, plan.api_id)
    with ExitStack() as ends:
        active = open_request(context, plan, request.headers)
        ends.callback(active.close)
        response = await _unless_client_leaves(request, _begun(context, active, plan, renderer))
        if isinstance(response, sse.EventStream):
            ends.pop_all()  # from here on the stream closes the request, and notices a disconnect
        return response or Response(status_code=CLIENT_LEFT)


async def _begun(
    context: AppContext, active: ActiveRequest, plan: RequestPlan, renderer: Renderer
) -> Response:
    """Submit the request and return its answer, or the stream of it."""
    await active.submit()
    if plan.body.stream:
        events = _events(active, plan, renderer, _padded_to(context, plan.body))
        return sse.EventStream(
            events, active.limit_headers, timeout_s=active.remaining_s + _LAST_EVENTS_S, on_close=active.close
        )
    answer = await _whole(active, plan, renderer)
    return Response(answer, headers=active.limit_headers, media_type="application/json")


async def _unless_client_leaves(request: Request, begun: Coroutine[Any, Any, Response]) -> Response | None:
    """None if the client disconnected first. Both tasks have ended when the call returns."""
    answer = asyncio.ensure_future(begun)
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


async def _whole(active: ActiveRequest, plan: RequestPlan, renderer: Renderer) -> str:
    deltas: list[list[ChoiceDelta]] = [[] for _ in range(plan.num_choices)]
    async for delta in active.deltas():
        deltas[delta.index].append(delta)
    choices = [ChoiceDelta.join(of_choice) for of_choice in deltas]
    figures = _figures(active, plan)
    asked = plan.sampling.prompt_logprobs
    size = 0 if asked is None else plan.num_prompt_tokens * plan.body.n * (asked + 1)
    return await off_loop(lambda: renderer.answer(choices, *figures).to_json(), size)


def _padded_to(context: AppContext, body: GenerationBody) -> int:
    """As the request asks, else as the service does."""
    asked = None if body.stream_options is None else body.stream_options.include_obfuscation
    if asked is None:
        return context.stream_padding_bytes
    return (context.stream_padding_bytes or PADDING_BYTES) if asked else 0


async def _events(
    active: ActiveRequest, plan: RequestPlan, renderer: Renderer, padded_to: int
) -> AsyncIterator[str]:
    """The events of a stream. An error after the headers is an event too."""
    try:
        for body in renderer.opening():
            yield sse.event(body.to_json(), body.event_name, padded_to=padded_to)
        async for delta in active.deltas():
            if _says_something(delta, plan):
                for body in renderer.chunks(delta):
                    yield sse.event(body.to_json(), body.event_name, padded_to=padded_to)
        for body in renderer.closing(*_figures(active, plan)):
            yield sse.event(body.to_json(), body.event_name, padded_to=padded_to)
    except ApiError as error:
        yield renderer.failure(error)
    except Exception as error:
        _log.error("request %s failed after its headers were sent: %s", plan.api_id, where_raised(error))
        yield renderer.failure(internal_error())
    yield renderer.end_of_stream


def _says_something(delta: ChoiceDelta, plan: RequestPlan) -> bool:
    """Whether a chunk has content to send."""
    wants_tokens = plan.body.return_token_ids or plan.sampling.logprobs is not None
    has_prompt = delta.prompt_logprobs is not None
    return bool(delta.text or delta.finish_reason or has_prompt or (wants_tokens and delta.token_ids))


def _figures(active: ActiveRequest, plan: RequestPlan) -> tuple[Usage, Metrics]:
    generations = active.generations
    return usage(plan.num_prompt_tokens, active.num_output_tokens, generations), metrics(generations)
