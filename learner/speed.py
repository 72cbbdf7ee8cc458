"""Expected tokens per second of a draft, from its acceptance along real trajectories and measured costs.

Knows no records and no models. No independence is assumed: the chance that a whole run of drafts is
accepted is the product, along the trajectory, of what the emitted tokens give (see acceptance.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from buffer.records import PassCosts


@dataclass(frozen=True)
class Operation:
    """How serving runs now: what a pass costs, at which batch size, with which draft length."""

    num_draft_tokens: int
    mean_batch_size: float = 1.0
    costs: PassCosts | None = None


def output_tokens_per_round(
    expected_N: NDArray[np.float32], given_emitted_N: NDArray[np.float32], num_draft_tokens: int
) -> NDArray[np.float64]:
    """[N]: tokens that a round is expected to emit if it starts at each position of one trajectory,
    1 to num_draft_tokens + 1; a round never reaches past the end of the trajectory."""
    num_positions = len(expected_N)
    emitted_N = np.ones(num_positions)
    run_N = np.ones(num_positions)
    for depth in range(min(num_draft_tokens, num_positions)):
        reach = num_positions - depth
        emitted_N[:reach] += run_N[:reach] * expected_N[depth:]
        run_N[:reach] *= given_emitted_N[depth:]
    return emitted_N


def tokens_per_s(tokens_per_round: float, operation: Operation) -> float:
    """Expected output tokens per second over the whole batch; NaN while no costs are known."""
    if operation.costs is None:
        return float("nan")
    return operation.mean_batch_size * tokens_per_round / round_s(operation, operation.costs)


def round_s(operation: Operation, costs: PassCosts) -> float:
    """Seconds of one round: the draft's passes and one target pass over the verified positions."""
    num_verified = float(operation.num_draft_tokens + 1)
    batch = operation.mean_batch_size
    by_batch = [float(np.interp(num_verified, costs.token_counts, row)) for row in costs.target_pass_s]
    target_s = _at(batch, costs.batch_sizes, by_batch)
    return target_s + operation.num_draft_tokens * _at(batch, costs.batch_sizes, costs.draft_pass_s)


def _at(batch_size: float, batch_sizes: Sequence[int], seconds: Sequence[float]) -> float:
    return float(np.interp(batch_size, batch_sizes, seconds))
