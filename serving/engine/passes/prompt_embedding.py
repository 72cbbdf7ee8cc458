"""The mean hidden state of a prompt, summed chunk by chunk during prefill; prompts are routed by it.

Averages over the tokens that were computed and over copied blocks whose means are known; without the prompt's
last token (the first round feeds it) and copied blocks that held output tokens. Stays on the device until the
prompt is complete, so that no chunk waits for the device. Knows no routes. Legend: T tokens of a chunk, N
blocks, H the target's hidden size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BlockMean = NDArray[np.float16] | None
"""Mean hidden state [H] of one whole block; None: not known."""


class PromptStates:
    """Sums of hidden states by block of one prompt's `num_tokens` tokens."""

    def __init__(self, num_tokens: int, block_tokens: int, reused: Sequence[BlockMean]) -> None:
        """`reused`: the prompt's first blocks, whose keys and values were copied instead of computed."""
        self._num_tokens, self._block_tokens = num_tokens, block_tokens
        self._reused = list(reused)
        self._sums_NH: Tensor | None = None

    def add(self, start: int, hidden_TH: Tensor) -> None:
        """Add hidden states of the tokens start, start + 1, …."""
        if self._sums_NH is None:
            num_blocks = -(-self._num_tokens // self._block_tokens)
            shape = num_blocks, hidden_TH.shape[1]
            self._sums_NH = torch.zeros(shape, dtype=torch.float32, device=hidden_TH.device)
        first = start // self._block_tokens
        blocks_T = torch.arange(start, start + len(hidden_TH), device=hidden_TH.device) // self._block_tokens
        last = (start + len(hidden_TH) - 1) // self._block_tokens
        touched_N = torch.arange(first, last + 1, device=hidden_TH.device)
        self._sums_NH[first : last + 1] += (touched_N[:, None] == blocks_T).float() @ hidden_TH.float()

    def finish(self) -> tuple[BlockMean, list[BlockMean]]:
        """The prompt's mean, and those of its whole blocks for the prefix cache. Waits for the device."""
        means = [None if mean is None else mean.astype(np.float32) for mean in self._reused]
        counts = [self._block_tokens] * len(means)
        if self._sums_NH is not None:
            sums_NH = self._sums_NH.cpu().numpy()
            for block in range(len(means), len(sums_NH)):
                counts.append(min(self._block_tokens, self._num_tokens - block * self._block_tokens))
                means.append(sums_NH[block] / counts[-1])
        weighted = [(mean, count) for mean, count in zip(means, counts, strict=True) if mean is not None]
        if not weighted:
            return None, []
        mean_H = np.average([mean for mean, _ in weighted], axis=0, weights=[count for _, count in weighted])
        num_whole = self._num_tokens // self._block_tokens
        return _halves(mean_H), [None if mean is None else _halves(mean) for mean in means[:num_whole]]


def _halves(mean_H: NDArray[np.float32]) -> BlockMean:
    """The mean in float16; None if it does not fit or is not finite."""
    with np.errstate(over="ignore"):
        halves_H = mean_H.astype(np.float16)
    return halves_H if np.isfinite(halves_H).all() else None
