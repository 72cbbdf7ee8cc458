"""What a vLLM engine counts, from its worker's step messages and its own swaps."""

import statistics
import threading
from collections import deque

from buffer.names import DEFAULT_ROUTE, MODEL_DRAFTER
from serving.engine.counters import RoundCounters
from serving.engine.passes.prefix_cache import PrefixCacheStats
from serving.engine.proposal import DrafterVersion
from serving.engine.stats import EngineStats, SwapReport
from serving.engines.async_llm.step_messages import StepMessage

_MEMORY_STEPS = 512


class StepCounts:
    """Any thread writes, any thread reads."""

    def __init__(self, num_slots: int, num_draft_tokens: int) -> None:
        self._num_slots, self._num_draft_tokens = num_slots, num_draft_tokens
        self._lock = threading.Lock()
        self._counts: dict[DrafterVersion, RoundCounters] = {}
        self._steps: deque[tuple[float, int]] = deque(maxlen=_MEMORY_STEPS)
        self._num_prompt_tokens = self._num_output_tokens = 0
        self._num_swaps = self._num_swaps_under_load = 0
        self._swap_s_max = 0.0

    def add_message(self, message: StepMessage) -> None:
        num_accepted = len(message.emitted) - 1
        with self._lock:
            if message.step_s:
                self._steps.append((message.step_s, message.batch_size))
            by = DrafterVersion(MODEL_DRAFTER, message.draft_version)
            self._counts.setdefault(by, RoundCounters()).add_round(
                drafted=message.num_drafted,
                attempted=min(num_accepted + 1, message.num_drafted),
                accepted=num_accepted,
                emitted=len(message.emitted),
            )

    def add_prompt(self, num_tokens: int) -> None:
        with self._lock:
            self._num_prompt_tokens += num_tokens

    def add_output(self, num_tokens: int) -> None:
        with self._lock:
            self._num_output_tokens += num_tokens

    def add_swap(self, report: SwapReport) -> None:
        with self._lock:
            self._num_swaps += 1
            if report.under_load:
                self._num_swaps_under_load += 1
                self._swap_s_max = max(self._swap_s_max, report.swap_s)

    def stats(self, *, num_running: int, num_waiting: int, draft_version: int) -> EngineStats:
        """Columns of vLLM's own cache and prefix cache are not told to us; they are 0."""
        with self._lock:
            steps = list(self._steps)
            return EngineStats(
                num_running=num_running,
                num_waiting=num_waiting,
                num_slots=self._num_slots,
                num_cached_tokens=0,
                max_cached_tokens=0,
                num_prompt_tokens=self._num_prompt_tokens,
                num_output_tokens=self._num_output_tokens,
                draft_versions={DEFAULT_ROUTE: draft_version},
                num_draft_tokens=self._num_draft_tokens,
                is_draft_length_fixed=True,
                route_counts={
                    DEFAULT_ROUTE: {
                        by: RoundCounters(
                            **(
                                vars(counted)
                                | {
                                    "accepted_by_position": list(counted.accepted_by_position),
                                    "attempted_by_position": list(counted.attempted_by_position),
                                }
                            )
                        )
                        for by, counted in self._counts.items()
                    }
                },
                round_s_median=statistics.median(seconds for seconds, _ in steps) if steps else 0.0,
                mean_batch_size=statistics.fmean(size for _, size in steps) if steps else 0.0,
                num_swaps=self._num_swaps,
                num_swaps_under_load=self._num_swaps_under_load,
                swap_pause_s_max=self._swap_s_max,
                draft_disabled_reason="",
                prefix_cache=PrefixCacheStats(),
            )
