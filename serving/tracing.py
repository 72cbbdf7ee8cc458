"""OpenTelemetry traces, from a request to its rounds to its records; the only file that imports it.

A span of the request, in it one of each generation with its rounds as events, and under that one of every
record, which ends when the buffer has it. Where they go, and how many are kept, is said by OpenTelemetry's
own environment variables. Invariants: a span holds ids, sizes and times, never text or tokens; nothing waits
for a collector.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace import set_span_in_context as within
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from buffer.records import GenerationRecord
from serving.engine.request import CapturedRound, Generation, VersionSpan

if TYPE_CHECKING:
    from serving.api.request_plan import RequestPlan

MAX_ROUNDS = 100
"""Events of a generation: its first rounds."""
_MAX_AWAITED = 4096
"""Generations whose records may still come."""
_FLUSH_MS = 2_000


class RequestTracing:
    """Of one replica. Owns a thread, which exports."""

    def __init__(self, *, replica_id: str, version: str) -> None:
        named = Resource({"service.name": "everdraft", "service.version": version})
        own = Resource({"service.instance.id": replica_id})
        resource = named.merge(OTELResourceDetector().detect()).merge(own)
        self._processor = BatchSpanProcessor(OTLPSpanExporter())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("everdraft", version)
        self._unix_minus_monotonic_s = time.time() - time.monotonic()
        self._awaited: OrderedDict[str, SpanContext] = OrderedDict()
        self._lock = Lock()

    def begin(
        self, plan: "RequestPlan", headers: Mapping[str, str], began_s: float, request_id: str
    ) -> "RequestTrace | None":
        """None: the sampler, or the caller's trace, leaves this request out. `began_s`: monotonic."""
        caller = TraceContextTextMapPropagator().extract(headers)
        span = self._tracer.start_span(
            "llm_request",
            caller,
            SpanKind.SERVER,
            attributes=_asked(plan, request_id),
            start_time=self.unix_ns(began_s),
        )
        if not span.is_recording():
            return None
        return RequestTrace(self, self._tracer, span, plan, began_s)

    def unix_ns(self, monotonic_s: float) -> int:
        return int((monotonic_s + self._unix_minus_monotonic_s) * 1e9)

    def await_records(self, generation_id: str, parent: SpanContext) -> None:
        """Records of this generation belong to that span; from any thread."""
        with self._lock:
            self._awaited[generation_id] = parent
            if len(self._awaited) > _MAX_AWAITED:
                self._awaited.popitem(last=False)

    def exported(self, records: Sequence[GenerationRecord]) -> None:
        """The buffer has these records."""
        for record in records:
            with self._lock:
                parent = self._awaited.get(record.record_id.rpartition("-")[0])
            if parent is not None:
                span = self._tracer.start_span(
                    "record.export",
                    within(NonRecordingSpan(parent)),
                    SpanKind.PRODUCER,
                    attributes={
                        "everdraft.record.id": record.record_id,
                        "everdraft.record.num_rounds": len(record.rounds),
                    },
                    start_time=int(record.created_at_s * 1e9),
                )
                span.end()

    def close(self) -> None:
        """Send what is left, for a bounded time."""
        self._processor.force_flush(_FLUSH_MS)
        self._provider.shutdown()


class RequestTrace:
    """One request; used on the event loop. Times are monotonic seconds."""

    def __init__(
        self, tracing: RequestTracing, tracer: Tracer, span: Span, plan: "RequestPlan", began_s: float
    ) -> None:
        self._tracing, self._span, self._plan, self._began_s = tracing, span, plan, began_s
        self._first_s: float | None = None
        self._num_tokens = 0
        self._reasons: list[str] = []
        inside: Context = within(span)
        start_ns = tracing.unix_ns(began_s)
        self._generations = [
            _GenerationTrace(tracing, tracer.start_span("generation", inside, start_time=start_ns), began_s)
            for _ in range(plan.num_choices)
        ]
        if plan.capture != "off":
            for request, trace in zip(plan.requests(), self._generations, strict=True):
                generation_id = f"{request.request_id}-{request.choice_index}"
                tracing.await_records(generation_id, trace.span.get_span_context())

    def arrived(
        self, index: int, num_tokens: int, at_s: float, generation: Generation | None, reason: str | None
    ) -> None:
        """A round of choice `index` ended; `generation` and why it ended, if it was the last one."""
        if num_tokens:
            self._num_tokens += num_tokens
            self._first_s = self._first_s or at_s
            self._generations[index].round(num_tokens, at_s)
        if generation is not None:
            self._reasons.append(reason or "stop")
            self._generations[index].end(generation, reason or "stop", at_s)

    def failed(self, index: int, at_s: float) -> None:
        self._reasons.append("error")
        self._generations[index].give_up("error", at_s)
        self._span.set_status(Status(StatusCode.ERROR, "a generation failed"))

    def close(self) -> None:
        """What has not ended was aborted; safe to call twice."""
        now_s = time.monotonic()
        for trace in self._generations:
            if trace.span.is_recording():
                self._reasons.append("abort")
                trace.give_up("abort", now_s)
        figures: dict[str, Any] = {
            "gen_ai.usage.completion_tokens": self._num_tokens,
            "gen_ai.response.finish_reasons": tuple(self._reasons),
            "gen_ai.latency.e2e": now_s - self._began_s,
        }
        if self._first_s is not None:
            figures["gen_ai.latency.time_to_first_token"] = self._first_s - self._began_s
        self._span.set_attributes(figures)
        self._span.end(self._tracing.unix_ns(now_s))


class _GenerationTrace:
    def __init__(self, tracing: RequestTracing, span: Span, began_s: float) -> None:
        self._tracing, self.span, self._began_s = tracing, span, began_s
        self._rounds: list[tuple[float, int]] = []

    def round(self, num_tokens: int, at_s: float) -> None:
        if len(self._rounds) < MAX_ROUNDS:
            self._rounds.append((at_s, num_tokens))

    def end(self, generation: Generation, reason: str, at_s: float) -> None:
        self._add_rounds(generation)
        first_s = self._rounds[0][0] if self._rounds else at_s
        self.span.set_attributes(
            {
                "gen_ai.response.finish_reasons": (reason,),
                "gen_ai.usage.prompt_tokens": len(generation.prompt_token_ids),
                "gen_ai.usage.completion_tokens": len(generation.output_token_ids),
                "gen_ai.latency.time_in_queue": generation.queued_s,
                "gen_ai.latency.time_to_first_token": first_s - self._began_s,
                "gen_ai.latency.time_in_model_decode": at_s - first_s,
                "gen_ai.latency.e2e": at_s - self._began_s,
                "everdraft.generation.id": f"{generation.request_id}-{generation.choice_index}",
                "everdraft.route": generation.route,
                "everdraft.num_rounds": generation.num_rounds,
                "everdraft.num_draft_tokens": generation.num_drafted,
                "everdraft.num_attempted_tokens": generation.num_attempted,
                "everdraft.num_accepted_tokens": generation.num_accepted,
                "everdraft.draft_versions": tuple(span.draft_version for span in generation.draft_versions),
            }
        )
        if generation.captured_rounds:
            submitted = {"everdraft.record.num_rounds": len(generation.captured_rounds)}
            self.span.add_event("record.submitted", submitted, self._tracing.unix_ns(at_s))
        self.span.end(self._tracing.unix_ns(at_s))

    def give_up(self, reason: str, at_s: float) -> None:
        """It ended without a whole answer."""
        self.span.set_attribute("gen_ai.response.finish_reasons", (reason,))
        if reason == "error":
            self.span.set_status(Status(StatusCode.ERROR))
        self.span.end(self._tracing.unix_ns(at_s))

    def _add_rounds(self, generation: Generation) -> None:
        num_prompt, position = len(generation.prompt_token_ids), 0
        captured = {each.start - num_prompt: each for each in generation.captured_rounds}
        for at_s, num_tokens in self._rounds:
            figures = _round(position, num_tokens, generation.draft_versions, captured.get(position))
            self.span.add_event("round", figures, self._tracing.unix_ns(at_s))
            position += num_tokens


def _round(
    position: int, num_tokens: int, versions: Sequence[VersionSpan], captured: CapturedRound | None
) -> dict[str, int]:
    """What is known of a round; how much was drafted in it only if it was captured."""
    figures = {"everdraft.position": position, "everdraft.num_tokens": num_tokens}
    version = next((span.draft_version for span in versions if span.start <= position < span.end), None)
    if version is not None:
        figures["everdraft.draft_version"] = version
    if captured is not None:
        figures["everdraft.num_draft_tokens"] = len(captured.drafted_token_ids_G)
        figures["everdraft.num_accepted_tokens"] = captured.num_accepted
    return figures


def _asked(plan: "RequestPlan", request_id: str) -> dict[str, Any]:
    sampling = plan.sampling
    return {
        "gen_ai.operation.name": "text_completion" if plan.api_id.startswith("cmpl-") else "chat",
        "gen_ai.request.model": plan.model,
        "gen_ai.response.model": plan.model,
        "gen_ai.request.id": plan.api_id,
        "gen_ai.request.n": plan.body.n,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.usage.num_sequences": plan.num_choices,
        "gen_ai.usage.prompt_tokens": plan.num_prompt_tokens,
        "everdraft.request_id": request_id,
        "everdraft.tenant": plan.tenant or "",
    }
