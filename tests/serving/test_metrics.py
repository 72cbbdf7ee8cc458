"""What Prometheus scrapes is true, labelled and named as dashboards expect."""

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from buffer.exporter import RecordExporter
from buffer.memory_store import MemoryRecordStore
from buffer.names import MODEL_DRAFTER
from buffer.store import Bounds, StreamKey
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.proposal import DrafterVersion
from serving.local import LocalEngine, load_engine
from serving.metrics import ServingMetrics
from serving.options import EngineOptions
from tests.buffer.samples import START_S, borrowed

VLLM_TAILS = (
    "num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens_total "
    "generation_tokens_total request_success_total "
    "time_to_first_token_seconds_count inter_token_latency_seconds_bucket request_queue_time_seconds_count "
    "e2e_request_latency_seconds_sum request_prefill_time_seconds_sum request_decode_time_seconds_sum "
    "request_prompt_tokens_bucket request_generation_tokens_bucket "
    "spec_decode_num_drafts_total spec_decode_num_draft_tokens_total "
    "spec_decode_num_accepted_tokens_total spec_decode_num_accepted_tokens_per_pos_total "
    "prefix_cache_queries_total prefix_cache_hits_total"
).split()
"""What vLLM's own dashboards read, less what an engine like this has not."""


@pytest.fixture(scope="module")
def engine(tiny_pair: tuple[str, str]) -> Iterator[LocalEngine]:
    with load_engine(
        *tiny_pair, options=EngineOptions(num_slots=2, max_seq_len=128, num_draft_tokens=3)
    ) as running:
        yield running


def new_metrics(engine: LocalEngine) -> ServingMetrics:
    return ServingMetrics(
        engine.stats, replica_id="r7", num_rejected=lambda: 4, exporters=(), model_name="tiny"
    )


def samples(metrics: ServingMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    assert all(("replica", "r7") in labels for _, labels in found)
    return found


def value(metrics: ServingMetrics, name: str, **labels: str) -> float:
    return samples(metrics)[f"everdraft_{name}", frozenset({"replica": "r7", **labels}.items())]


def vllm_value(metrics: ServingMetrics, name: str, **labels: str) -> float:
    common = {"replica": "r7", "model_name": "tiny", "engine": "0"}
    return samples(metrics)[f"vllm:{name}", frozenset({**common, **labels}.items())]


def test_names_are_those_that_dashboards_know(engine: LocalEngine) -> None:
    engine.generate([[5]], SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    metrics = new_metrics(engine)
    clock = metrics.clock(0.0)
    clock.finished("stop", 1.0)
    names = {name for name, _ in samples(metrics)}
    for prefix in ("everdraft_", "vllm:"):
        assert {prefix + tail for tail in VLLM_TAILS} <= names
    assert all(name.startswith(("everdraft_", "vllm:")) for name in names)


def test_vllms_names_say_the_same_numbers_once_for_each_model(engine: LocalEngine) -> None:
    """Whatever we split by is summed; a sum over what a dashboard selects is then the whole."""
    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    engine.generate([[5]], sampling)
    engine.generate([[5]], SamplingParams(**{**vars(sampling), "num_draft_tokens": 0}))
    metrics = new_metrics(engine)
    for tenant, tokens in (("", 2), ("acme", 3)):
        clock = metrics.clock(10.0, tenant)
        clock.tokens(1, 10.5)
        clock.tokens(tokens, 10.5 + 0.02 * tokens)
        clock.finished("stop", 11.0)
    counters = [row for by in engine.stats().route_counts.values() for row in by.values()]
    assert vllm_value(metrics, "inter_token_latency_seconds_count") == 5
    assert vllm_value(metrics, "inter_token_latency_seconds_bucket", le="+Inf") == 5
    assert vllm_value(metrics, "inter_token_latency_seconds_bucket", le="0.01") == 0
    assert value(metrics, "inter_token_latency_seconds_count", tenant="acme") == 3
    assert vllm_value(metrics, "request_success_total", finished_reason="stop") == 2
    drafted = sum(row.num_drafted for row in counters)
    assert vllm_value(metrics, "spec_decode_num_draft_tokens_total") == drafted > 0
    rounds = sum(row.num_rounds for row in counters)
    drafts = vllm_value(metrics, "spec_decode_num_drafts_total")
    assert drafts == sum(row.num_drafted_rounds for row in counters)
    assert 0 < drafts < rounds, "vLLM counts no round without a draft"
    firsts = vllm_value(metrics, "spec_decode_num_accepted_tokens_per_pos_total", position="0")
    assert 0 <= firsts <= drafts


def test_acceptance_is_counted_by_draft_version(engine: LocalEngine) -> None:
    engine.generate([[5, 6]], SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    metrics, counters = new_metrics(engine), engine.stats().counts[DrafterVersion(MODEL_DRAFTER, 0)]
    for name, expected in (
        ("spec_decode_num_drafts_total", counters.num_rounds),
        ("spec_decode_num_draft_tokens_total", counters.num_drafted),
        ("spec_decode_num_attempted_tokens_total", counters.num_attempted),
        ("spec_decode_num_accepted_tokens_total", counters.num_accepted),
    ):
        labels = {"route": "default", "drafter": "draft", "draft_version": "0"}
        assert value(metrics, name, **labels) == expected
    assert value(metrics, "route_draft_version", route="default") == 0
    assert counters.num_drafted > 0


def test_reuse_of_prefixes_is_counted_in_tokens(engine: LocalEngine) -> None:
    metrics, names = new_metrics(engine), ("prefix_cache_queries_total", "prefix_cache_hits_total")
    prompt = list(range(60, 100))
    engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1))
    before = [value(metrics, name) for name in names]
    engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1))
    after = [value(metrics, name) for name in names]
    assert [late - early for early, late in zip(before, after, strict=True)] == [39, 32]
    assert 0 < value(metrics, "prefix_cache_bytes") <= engine.memory_plan.prefix_cache_bytes


def test_drops_and_refusals_are_counters(engine: LocalEngine) -> None:
    """Of six records two are stored, two of which one as `default`'s, and four come too late."""
    store = MemoryRecordStore(Bounds(max_routes=1), clock=lambda: START_S)
    exporter = RecordExporter(store)
    for number in range(2):
        route = f"tag-{number}"
        exporter.submit(StreamKey("revision", route), borrowed(route, route=route), 1)
    exporter.close()
    for number in range(4):
        exporter.submit(StreamKey("revision", "default"), borrowed(f"late-{number}"), 1)
    metrics = ServingMetrics(engine.stats, replica_id="r7", num_rejected=lambda: 4, exporters=[exporter])
    assert value(metrics, "requests_rejected_total") == 4
    assert value(metrics, "records_submitted_total") == 6
    assert value(metrics, "records_exported_total") == 2
    assert value(metrics, "records_rerouted_total") == 1
    assert value(metrics, "records_dropped_total", reason="closed") == 4
    assert value(metrics, "records_dropped_total", reason="queue_full") == 0


def test_no_route_of_a_client_becomes_a_label(engine: LocalEngine) -> None:
    """300 tags would be 300 series for good."""
    sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    requests = [GenerationRequest(f"r{i}", (5, 6), sampling, route=f"tag-{i}") for i in range(300)]
    for handle in [engine.submit(request) for request in requests]:
        handle.result(timeout_s=60)
    routes = {dict(labels).get("route") for _, labels in samples(new_metrics(engine))}
    assert routes == {None, "default"}


def test_latencies_follow_their_definitions(engine: LocalEngine) -> None:
    metrics = new_metrics(engine)
    clock = metrics.clock(10.0)
    clock.tokens(2, 10.5)
    clock.tokens(0, 10.6)
    clock.tokens(4, 10.7)
    [generation] = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=6, ignore_eos=True))
    generation.queued_s = 0.125
    clock.finished("length", 11.0, generation=generation)
    clock.finished("abort", 12.0)
    for name, expected in (
        ("time_to_first_token_seconds_sum", 0.5),
        ("inter_token_latency_seconds_count", 4),
        ("inter_token_latency_seconds_sum", 0.2),
        ("request_queue_time_seconds_sum", 0.125),
        ("request_prefill_time_seconds_sum", 0.375),
        ("request_decode_time_seconds_sum", 0.2),
        ("e2e_request_latency_seconds_sum", 1.0),
        ("request_prompt_tokens_sum", 3),
        ("request_generation_tokens_sum", 6),
    ):
        assert value(metrics, name, tenant="") == pytest.approx(expected), name
    assert value(metrics, "request_success_total", tenant="", finished_reason="length") == 1
    assert not any(("finished_reason", "abort") in labels for _, labels in samples(metrics))


def test_two_replicas_in_one_process_do_not_share_a_registry(engine: LocalEngine) -> None:
    new_metrics(engine).clock(0.0).finished("stop", 1.0)
    assert "finished_reason" not in new_metrics(engine).render().decode()
