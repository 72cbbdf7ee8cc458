"""Our metrics that vLLM has too, under vLLM's names and labels, so that a dashboard made for it works
unchanged.

Derived from what was collected: nothing is counted twice. Every family keeps the label `replica`, because a
scrape through Serve reaches one replica at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import Metric

_OURS, _THEIRS = "everdraft_", "vllm:"
_ENGINE = "0"
"""vLLM numbers the engines of one server; a replica has one."""


@dataclass(frozen=True)
class _Origin:
    """What of ours a metric of vLLM's is, and which labels it keeps; over all others it is summed."""

    tail: str
    labels: tuple[str, ...] = ()


_SAME_NAMES = (
    "num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens generation_tokens "
    "prefix_cache_queries prefix_cache_hits time_to_first_token_seconds inter_token_latency_seconds "
    "e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds "
    "request_decode_time_seconds request_prompt_tokens request_generation_tokens "
    "spec_decode_num_draft_tokens spec_decode_num_accepted_tokens"
).split()
_ORIGINS: Mapping[str, _Origin] = {
    **{tail: _Origin(tail) for tail in _SAME_NAMES},
    "request_success": _Origin("request_success", ("finished_reason",)),
    # vLLM counts no round that drafts nothing, and divides by this
    "spec_decode_num_drafts": _Origin("spec_decode_num_drafted_rounds"),
    "spec_decode_num_accepted_tokens_per_pos": _Origin(
        "spec_decode_num_accepted_tokens_per_pos", ("position",)
    ),
}


def vllm_families(ours: Iterable[Metric], model_name: str) -> Iterator[Metric]:
    """vLLM's, of those of ours that it has too."""
    collected = {metric.name: metric for metric in ours}
    for tail, origin in _ORIGINS.items():
        metric = collected[_OURS + origin.tail]
        yield _renamed(metric, _THEIRS + tail, model_name, origin.labels)


def _renamed(ours: Metric, name: str, model_name: str, labels: tuple[str, ...]) -> Metric:
    kept = ("replica", *labels, "le")
    sums = dict[tuple[str, tuple[tuple[str, str], ...]], float]()
    for sample in ours.samples:
        suffix = sample.name.removeprefix(ours.name)
        if suffix != "_created":
            key = suffix, tuple((label, sample.labels[label]) for label in kept if label in sample.labels)
            sums[key] = sums.get(key, 0.0) + sample.value
    theirs = Metric(name, ours.documentation, ours.type)
    common = {"model_name": model_name, "engine": _ENGINE}
    for (suffix, pairs), value in sums.items():
        theirs.add_sample(name + suffix, {**common, **dict(pairs)}, value)
    return theirs
