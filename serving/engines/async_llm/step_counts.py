"""Step messages and swaps in the engine's own counters, and the figures that follow."""

from collections.abc import Mapping

from buffer.names import MODEL_DRAFTER
from serving.engine.passes.prefix_cache import PrefixCacheStats
from serving.engine.proposal import DrafterVersion
from serving.engine.stats import EngineStats, Meter
from serving.engines.async_llm.step_messages import StepMessage


def count_step(meter: Meter, message: StepMessage) -> None:
    """What a worker tells, as our engine counts it."""
    meter.count_told(
        DrafterVersion(MODEL_DRAFTER, message.draft_version),
        drafted=message.num_drafted,
        emitted=len(message.emitted),
        batch_size=message.batch_size,
        round_s=message.step_s,
    )


def stats_of(
    meter: Meter,
    *,
    num_running: int,
    num_waiting: int,
    num_slots: int,
    num_draft_tokens: int,
    draft_versions: Mapping[str, int],
) -> EngineStats:
    """What vLLM's own caches hold is not told to us; it is 0."""
    return meter.stats(
        num_running=num_running,
        num_waiting=num_waiting,
        num_slots=num_slots,
        num_cached_tokens=0,
        max_cached_tokens=0,
        draft_versions=dict(draft_versions),
        num_draft_tokens=num_draft_tokens,
        is_draft_length_fixed=True,
        draft_disabled_reason="",
        prefix_cache=PrefixCacheStats(),
    )
