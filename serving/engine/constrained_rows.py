"""The rows of a batch whose next tokens a constraint decides: a mask for every position of a round.

Masks follow the drafts: that of position x is asked for after the tokens drafted before it, once a round, for
the draft's own pass or for the target's. Invariant: between two rounds a state stands behind the tokens that
were emitted, and no others, so that nothing has to be undone for rejected drafts. Legend as in
`logits_processing`; M = ceil(V / 8) bytes of a mask.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.engine.request import ConstraintState

_Mask = NDArray[np.uint8] | None


class ConstrainedRows:
    """Made by `stack`."""

    def __init__(
        self, asking: dict[int, ConstraintState], vocab_size: int, device: torch.device | str
    ) -> None:
        self._asking = asking
        self._rows_R = torch.tensor(list(asking), device=device)
        self._bits_8 = torch.arange(8, dtype=torch.uint8, device=device)
        self._everything_M = np.full(-(-vocab_size // 8), 255, dtype=np.uint8)
        self._masks: dict[int, list[tuple[list[int], _Mask]]] = {row: [] for row in asking}
        """By row: the masks of this round's positions, each with the drafts that it follows."""

    @classmethod
    def stack(
        cls, states_B: Sequence[ConstraintState | None], vocab_size: int, device: torch.device | str
    ) -> "ConstrainedRows | None":
        """None if no row has a constraint."""
        asking = {row: state for row, state in enumerate(states_B) if state is not None}
        return cls(asking, vocab_size, device) if asking else None

    def apply_(self, logits_BXV: Tensor, drafted_BD: Tensor, first_position: int) -> None:
        """See `LogitsProcessing.apply`."""
        num_positions, vocab_size = logits_BXV.shape[1:]
        num_before = first_position + num_positions - 1
        drafted_RD = drafted_BD[self._rows_R, :num_before].tolist()
        masks = [
            self._mask(row, drafted[:position])
            for row, drafted in zip(self._asking, drafted_RD, strict=True)
            for position in range(first_position, first_position + num_positions)
        ]
        stacked = np.stack([self._everything_M if mask is None else mask for mask in masks])
        bits_NM1 = torch.from_numpy(stacked).to(logits_BXV.device)[..., None]
        allowed_NV = bits_NM1.bitwise_right_shift(self._bits_8).bitwise_and_(1).flatten(1)[:, :vocab_size]
        banned_RXV = (allowed_NV == 0).view(len(self._asking), num_positions, vocab_size)
        logits_BXV[self._rows_R] = logits_BXV[self._rows_R].masked_fill_(banned_RXV, -torch.inf)

    def commit(self, token_ids: Sequence[Sequence[int]]) -> None:
        """The tokens that each row of the batch has just emitted."""
        for row, state in self._asking.items():
            state.advance(token_ids[row])
            self._masks[row].clear()

    def _mask(self, row: int, drafted: list[int]) -> _Mask:
        known, position = self._masks[row], len(drafted)
        if position < len(known) and known[position][0] == drafted:
            return known[position][1]
        mask = self._asking[row].allowed(drafted)
        del known[position:]
        if position == len(known):
            known.append((drafted, mask))
        return mask
