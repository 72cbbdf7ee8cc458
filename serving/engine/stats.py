"""What the engine counts: rounds by draft version, round times, swaps and their pauses."""

import statistics
import threading
from collections import deque
from dataclasses import dataclass, field

from serving.engine.counters import RoundCounters
from serving.engine.round import RoundReport

_MEMORY_ROUNDS = 512


@dataclass(frozen=True)
class SwapReport:
    """A swap that happened between two rounds."""

    draft_version: int
    swap_s: float
    under_load: bool
    """Sequences were running."""


@dataclass(frozen=True)
class EngineStats:
    """A consistent snapshot; counters since the engine started."""

    num_running: int
    num_waiting: int
    num_slots: int
    num_cached_tokens: int
    max_cached_tokens: int
    num_prompt_tokens: int
    num_output_tokens: int
    draft_version: int
    num_draft_tokens: int
    """Draft length in use."""
    counts: dict[int, RoundCounters]
    """By draft_version; rounds of draft length 0 count under the version that was loaded."""
    round_s_median: float
    mean_batch_size: float
    num_swaps: int
    num_swaps_under_load: int
    swap_pause_s_max: float
    """The most that a swap under load and the round after it took beyond a median round."""
    draft_disabled_reason: str


@dataclass
class Meter:
    """Gathers what rounds and swaps report; the engine thread writes, anyone reads through `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: dict[int, RoundCounters] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_swaps: int = 0
    num_swaps_under_load: int = 0
    swap_pause_s_max: float = 0.0
    _round_s: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY_ROUNDS))
    _batch_sizes: deque[int] = field(default_factory=lambda: deque(maxlen=_MEMORY_ROUNDS))
    _swap_s_before_round: float | None = None

    def count_round(self, report: RoundReport, round_s: float) -> None:
        """One round of `round_s` seconds; closes the pause of a swap right before it."""
        with self.lock:
            if self._swap_s_before_round is not None and len(self._round_s) > 1:
                pause_s = self._swap_s_before_round + round_s - statistics.median(self._round_s)
                self.swap_pause_s_max = max(self.swap_pause_s_max, pause_s)
            self._swap_s_before_round = None
            self._round_s.append(round_s)
            self._batch_sizes.append(len(report.advances))
            counters = self.counts.setdefault(report.draft_version, RoundCounters())
            for advance in report.advances:
                counters.add_round(
                    drafted=advance.num_drafted,
                    attempted=advance.num_attempted,
                    accepted=advance.num_accepted,
                    emitted=len(advance.token_ids),
                )
                self.num_output_tokens += len(advance.token_ids)

    def count_swap(self, report: SwapReport) -> None:
        with self.lock:
            self.num_swaps += 1
            if report.under_load:
                self.num_swaps_under_load += 1
                self._swap_s_before_round = (self._swap_s_before_round or 0.0) + report.swap_s

    def count_prompt(self, num_tokens: int) -> None:
        with self.lock:
            self.num_prompt_tokens += num_tokens

    @property
    def round_s_median(self) -> float:
        return statistics.median(self._round_s) if self._round_s else 0.0

    @property
    def mean_batch_size(self) -> float:
        return statistics.fmean(self._batch_sizes) if self._batch_sizes else 0.0
