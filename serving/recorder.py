"""Turns a finished generation into records for the buffer. Runs on the engine thread for microseconds.

Knows neither HTTP nor what the sinks do. Invariants: nothing here blocks, and nothing raises into the engine;
the record itself is built on a sink's thread; a record of capture mode `memory` reaches no other sink.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from buffer.controls import Controls
from buffer.records import GenerationRecord, RecordSampling, RoundTrace
from buffer.store import StreamKey
from serving.capture_mode import CaptureMode, CapturePolicy
from serving.engine.request import CapturedRound, Generation, SamplingParams

_log = logging.getLogger(__name__)

MAX_RECORD_TOKENS = 512
"""Output tokens of one record; a longer generation becomes several."""


class RecordSink(Protocol):
    """Where records go: the buffer's exporter. `submit` returns at once and drops when it is full."""

    def submit(
        self, key: StreamKey, record: GenerationRecord | Callable[[], GenerationRecord], num_bytes: int, /
    ) -> object: ...


@dataclass(frozen=True)
class RecordPlace:
    """Where records of one capture mode go, and how long they live."""

    sink: RecordSink
    ttl_s: float


@dataclass(frozen=True)
class _Segment:
    """Rounds [first, end) of a generation; its output is [start, stop) of prompt + output."""

    number: int
    first: int
    end: int
    start: int
    stop: int


class Recorder:
    """`target_revision` names the stream; `replica_id` signs the records. `capture_rate` is the setting, in
    whose place an operator may order another by `controls`. `policy`: what service and routes allow. Records
    of `isolated_routes` say so."""

    def __init__(
        self,
        places: Mapping[CaptureMode, RecordPlace],
        *,
        target_revision: str,
        replica_id: str,
        capture_rate: float,
        policy: CapturePolicy = CapturePolicy(),  # noqa: B008  # frozen
        isolated_routes: Collection[str] = (),
        controls: Callable[[], Controls] = Controls,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`places`: of every mode but `off` that can come up; what has none is not recorded."""
        self._places, self._policy, self._controls = dict(places), policy, controls
        self._target_revision, self._replica_id = target_revision, replica_id
        self._capture_rate, self._clock = capture_rate, clock
        self._isolated_routes = isolated_routes

    @property
    def capture_rate(self) -> float:
        """Share of requests that is recorded now."""
        ordered = self._controls().capture_rate
        return self._capture_rate if ordered is None else ordered

    def mode_of(
        self,
        request_id: str,
        store: bool | None,
        route: str | None = None,
        tenant_capture: CaptureMode | None = None,
    ) -> CaptureMode:
        """How to capture this request, as far as is known when it is admitted; the rate decides always the
        same for the same id. `route` None: the prompt decides, and `record` sees to it."""
        if _unit_hash(request_id) >= self.capture_rate:
            return "off"
        mode = self._policy.mode(store=store, route=route, tenant=tenant_capture)
        return mode if mode in self._places else "off"

    def record(self, generation: Generation, admitted: CaptureMode) -> None:
        """Submit the captured rounds of a finished or cancelled generation, if there are any, in the mode in
        which it was admitted or, where its route turned out to have one, a stricter one."""
        try:
            mode = self._policy.mode(route=generation.route, tenant=admitted)
            place = self._places.get(mode)
            if place is None:
                return
            key, now_s = StreamKey(self._target_revision, generation.route), self._clock()
            for segment in _segments(generation):
                rounds = generation.captured_rounds[segment.first : segment.end]
                num_bytes = sum(captured.num_bytes for captured in rounds)
                if generation.prompt_embedding_H is not None:
                    num_bytes += generation.prompt_embedding_H.nbytes
                build = partial(self._build, generation, segment, now_s, now_s + place.ttl_s)
                place.sink.submit(key, build, num_bytes)
        except Exception:
            _log.exception(
                "request %s could not be recorded; its answer is unaffected", generation.request_id
            )

    def _build(
        self, generation: Generation, segment: _Segment, now_s: float, expires_at_s: float
    ) -> GenerationRecord:
        tokens = np.array([*generation.prompt_token_ids, *generation.output_token_ids], dtype=np.int32)
        rounds = generation.captured_rounds[segment.first : segment.end]
        return GenerationRecord(
            record_id=f"{generation.request_id}-{generation.choice_index}-{segment.number}",
            request_id=generation.request_id,
            route=generation.route,
            target_revision=self._target_revision,
            sampling=_record_sampling(generation.sampling),
            prompt_token_ids=tokens[: segment.start],
            output_token_ids=tokens[segment.start : segment.stop],
            rounds=tuple(_trace(captured) for captured in rounds),
            created_at_s=now_s,
            expires_at_s=expires_at_s,
            replica_id=self._replica_id,
            segment=segment.number,
            prompt_embedding_H=generation.prompt_embedding_H,
            isolated=generation.route in self._isolated_routes,
        )


def _unit_hash(request_id: str) -> float:
    """A hash of the id, uniform on [0, 1), so that rate 0 takes none and rate 1 takes all."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:6], "big") / 2**48


def _segments(generation: Generation) -> Iterator[_Segment]:
    """Cut between rounds, as soon as a segment has MAX_RECORD_TOKENS."""
    rounds = generation.captured_rounds
    total = len(generation.prompt_token_ids) + len(generation.output_token_ids)
    number, first = 0, 0
    for end in range(1, len(rounds) + 1):
        stop = rounds[end].start if end < len(rounds) else total
        if end == len(rounds) or stop - rounds[first].start >= MAX_RECORD_TOKENS:
            yield _Segment(number, first, end, rounds[first].start, stop)
            number, first = number + 1, end


def _record_sampling(sampling: SamplingParams) -> RecordSampling:
    """Penalties, bias and `min_tokens` change the logits, which the record's sampling parameters do not
    describe."""
    return RecordSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        mode=sampling.mode,
        context_dependent=sampling.context_dependent,
    )


def _trace(captured: CapturedRound) -> RoundTrace:
    return RoundTrace(
        start=captured.start,
        drafter_id=captured.drafter_id,
        draft_route=captured.draft_route,
        draft_version=captured.draft_version,
        num_accepted=captured.num_accepted,
        num_attempted=captured.num_attempted,
        drafted_token_ids_G=captured.drafted_token_ids_G,
        drafted_target_logprobs_G=captured.drafted_target_logprobs_G,
        drafted_draft_logprobs_G=captured.drafted_draft_logprobs_G,
        emitted_target_logprobs_C=captured.emitted_target_logprobs_C,
        topk_token_ids_EK=captured.topk_token_ids_EK,
        topk_logprobs_EK=captured.topk_logprobs_EK,
        retemper_E=captured.retemper_E,
    )
