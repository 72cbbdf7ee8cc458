"""Prometheus metrics: the engine's counters, and latencies of requests.

Every help text states its definition; what vLLM has too comes under its names as well (`vllm_metrics`). Has
its own registry and no globals. Every sample carries the replica's label; a route's name is a label only
while the route has a draft of its own, and tenants are the operator's, so there are few of both.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from buffer.exporter import DROP_REASONS, RecordExporter
from serving.engine.request import Generation
from serving.engine.stats import EngineStats
from serving.vllm_metrics import vllm_families

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REQUEST_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_SIZE_BUCKETS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))

_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": (
        "From arrival to the first token, the wait for a slot included.",
        _REQUEST_BUCKETS_S,
    ),
    "inter_token_latency_seconds": (
        "Between two rounds' tokens, divided by the tokens of the later round; once for each of them.",
        _TOKEN_BUCKETS_S,
    ),
    "request_queue_time_seconds": ("From the engine's queue to a slot.", _REQUEST_BUCKETS_S),
    "request_prefill_time_seconds": ("From a slot to the first token.", _REQUEST_BUCKETS_S),
    "request_decode_time_seconds": ("From the first token to the last.", _REQUEST_BUCKETS_S),
    "e2e_request_latency_seconds": ("From arrival to the end of a generation.", _REQUEST_BUCKETS_S),
    "request_prompt_tokens": ("Prompt tokens of a generation that ended by itself.", _SIZE_BUCKETS),
    "request_generation_tokens": ("Output tokens of a generation that ended by itself.", _SIZE_BUCKETS),
}
"""By tenant."""

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Generations that hold a slot.", lambda s: s.num_running),
    "num_requests_waiting": ("Generations that wait for a slot.", lambda s: s.num_waiting),
    "kv_cache_usage_perc": (
        "Cached tokens over the tokens that all slots hold together; 1 is full.",
        lambda s: s.num_cached_tokens / s.max_cached_tokens if s.max_cached_tokens else 0.0,
    ),
    "prefix_cache_bytes": (
        "Keys and values held of earlier prompts.",
        lambda s: s.prefix_cache.num_bytes,
    ),
    "draft_version": (
        "Version of the default route's draft that serves now; 0 is the floor.",
        lambda s: s.draft_version,
    ),
    "num_draft_tokens": ("Draft length in use now.", lambda s: s.num_draft_tokens),
    "mean_batch_size": ("Sequences in a round, mean of the last rounds.", lambda s: s.mean_batch_size),
    "round_seconds_median": ("Median seconds of the last rounds.", lambda s: s.round_s_median),
    "swap_pause_seconds_max": (
        "The most that a swap under load and the round after it took beyond a median round.",
        lambda s: s.swap_pause_s_max,
    ),
    "draft_disabled": ("1 while the draft is switched off.", lambda s: float(bool(s.draft_disabled_reason))),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prompt_tokens": (
        "Prompt tokens taken in, those reused from the prefix cache included.",
        lambda s: s.num_prompt_tokens,
    ),
    "generation_tokens": ("Output tokens emitted.", lambda s: s.num_output_tokens),
    "prefix_cache_queries": (
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_cache.num_query_tokens,
    ),
    "prefix_cache_hits": (
        "Of these, tokens whose keys and values were there. Over the queries it is the hit rate.",
        lambda s: s.prefix_cache.num_hit_tokens,
    ),
    "prefix_cache_evictions": (
        "Blocks that gave way to others.",
        lambda s: s.prefix_cache.num_evicted_blocks,
    ),
    "draft_swaps": ("Drafts swapped in.", lambda s: s.num_swaps),
    "draft_swaps_under_load": ("Drafts swapped in while sequences ran.", lambda s: s.num_swaps_under_load),
}
_BY_DRAFTER = {
    "spec_decode_num_drafts": ("num_rounds", "Rounds, each one target pass, those of draft length 0 too."),
    "spec_decode_num_drafted_rounds": ("num_drafted_rounds", "Rounds that decided a draft token or more."),
    "spec_decode_num_draft_tokens": ("num_drafted", "Draft tokens proposed."),
    "spec_decode_num_attempted_tokens": (
        "num_attempted",
        "Draft tokens decided: accepted, plus one for each rejection. Accepted over this is acceptance_rate.",
    ),
    "spec_decode_num_accepted_tokens": (
        "num_accepted",
        "Draft tokens accepted. Over spec_decode_num_draft_tokens it is draft utilization.",
    ),
}


class RequestClock:
    """The latencies of one generation. Times are those of `time.monotonic`."""

    def __init__(self, metrics: "ServingMetrics", began_s: float, tenant: str) -> None:
        self._metrics, self._tenant = metrics, tenant
        self._histograms = metrics.histograms(tenant)
        self._began_s = began_s
        self._first_s: float | None = None
        self._last_s = began_s
        self._ended = False

    def tokens(self, num_tokens: int, at_s: float) -> None:
        """Count tokens that came together; the time since the last ones is divided among them."""
        if num_tokens == 0:
            return
        if self._first_s is None:
            self._first_s = at_s
            self._histograms["time_to_first_token_seconds"].observe(at_s - self._began_s)
        else:
            between_tokens = self._histograms["inter_token_latency_seconds"]
            for _ in range(num_tokens):
                between_tokens.observe((at_s - self._last_s) / num_tokens)
        self._last_s = at_s

    def finished(
        self, reason: str, at_s: float | None = None, *, generation: Generation | None = None
    ) -> None:
        """`stop`, `length`, `abort` or `error`; the first call counts. `generation`: what came of it,
        where it ended by itself."""
        if self._ended:
            return
        self._ended = True
        ended_s = time.monotonic() if at_s is None else at_s
        self._histograms["e2e_request_latency_seconds"].observe(ended_s - self._began_s)
        self._metrics.count_request(reason, self._tenant)
        if generation is not None:
            self._measure(generation)

    def _measure(self, generation: Generation) -> None:
        observed = {
            "request_queue_time_seconds": generation.queued_s,
            "request_prompt_tokens": len(generation.prompt_token_ids),
            "request_generation_tokens": len(generation.output_token_ids),
        }
        if self._first_s is not None:
            waited_s = self._first_s - self._began_s
            observed["request_prefill_time_seconds"] = max(0.0, waited_s - generation.queued_s)
            observed["request_decode_time_seconds"] = self._last_s - self._first_s
        for name, value in observed.items():
            self._histograms[name].observe(value)


class _Families(Collector):
    """Metrics that were collected already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


class ServingMetrics(Collector):
    """`num_rejected` and `exporters` are read at every scrape. No exporter: nothing is recorded.
    `model_name`: the label of vLLM's metrics."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        *,
        replica_id: str,
        num_rejected: Callable[[], int],
        exporters: Collection[RecordExporter],
        model_name: str = "",
    ) -> None:
        self._stats, self._replica_id, self._model_name = stats, replica_id, model_name
        self._num_rejected, self._exporters = num_rejected, exporters
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(
                f"everdraft_{name}", text, ["replica", "tenant"], registry=self._registry, buckets=buckets
            )
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._by_tenant: dict[str, dict[str, Histogram]] = {}
        self.histograms("")
        self._finished = Counter(
            "everdraft_request_success",
            "Generations ended, by reason: stop, length, abort (the client left, a deadline), error.",
            ["replica", "tenant", "finished_reason"],
            registry=self._registry,
        )
        self._registry.register(self)

    def clock(self, began_s: float, tenant: str = "") -> RequestClock:
        """`tenant`: whose request it is; empty where there are no tenants."""
        return RequestClock(self, began_s, tenant)

    def histograms(self, tenant: str) -> dict[str, Histogram]:
        """Those of a tenant, by name without prefix."""
        if tenant not in self._by_tenant:
            self._by_tenant[tenant] = {
                name: histogram.labels(self._replica_id, tenant)
                for name, histogram in self._histograms.items()
            }
        return self._by_tenant[tenant]

    def count_request(self, reason: str, tenant: str) -> None:
        self._finished.labels(self._replica_id, tenant, reason).inc()

    def render(self) -> bytes:
        """Prometheus text."""
        ours = list(self._registry.collect())
        return generate_latest(_Families([*ours, *vllm_families(ours, self._model_name)]))

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry must not collect while it is being built."""
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (text, read) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"everdraft_{name}", text, labels=["replica"])
            gauge.add_metric([self._replica_id], read(stats))
            yield gauge
        for name, (text, read) in _COUNTERS.items():
            yield self._counter(name, text, read(stats))
        yield self._counter(
            "requests_rejected",
            "Generations refused with 429: a queue bound was reached.",
            self._num_rejected(),
        )
        if self._exporters:
            yield from self._of_records(self._exporters)
        yield self._by_route(stats)
        yield from self._by_drafter(stats)

    def _of_records(self, exporters: Collection[RecordExporter]) -> Iterator[Metric]:
        yield self._counter(
            "records_submitted",
            "Records on their way to the buffer since the start.",
            sum(exporter.num_submitted for exporter in exporters),
        )
        yield self._counter(
            "records_exported",
            "Records handed to the buffer, those it had included.",
            sum(exporter.num_exported for exporter in exporters),
        )
        yield self._counter(
            "records_rerouted",
            "Records kept as those of the default route: theirs was one too many for a stream of its own.",
            sum(exporter.num_rerouted_records for exporter in exporters),
        )
        text = "Records lost on the way to the buffer, by reason."
        dropped = CounterMetricFamily("everdraft_records_dropped", text, labels=["replica", "reason"])
        for reason in DROP_REASONS:
            num_records = sum(exporter.dropped_by_reason[reason] for exporter in exporters)
            dropped.add_metric([self._replica_id, reason], num_records)
        yield dropped

    def _by_route(self, stats: EngineStats) -> Metric:
        text = "Version that serves a route now, of every route that has a draft of its own; 0 is the floor."
        versions = GaugeMetricFamily("everdraft_route_draft_version", text, labels=["replica", "route"])
        for route, version in sorted(stats.draft_versions.items()):
            versions.add_metric([self._replica_id, route], version)
        return versions

    def _by_drafter(self, stats: EngineStats) -> Iterator[Metric]:
        """`draft_version` is empty if the drafter's weights have no versions."""
        by_draft = [
            ([self._replica_id, route, by.drafter_id, self._version_label(by.draft_version)], counters)
            for route, by_drafter in sorted(stats.route_counts.items())
            for by, counters in by_drafter.items()
        ]
        labels = ["replica", "route", "drafter", "draft_version"]
        for name, (field, text) in _BY_DRAFTER.items():
            family = CounterMetricFamily(f"everdraft_{name}", text, labels=labels)
            for draft, counters in by_draft:
                family.add_metric(draft, getattr(counters, field))
            yield family
        per_position = CounterMetricFamily(
            "everdraft_spec_decode_num_accepted_tokens_per_pos",
            "Rounds that accepted the draft token at this position (0 is the first).",
            labels=[*labels, "position"],
        )
        for draft, counters in by_draft:
            for position, count in enumerate(counters.accepted_by_position):
                per_position.add_metric([*draft, str(position)], count)
        yield per_position

    @staticmethod
    def _version_label(draft_version: int | None) -> str:
        return "" if draft_version is None else str(draft_version)

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"everdraft_{name}", text, labels=["replica"])
        family.add_metric([self._replica_id], value)
        return family
