"""How long the forwards themselves take, and the speed-up that they would allow.

Passes are timed as a round runs them, the draft's before the target's, so that each finds the processor's
cache as it would; nothing of the engine's own work is in these figures.

B sequences, G draft tokens.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from serving.engine.runner import Runner

LENGTHS = (0, 1, 2, 4, 8)
REPEATS = 15


@dataclass(frozen=True)
class ForwardTimes:
    """Seconds at one batch size and context, by number of draft tokens."""

    num_draft_tokens: tuple[int, ...]
    target_pass_s: tuple[float, ...]
    """One target pass over G + 1 tokens of every sequence."""
    draft_pass_s: tuple[float, ...]
    """One draft pass, the mean of the G before that target pass; 0 where G is 0."""

    def predicted_speedup(
        self, block_efficiency: float, num_draft_tokens: float, *, drafts_with_a_model: bool = True
    ) -> float:
        """Over one token a target pass: block_efficiency x T(B, 1) / (T(B, G + 1) + G x D(B)), linear
        between measured lengths. A drafter that is no model costs nothing here."""
        drafting_s = num_draft_tokens * self._at(self._draft_s(), num_draft_tokens) * drafts_with_a_model
        round_s = self._at(self.target_pass_s, num_draft_tokens) + drafting_s
        return block_efficiency * self.target_pass_s[0] / round_s

    def _draft_s(self) -> tuple[float, ...]:
        """Below one draft token a pass costs what the first does."""
        return (self.draft_pass_s[1], *self.draft_pass_s[1:])

    def _at(self, seconds: tuple[float, ...], length: float) -> float:
        """Interpolated; beyond the ends the last value."""
        lengths = self.num_draft_tokens
        if length >= lengths[-1]:
            return seconds[-1]
        right = next(index for index, known in enumerate(lengths) if known > length)
        left = right - 1
        share = (length - lengths[left]) / (lengths[right] - lengths[left])
        return seconds[left] + share * (seconds[right] - seconds[left])


def measure_forwards(
    target: nn.Module, draft: nn.Module, *, batch_size: int, context_tokens: int, repeats: int = REPEATS
) -> ForwardTimes:
    """Medians; every length takes its turn."""
    room = context_tokens + max(LENGTHS) + 1
    target_runner = Runner(target, num_slots=batch_size, max_seq_len=room)
    draft_runner = Runner(draft, num_slots=batch_size, max_seq_len=room)
    target_s: dict[int, list[float]] = {length: [] for length in LENGTHS}
    draft_s: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for turn in range(repeats + 1):
        for length in LENGTHS:
            drafting_s = sum(
                _pass_s(draft_runner, 1, context_tokens + position) for position in range(length)
            )
            verifying_s = _pass_s(target_runner, length + 1, context_tokens)
            if turn:  # the first one warms up
                draft_s[length].append(drafting_s / max(1, length))
                target_s[length].append(verifying_s)
    return ForwardTimes(
        LENGTHS,
        tuple(statistics.median(target_s[length]) for length in LENGTHS),
        tuple(statistics.median(draft_s[length]) for length in LENGTHS),
    )


def _pass_s(runner: Runner, num_tokens: int, start: int) -> float:
    tokens_BT = torch.zeros((runner.num_slots, num_tokens), dtype=torch.int64, device=runner.device)
    positions_BT = torch.arange(start, start + num_tokens, device=runner.device).expand(runner.num_slots, -1)
    began_s = time.perf_counter()
    runner.forward(tokens_BT, positions_BT, kv_len=start + num_tokens)
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    return time.perf_counter() - began_s
