"""Expected speed of a draft, from its acceptance along real trajectories and the engine's cost model.

Knows no records and no models. No independence is assumed: the chance that a whole run of drafts is accepted
is the product, along the trajectory, of the values at the emitted tokens (see acceptance.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from buffer.records import PassCosts
from serving.engine.cost_table import CostTable

SpeedUnit = Literal["tokens_per_s", "tokens_per_round"]


@dataclass(frozen=True)
class Operation:
    """How serving runs now: costs of a pass, batch size and draft length."""

    num_draft_tokens: int
    mean_batch_size: float = 1.0
    costs: PassCosts | None = None
    is_draft_length_fixed: bool = False

    @property
    def draft_lengths(self) -> Sequence[int]:
        """The draft lengths that serving would choose from: every measured one, or only the fixed one."""
        if self.costs is None or self.is_draft_length_fixed:
            return (self.num_draft_tokens,)
        return range(max(self.costs.token_counts))


@dataclass(frozen=True)
class ExpectedSpeed:
    """Expected speed of one draft, at its best draft length."""

    amount: float
    unit: SpeedUnit
    """Tokens a second are those of the whole batch."""
    num_draft_tokens: int


def output_tokens_by_length(
    expected_N: NDArray[np.float32], given_emitted_N: NDArray[np.float32], longest: int
) -> NDArray[np.float64]:
    """[longest + 1, N]: tokens that a round of each draft length is expected to emit if it starts at each
    position of one trajectory; a round never reaches past the end of the trajectory."""
    num_positions = len(expected_N)
    emitted_LN = np.ones((longest + 1, num_positions))
    run_N = np.ones(num_positions)
    for depth in range(min(longest, num_positions)):
        reach = num_positions - depth
        emitted_LN[depth + 1 :, :reach] += run_N[:reach] * expected_N[depth:]
        run_N[:reach] *= given_emitted_N[depth:]
    return emitted_LN


def expected_speed(tokens_per_round_by_length: Sequence[float], operation: Operation) -> ExpectedSpeed:
    """Speed at the draft length with the most tokens a second: a better draft may have a longer best length.
    While no costs are known, tokens a round at the length in use."""
    if operation.costs is None:
        length = operation.num_draft_tokens
        return ExpectedSpeed(tokens_per_round_by_length[length], "tokens_per_round", length)
    longest = max(operation.draft_lengths)
    seconds = round_s_by_length(operation.costs, operation.mean_batch_size, longest)
    rates = {
        length: operation.mean_batch_size * tokens_per_round_by_length[length] / seconds[length]
        for length in operation.draft_lengths
    }
    best = max(rates, key=rates.__getitem__)
    return ExpectedSpeed(rates[best], "tokens_per_s", best)


def round_s_by_length(costs: PassCosts, batch_size: float, longest: int) -> list[float]:
    """Seconds of a round by draft length, 0 to `longest`: computed like in the engine that reported the
    costs."""
    table = CostTable(
        costs.batch_sizes, costs.token_counts, costs.target_pass_s, costs.draft_pass_s, costs.draft_start_s
    )
    target_s, propose_s = table.seconds_by_length(batch_size, longest)
    return [verify_s + draft_s for verify_s, draft_s in zip(target_s, propose_s, strict=True)]
