"""The usage, speculation and draft versions that an answer reports. Pure functions over generations."""

from collections.abc import Sequence

from serving.api.response_schema import (
    Metrics,
    PromptTokensDetails,
    SpeculativeDecoding,
    Usage,
    WeightVersion,
)
from serving.engine.counters import acceptance_rate, draft_utilization
from serving.engine.request import Generation


def usage(num_prompt_tokens: int, num_output_tokens: int, generations: Sequence[Generation]) -> Usage:
    """A prompt and its cached tokens count once, however many choices it has."""
    reused: dict[str, int] = {}
    for generation in generations:  # the choices of a prompt share their request id
        num_tokens = generation.num_prompt_tokens_reused
        reused[generation.request_id] = min(num_tokens, reused.get(generation.request_id, num_tokens))
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_output_tokens,
        total_tokens=num_prompt_tokens + num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(reused.values())),
    )


def metrics(generations: Sequence[Generation]) -> Metrics:
    """Sums over the rounds of all choices, including rounds whose tokens an early stop discarded."""
    histogram = _sum_histograms([generation.accepted_histogram for generation in generations])
    num_accepted = sum(generation.num_accepted for generation in generations)
    num_attempted = sum(generation.num_attempted for generation in generations)
    num_drafted = sum(generation.num_drafted for generation in generations)
    num_rounds = sum(generation.num_rounds for generation in generations)
    caps = [generation.sampling.num_draft_tokens for generation in generations]
    asked = max((cap for cap in caps if cap is not None), default=None)
    return Metrics(
        speculative_decoding=SpeculativeDecoding(
            mean_acceptance_length=1.0 + (num_accepted / num_rounds if num_rounds else 0.0),
            draft_acceptance_rate=draft_utilization(num_accepted, num_drafted),
            acceptance_histogram=histogram,
            num_spec_steps=num_rounds,
            num_accepted_draft_tokens=num_accepted,
            num_draft_tokens=num_drafted,
            num_spec_tokens=len(histogram) - 1 if asked is None and histogram else (asked or 0),
            num_attempted_draft_tokens=num_attempted,
            acceptance_rate=acceptance_rate(num_accepted, num_attempted),
        )
    )


def weight_versions(generation: Generation, num_tokens: int) -> list[WeightVersion]:
    """Spans of draft versions over the first `num_tokens` output tokens."""
    return [
        WeightVersion(version=span.draft_version, start=span.start, end=min(span.end, num_tokens))
        for span in generation.draft_versions
        if span.start < num_tokens
    ]


def _sum_histograms(histograms: Sequence[Sequence[int]]) -> list[int]:
    length = max((len(histogram) for histogram in histograms), default=0)
    padded = ([*histogram, *[0] * (length - len(histogram))] for histogram in histograms)
    return [sum(column) for column in zip(*padded, strict=True)]
