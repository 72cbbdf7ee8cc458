"""Measures at start what a pass costs: the fastest of a few passes, by shape.

The target's weights push the draft's out of the processor's cache, so the draft's first pass after one of the
target's costs more than its next one: passes of both are measured alternately, as in a round.
"""

import time

import torch

from serving.engine.cost_table import CostTable
from serving.engine.passes.runner import Runner


def measure_costs(
    target: Runner,
    draft: Runner | None,
    *,
    max_draft_tokens: int = 8,
    context_tokens: int = 128,
    repeats: int = 5,
) -> CostTable:
    """Time passes on the engine's own caches, which must be idle. Takes the fastest of `repeats`, the one
    that other work on the machine disturbed least. `max_draft_tokens` 0: nobody drafts, and one token a
    sequence is all that is timed."""
    batch_sizes = tuple(sorted({1, (target.num_slots + 1) // 2, target.num_slots}))
    token_counts = tuple(sorted({1, 2, 4, max_draft_tokens + 1}))
    most = min(max_draft_tokens + 1, target.max_seq_len - 1)
    token_counts = tuple(count for count in token_counts if count <= most)
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


def fastest_pass_s(runner: Runner, batch_size: int, num_tokens: int) -> float:
    """Seconds of the fastest of a few passes, in the middle of the context."""
    return _time_pass(runner, batch_size, num_tokens, (runner.max_seq_len - num_tokens) // 2, repeats=5)


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
    """Seconds of one pass over the first slots, at columns start, start + 1, …; their content is
    overwritten."""
    tokens_BT = torch.zeros((batch_size, num_tokens), dtype=torch.int64, device=runner.device)
    positions_BT = torch.arange(start, start + num_tokens, device=runner.device).expand(batch_size, -1)
    began_s = time.perf_counter()
    runner.forward(tokens_BT, positions_BT, kv_len=start + num_tokens)
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    return time.perf_counter() - began_s
