"""What a pass costs: measured at start, corrected by live rounds.

Seconds of a target pass by (batch, tokens a sequence), and by batch of a one-token draft pass and of what the
first one costs on top: the target's weights have just pushed the draft's out of the processor's cache. Both
are therefore measured in turn, as in a round. Between measured points the table interpolates; live rounds
pull the whole of it (a start on an idle machine flatters).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

from serving.engine.runner import Runner

_LIVE_WEIGHT = 0.02
"""Of one live round in the running correction."""


@dataclass
class CostTable:
    """Rows by batch size, columns by tokens a sequence; the two scales follow live rounds."""

    batch_sizes: tuple[int, ...]
    token_counts: tuple[int, ...]
    target_pass_s: tuple[tuple[float, ...], ...]
    draft_pass_s: tuple[float, ...]
    draft_start_s: tuple[float, ...]
    target_scale: float = field(default=1.0)
    draft_scale: float = field(default=1.0)

    def adopt(self, other: "CostTable") -> None:
        """Become a newer measurement, in place: everyone who prices rounds by this table sees it."""
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    def target_s(self, batch_size: int, num_tokens: int) -> float:
        by_tokens = [_interpolate(self.token_counts, row, num_tokens) for row in self.target_pass_s]
        return self.target_scale * _interpolate(self.batch_sizes, by_tokens, batch_size)

    def propose_s(self, batch_size: int, num_draft_tokens: int) -> float:
        """Of drafting so many tokens; 0 of none."""
        if num_draft_tokens == 0:
            return 0.0
        start_s = _interpolate(self.batch_sizes, self.draft_start_s, batch_size)
        pass_s = _interpolate(self.batch_sizes, self.draft_pass_s, batch_size)
        return self.draft_scale * (start_s + num_draft_tokens * pass_s)

    def round_s(self, batch_size: int, num_draft_tokens: int) -> float:
        """Forward time of a round of this draft length."""
        return self.target_s(batch_size, num_draft_tokens + 1) + self.propose_s(batch_size, num_draft_tokens)

    def observe_target(self, batch_size: int, num_drafted: int, target_pass_s: float) -> None:
        """Pull the table toward a live round; one slow round (an outlier) moves it little."""
        ratio = target_pass_s / self.target_s(batch_size, num_drafted + 1)
        self.target_scale *= 1.0 + _LIVE_WEIGHT * (_clip(ratio) - 1.0)

    def observe_draft(self, batch_size: int, draft_passes: Sequence[int], propose_s: float) -> None:
        """The same for proposals (the passes of each) that had nothing but a token or two to catch up."""
        ratio = propose_s / sum(self.propose_s(batch_size, num_passes) for num_passes in draft_passes)
        self.draft_scale *= 1.0 + _LIVE_WEIGHT * (_clip(ratio) - 1.0)


def measure_costs(
    target: Runner,
    draft: Runner | None,
    *,
    max_draft_tokens: int = 8,
    context_tokens: int = 128,
    repeats: int = 5,
) -> CostTable:
    """Time passes on the caches in place (they must be idle); the fastest of `repeats`, which other work on
    the machine disturbs least."""
    batch_sizes = tuple(sorted({1, (target.num_slots + 1) // 2, target.num_slots}))
    token_counts = tuple(sorted({1, 2, 4, max_draft_tokens + 1}))
    token_counts = tuple(count for count in token_counts if count < target.max_seq_len)
    start = max(0, min(context_tokens, target.max_seq_len - max(token_counts)))
    target_pass_s = tuple(
        tuple(_time_pass(target, batch, count, start, repeats) for count in token_counts)
        for batch in batch_sizes
    )
    if draft is None:
        none = (0.0,) * len(batch_sizes)
        return CostTable(batch_sizes, token_counts, target_pass_s, none, none)
    first_and_next = [_time_drafting(target, draft, batch, start, repeats) for batch in batch_sizes]
    return CostTable(
        batch_sizes,
        token_counts,
        target_pass_s,
        draft_pass_s=tuple(next_s for _, next_s in first_and_next),
        draft_start_s=tuple(max(0.0, first_s - next_s) for first_s, next_s in first_and_next),
    )


def _time_pass(runner: Runner, batch_size: int, num_tokens: int, start: int, repeats: int) -> float:
    pass_s(runner, batch_size, num_tokens, start)
    return min(pass_s(runner, batch_size, num_tokens, start) for _ in range(repeats))


def _time_drafting(
    target: Runner, draft: Runner, batch_size: int, start: int, repeats: int
) -> tuple[float, float]:
    """Seconds of the draft's first pass after one of the target's, and of a pass after its own."""
    first_s, next_s = [], []
    for _ in range(repeats):
        pass_s(target, batch_size, 1, start)
        first_s.append(pass_s(draft, batch_size, 1, start))
        next_s.append(pass_s(draft, batch_size, 1, start))
    return min(first_s), min(next_s)


def pass_s(runner: Runner, batch_size: int, num_tokens: int, start: int) -> float:
    """Seconds of one pass over the first slots, at columns start, start + 1, …; what they held is lost."""
    tokens_BT = torch.zeros((batch_size, num_tokens), dtype=torch.int64, device=runner.device)
    positions_BT = torch.arange(start, start + num_tokens, device=runner.device).expand(batch_size, -1)
    began_s = time.perf_counter()
    runner.forward(tokens_BT, positions_BT, kv_len=start + num_tokens)
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    return time.perf_counter() - began_s


def _interpolate(xs: tuple[int, ...], ys: "tuple[float, ...] | list[float]", x: int) -> float:
    """Piecewise linear; beyond the ends the last value scales with x / x_end upward, stays downward."""
    if x <= xs[0]:
        return ys[0]
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=True), strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1] * x / xs[-1]


def _clip(ratio: float) -> float:
    return min(2.0, max(0.5, ratio))
