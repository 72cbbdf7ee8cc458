"""Turns a finished generation into records for the buffer. Runs on the engine thread for microseconds.

Knows neither HTTP nor what the sink does. Invariant: nothing here blocks, and nothing raises into the engine;
the record itself is built on the sink's thread.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from buffer.controls import Controls
from buffer.records import GenerationRecord, RecordSampling, RoundTrace
from buffer.store import StreamKey
from serving.engine.request import CapturedRound, Generation, SamplingParams
from serving.tenants import CaptureMode

_log = logging.getLogger(__name__)

MAX_RECORD_TOKENS = 512
"""Output tokens of one record; a longer generation becomes several."""


class RecordSink(Protocol):
    """Where records go: the buffer's exporter. `submit` returns at once and drops when it is full."""

    def submit(
        self, key: StreamKey, record: GenerationRecord | Callable[[], GenerationRecord], num_bytes: int, /
    ) -> object: ...


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
    whose place an operator may order another by `controls`. Records of `isolated_routes` say so."""

    def __init__(
        self,
        sink: RecordSink,
        *,
        target_revision: str,
        replica_id: str,
        capture_rate: float,
        record_ttl_s: float,
        isolated_routes: Collection[str] = (),
        controls: Callable[[], Controls] = Controls,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sink, self._controls = sink, controls
        self._target_revision, self._replica_id = target_revision, replica_id
        self._capture_rate, self._record_ttl_s = capture_rate, record_ttl_s
        self._isolated_routes = isolated_routes
        self._clock = clock

    @property
    def capture_rate(self) -> float:
        """Share of requests that is recorded now."""
        ordered = self._controls().capture_rate
        return self._capture_rate if ordered is None else ordered

    def wants(self, request_id: str, store: bool | None, tenant_capture: CaptureMode | None = None) -> bool:
        """Whether to capture this request; always the same for the same id. `store: false` is never
        captured, and a tenant's only if it allows what is kept on a disk."""
        allowed = store is not False and tenant_capture in (None, "replay")
        return allowed and _unit_hash(request_id) < self.capture_rate

    def record(self, generation: Generation) -> None:
        """Submit the captured rounds of a finished or cancelled generation, if there are any."""
        try:
            key = StreamKey(self._target_revision, generation.route)
            now_s = self._clock()
            for segment in _segments(generation):
                rounds = generation.captured_rounds[segment.first : segment.end]
                num_bytes = sum(captured.num_bytes for captured in rounds)
                if generation.prompt_embedding_H is not None:
                    num_bytes += generation.prompt_embedding_H.nbytes
                self._sink.submit(key, partial(self._build, generation, segment, now_s), num_bytes)
        except Exception:
            _log.exception(
                "request %s could not be recorded; its answer is unaffected", generation.request_id
            )

    def _build(self, generation: Generation, segment: _Segment, now_s: float) -> GenerationRecord:
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
            expires_at_s=now_s + self._record_ttl_s,
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
