"""The running generations of one API request: engine events become deltas, and cleanup always happens.

Invariant: after `close` nothing of the request runs in the engine for longer than one round, and its place in
the queue is free. Everything but `_Listener` runs on the event loop; a submission yields to other tasks after
every few generations.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from serving.api.admission import QueueFullError, Ticket
from serving.api.choices import ChoiceDelta, ChoiceState
from serving.api.context import AppContext
from serving.api.errors import ApiError, from_value_error, queue_full
from serving.api.event_queue import EventQueue
from serving.api.fixed_chunks import FixedChunks
from serving.api.request_plan import RequestPlan
from serving.api.text_stream import TextStream
from serving.capture_mode import CaptureMode
from serving.engine.engine import EngineClosedError
from serving.engine.handle import GenerationHandle
from serving.engine.request import Generation, GenerationRequest, TokenEvent
from serving.log_lines import REQUEST_ID
from serving.recorder import Recorder

_SLICE = 8
"""Generations submitted before other tasks on the event loop may run."""


@dataclass(frozen=True)
class _Arrival:
    index: int
    at_s: float
    event: TokenEvent


class _Listener:
    """Called on the engine thread: timestamps events, posts them to the event loop, and records the
    generation.

    Unless `eager`, events after the first are held until the last: an answer that is sent whole needs no
    wake-up of the event loop for each round. `on_end` runs on the event loop.
    """

    def __init__(
        self,
        index: int,
        events: EventQueue[_Arrival],
        recorder: Recorder | None,
        capture: CaptureMode,
        on_end: Callable[[], None],
        *,
        eager: bool,
    ) -> None:
        self._index, self._event_queue, self._eager = index, events, eager
        self._recorder, self._capture, self._on_end = recorder, capture, on_end
        self._held: list[_Arrival] = []
        self._begun = False

    def __call__(self, event: TokenEvent) -> None:
        self._held.append(_Arrival(self._index, time.monotonic(), event))
        if event.generation is not None and self._recorder is not None:
            # first, so that who has the answer finds the record
            self._recorder.record(event.generation, self._capture)
        if self._eager or not self._begun or event.generation is not None:
            self._begun = True
            self._event_queue.post(self._held, None if event.generation is None else self._on_end)
            self._held = []


class ActiveRequest:
    """Made by `open_request`; must be closed."""

    def __init__(
        self,
        context: AppContext,
        plan: RequestPlan,
        ticket: Ticket,
        began_s: float,
        headers: Mapping[str, str],
    ) -> None:
        self._context, self._plan, self._ticket = context, plan, ticket
        asked_s = context.request_timeout_s if plan.timeout_s is None else plan.timeout_s
        self._timeout_s = min(asked_s, context.request_timeout_s)
        self._deadline_s = began_s + self._timeout_s
        self._quota = context.rate_limits.of(plan.key_holder)
        tenant = plan.tenant or ""
        self._clocks = [context.metrics.clock(began_s, tenant) for _ in range(plan.num_choices)]
        self._trace = None
        if context.tracing is not None:
            self._trace = context.tracing.begin(plan, headers, began_s, REQUEST_ID.get())
        self._event_queue: EventQueue[_Arrival] = EventQueue()
        self._handles: list[GenerationHandle] = []
        self._num_running, self._is_open = plan.num_choices, True
        context.num_open += 1
        self._states = [self._new_state(index) for index in range(plan.num_choices)]
        self._chunk_tokens = context.stream_interval if plan.body.stream else 1
        self._chunks = [FixedChunks(self._chunk_tokens) for _ in range(plan.num_choices)]
        self.generations: list[Generation] = []
        """Generations that ended, in the order of their ends."""

    async def submit(self) -> None:
        """Submit every choice to the engine; called once. Raises ApiError; `close` ends generations that were
        submitted by then."""
        try:
            for index, request in enumerate(self._plan.requests()):
                if index and index % _SLICE == 0:
                    await asyncio.sleep(0)
                self._submit(index, request)
        except ValueError as error:
            raise from_value_error(error) from None
        except EngineClosedError:
            raise ApiError(503, "The server is shutting down; the request was not started.") from None

    def _submit(self, index: int, request: GenerationRequest) -> None:
        body = self._plan.body
        eager = body.stream or bool(body.stop_strings)
        recorder, capture, on_end = self._context.recorder, self._plan.capture, self._generation_ended
        listener = _Listener(index, self._event_queue, recorder, capture, on_end, eager=eager)
        self._handles.append(self._context.engine.submit(request, listener))

    @property
    def limit_headers(self) -> dict[str, str]:
        """What is left to the request's tenant, as headers of its answer."""
        return {} if self._quota is None else self._quota.headers()

    @property
    def remaining_s(self) -> float:
        """Until its deadline."""
        return self._deadline_s - time.monotonic()

    @property
    def num_output_tokens(self) -> int:
        return sum(state.num_tokens for state in self._states)

    async def deltas(self) -> AsyncIterator[ChoiceDelta]:
        """Yields deltas until every choice has ended; at most one a choice for each wake-up, unless the
        number of their tokens is fixed.

        Raises ApiError: the deadline passed, or the engine failed or closed."""
        while not all(state.done for state in self._states):
            arrivals = await self._take()
            self._ticket.start()
            by_choice: dict[int, list[ChoiceDelta]] = {}
            for arrival in arrivals:
                by_choice.setdefault(arrival.index, []).extend(self._push(arrival))
            for deltas in by_choice.values():
                for delta in [ChoiceDelta.join(deltas)] if self._chunk_tokens == 1 else deltas:
                    yield delta

    def close(self) -> None:
        """Cancel all generations that still run; safe to call twice."""
        for state, clock, handle in zip(self._states, self._clocks, self._handles, strict=False):
            if not state.done:
                handle.cancel()
                clock.finished("abort")
        self._ticket.release()
        self._context.num_open -= self._is_open
        self._is_open = False
        if self._trace is not None:
            self._trace.close()

    def _generation_ended(self) -> None:
        """In the engine, where its slot is free; a client that reads slowly keeps no place from others."""
        self._num_running -= 1
        if self._num_running == 0:
            self._ticket.release()

    async def _take(self) -> list[_Arrival]:
        try:
            return await self._event_queue.take(max(0.0, self._deadline_s - time.monotonic()))
        except TimeoutError:
            text = f"The request took longer than {self._timeout_s:g} s and was cancelled."
            raise ApiError(408, text) from None

    def _push(self, arrival: _Arrival) -> list[ChoiceDelta]:
        state, clock = self._states[arrival.index], self._clocks[arrival.index]
        clock.tokens(len(arrival.event.token_ids), arrival.at_s)
        if self._quota is not None:
            self._quota.answered(len(arrival.event.token_ids))
        try:
            deltas = [state.push(event) for event in self._chunks[arrival.index].cut(arrival.event)]
        except ApiError:
            clock.finished("error", arrival.at_s)
            if self._trace is not None:
                self._trace.failed(arrival.index, arrival.at_s)
            raise
        if self._trace is not None:
            ended = (arrival.event.generation, deltas[-1].finish_reason) if state.done else (None, None)
            self._trace.arrived(arrival.index, len(arrival.event.token_ids), arrival.at_s, *ended)
        if state.wants_cancel:
            self._handles[arrival.index].cancel()
        if state.done:
            generation = arrival.event.generation
            assert generation is not None, "the last event carries it"
            self.generations.append(generation)
            clock.finished(deltas[-1].finish_reason or "stop", arrival.at_s, generation=generation)
        return deltas

    def _new_state(self, index: int) -> ChoiceState:
        body = self._plan.body
        include_stop = body.include_stop_str_in_output
        stream = TextStream(
            self._context.codec,
            body.stop_strings,
            include_stop_string=include_stop,
            min_tokens=body.min_tokens,
            skip_special_tokens=body.skip_special_tokens,
        )
        return ChoiceState(index, stream, include_stop=include_stop)


def open_request(context: AppContext, plan: RequestPlan, headers: Mapping[str, str]) -> ActiveRequest:
    """Take a place in the queue. `headers` of the request may say which trace it belongs to. Raises ApiError,
    and then holds no place."""
    began_s = time.monotonic()
    context.require_ready()
    tenant, num_prompt_tokens = plan.key_holder, plan.num_prompt_tokens * plan.body.n
    quota = context.rate_limits.of(tenant)
    if quota is not None:
        quota.check(num_prompt_tokens)
    most = None if tenant is None else tenant.max_concurrent
    try:
        ticket = context.admission.admit(plan.num_choices, num_prompt_tokens, plan.tenant, most)
    except QueueFullError as error:
        raise queue_full(error) from None
    if quota is not None:
        quota.begin(num_prompt_tokens)
    return ActiveRequest(context, plan, ticket, began_s, headers)
