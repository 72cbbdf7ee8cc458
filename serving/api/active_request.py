"""The running generations of one API request: engine events become deltas, and cleanup always happens.

Invariant: after `close` nothing of the request runs in the engine for longer than one round, and its place in
the queue is free. Everything but `_Listener` runs on the event loop; a submission yields to other tasks after
every few generations.
"""

import asyncio
import time
from collections.abc import AsyncIterator
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
    wake-up of the event loop for each round.
    """

    def __init__(
        self,
        index: int,
        events: EventQueue[_Arrival],
        recorder: Recorder | None,
        capture: CaptureMode,
        eager: bool,
    ) -> None:
        self._index, self._event_queue, self._eager = index, events, eager
        self._recorder, self._capture = recorder, capture
        self._held: list[_Arrival] = []
        self._begun = False

    def __call__(self, event: TokenEvent) -> None:
        self._held.append(_Arrival(self._index, time.monotonic(), event))
        if event.generation is not None and self._recorder is not None:
            # first, so that who has the answer finds the record
            self._recorder.record(event.generation, self._capture)
        if self._eager or not self._begun or event.generation is not None:
            self._begun = True
            self._event_queue.post(self._held)
            self._held = []


class ActiveRequest:
    """Made by `open_request`; must be closed."""

    def __init__(self, context: AppContext, plan: RequestPlan, ticket: Ticket, began_s: float) -> None:
        self._context, self._plan, self._ticket = context, plan, ticket
        self._deadline_s = began_s + context.request_timeout_s
        self._clocks = [context.metrics.clock(began_s) for _ in range(plan.num_choices)]
        self._event_queue: EventQueue[_Arrival] = EventQueue()
        self._handles: list[GenerationHandle] = []
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
        recorder, capture = self._context.recorder, self._plan.capture
        listener = _Listener(index, self._event_queue, recorder, capture, eager)
        self._handles.append(self._context.engine.submit(request, listener))

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

    async def _take(self) -> list[_Arrival]:
        try:
            return await self._event_queue.take(max(0.0, self._deadline_s - time.monotonic()))
        except TimeoutError:
            seconds = self._context.request_timeout_s
            raise ApiError(408, f"The request took longer than {seconds:g} s and was cancelled.") from None

    def _push(self, arrival: _Arrival) -> list[ChoiceDelta]:
        state, clock = self._states[arrival.index], self._clocks[arrival.index]
        clock.tokens(len(arrival.event.token_ids), arrival.at_s)
        try:
            deltas = [state.push(event) for event in self._chunks[arrival.index].cut(arrival.event)]
        except ApiError:
            clock.finished("error", arrival.at_s)
            raise
        if state.wants_cancel:
            self._handles[arrival.index].cancel()
        if state.done:
            generation = arrival.event.generation
            assert generation is not None, "the last event carries it"
            self.generations.append(generation)
            clock.queued(generation.queued_s)
            clock.finished(deltas[-1].finish_reason or "stop", arrival.at_s)
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


def open_request(context: AppContext, plan: RequestPlan) -> ActiveRequest:
    """Take a place in the queue. Raises ApiError, and then holds no place."""
    began_s = time.monotonic()
    if not context.is_ready:
        message = "The server is not ready: it is loading, draining or shutting down."
        raise ApiError(503, message, headers={"Retry-After": "1"})
    try:
        ticket = context.admission.admit(plan.num_choices, plan.num_prompt_tokens * plan.body.n)
    except QueueFullError as error:
        raise queue_full(error) from None
    return ActiveRequest(context, plan, ticket, began_s)
