"""What the engine counts: rounds by draft, round times, swaps and their pauses.

A sequence's round that copied its draft tokens counts as COPIED and not for any draft.
"""

import statistics
import threading
from collections import deque
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from buffer.names import DEFAULT_ROUTE
from serving.engine.counters import RoundCounters
from serving.engine.passes.prefix_cache import PrefixCacheStats
from serving.engine.proposal import DrafterVersion
from serving.engine.round import RoundReport

_MEMORY_ROUNDS = 512
_ENOUGH_ALIKE = 5


@dataclass(frozen=True)
class SwapReport:
    """A swap that happened between two rounds."""

    draft_version: int
    swap_s: float
    under_load: bool
    """Whether sequences were running."""


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
    draft_versions: dict[str, int]
    """route -> version that serves, of every route that has a draft of its own."""
    num_draft_tokens: int
    """Draft length in use."""
    is_draft_length_fixed: bool
    route_counts: dict[str, dict[DrafterVersion, RoundCounters]]
    """Counters by the route of the draft that was loaded, and by drafter; rounds of draft length 0 count for
    the draft that was loaded."""
    round_s_median: float
    mean_batch_size: float
    num_swaps: int
    num_swaps_under_load: int
    swap_pause_s_max: float
    """The most that a swap under load and the round after it took beyond a median round of that batch size
    and draft length (so that a longer draft does not count as a pause)."""
    draft_disabled_reason: str
    prefix_cache: PrefixCacheStats

    @property
    def draft_version(self) -> int:
        """The default route's version."""
        return self.draft_versions[DEFAULT_ROUTE]

    @property
    def counts(self) -> dict[DrafterVersion, RoundCounters]:
        """Counters of the default route's draft, and of drafters that drafted in its place."""
        return self.route_counts.get(DEFAULT_ROUTE, {})


@dataclass
class Meter:
    """Sums what rounds and swaps report; the engine thread writes, any thread reads under `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: dict[str, dict[DrafterVersion, RoundCounters]] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_swaps: int = 0
    num_swaps_under_load: int = 0
    swap_pause_s_max: float = 0.0
    _rounds: deque[tuple[int, int, float]] = field(default_factory=lambda: deque(maxlen=_MEMORY_ROUNDS))
    """(batch size, draft length, seconds)"""
    _swap_s_before_round: float | None = None

    def count_round(self, report: RoundReport, round_s: float) -> None:
        """Count a round of `round_s` seconds; it completes the pause of a swap right before it."""
        with self.lock:
            kind = len(report.advances), report.num_draft_tokens
            if self._swap_s_before_round is not None and self._rounds:
                pause_s = self._swap_s_before_round + round_s - self._median_s(kind)
                self.swap_pause_s_max = max(self.swap_pause_s_max, pause_s)
            self._swap_s_before_round = None
            self._rounds.append((*kind, round_s))
            for draft, advance in zip(report.drafts_B, report.advances, strict=True):
                self._count_row(
                    draft.route,
                    draft.drafted(advance.num_matched),
                    drafted=advance.num_drafted,
                    attempted=advance.num_attempted,
                    accepted=advance.num_accepted,
                    emitted=len(advance.token_ids),
                )

    def count_told(
        self, by: DrafterVersion, *, drafted: int, emitted: int, batch_size: int, round_s: float
    ) -> None:
        """Count a sequence's round that another process tells of, on the default route; all but the last of
        the emitted tokens were drafted. `round_s`: of the round, with one of its rows; 0 with others."""
        with self.lock:
            if round_s:
                self._rounds.append((batch_size, drafted, round_s))
            self._count_row(
                DEFAULT_ROUTE,
                by,
                drafted=drafted,
                attempted=min(emitted, drafted),
                accepted=emitted - 1,
                emitted=emitted,
            )

    def count_swap(self, report: SwapReport, *, is_whole_pause: bool = False) -> None:
        """`is_whole_pause`: no round is counted right after it that would complete the pause."""
        with self.lock:
            self.num_swaps += 1
            if report.under_load:
                self.num_swaps_under_load += 1
                if is_whole_pause:
                    self.swap_pause_s_max = max(self.swap_pause_s_max, report.swap_s)
                else:
                    self._swap_s_before_round = (self._swap_s_before_round or 0.0) + report.swap_s

    def stats(self, **others: Any) -> EngineStats:
        """A snapshot; `others`: the fields that are not counted here."""
        with self.lock:
            return EngineStats(
                num_prompt_tokens=self.num_prompt_tokens,
                num_output_tokens=self.num_output_tokens,
                route_counts=deepcopy(self.counts),
                round_s_median=self.round_s_median,
                mean_batch_size=self.mean_batch_size,
                num_swaps=self.num_swaps,
                num_swaps_under_load=self.num_swaps_under_load,
                swap_pause_s_max=self.swap_pause_s_max,
                **others,
            )

    def forget(self, route: str) -> None:
        """Drop the counters of a route whose draft was closed: over time there may be many routes."""
        with self.lock:
            self.counts.pop(route, None)

    def count_prompt(self, num_tokens: int) -> None:
        with self.lock:
            self.num_prompt_tokens += num_tokens

    @property
    def round_s_median(self) -> float:
        return statistics.median(seconds for *_, seconds in self._rounds) if self._rounds else 0.0

    @property
    def mean_batch_size(self) -> float:
        return statistics.fmean(size for size, *_ in self._rounds) if self._rounds else 0.0

    def _count_row(self, route: str, by: DrafterVersion, **counted: int) -> None:
        """Under the lock."""
        self.counts.setdefault(route, {}).setdefault(by, RoundCounters()).add_round(**counted)
        self.num_output_tokens += counted["emitted"]

    def _median_s(self, kind: tuple[int, int]) -> float:
        """Median of rounds of this batch size and draft length; of all rounds if too few are like it."""
        alike = [seconds for *of_round, seconds in self._rounds if tuple(of_round) == kind]
        return statistics.median(alike) if len(alike) >= _ENOUGH_ALIKE else self.round_s_median
