"""Drafts by copying: finds the longest suffix of the text that occurred before, and copies what followed it.

Needs no model and no pass. The most recent occurrence wins. Copied tokens are proposed with probability 1 (a
one-hot distribution), for which verification is exact whatever they are. Invariant: a slot's index holds the
n-grams of its first `num_indexed` tokens, each with the position after its latest occurrence; a new token
adds one entry for each n-gram size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from buffer.names import FLOOR_VERSION, NGRAM_DRAFTER
from serving.engine.proposal import Proposal
from serving.engine.sequence import Batch

_SIZES = (4, 3, 2)
"""Sizes of n-grams, in the order of lookup."""


@dataclass
class _SlotIndex:
    """Where the n-grams of one sequence occurred last."""

    follower_of: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_indexed: int = 0

    def extend(self, token_ids: list[int]) -> None:
        """Index the n-grams that are followed by a token; the suffix itself is not."""
        for follower in range(self.num_indexed, len(token_ids)):
            for size in _SIZES:
                if size <= follower:
                    self.follower_of[tuple(token_ids[follower - size : follower])] = follower
        self.num_indexed = len(token_ids)

    def match(self, token_ids: list[int]) -> tuple[int, int]:
        """(size of the longest suffix that occurred before, position of the token after it); (0, 0) without
        one."""
        for size in _SIZES:
            follower = self.follower_of.get(tuple(token_ids[-size:])) if size <= len(token_ids) else None
            if follower is not None:
                return size, follower
        return 0, 0


class NgramDrafter:
    """Max-gram lookup over prompt and output, incremental by token."""

    drafter_id = NGRAM_DRAFTER
    draft_version = FLOOR_VERSION

    def __init__(self, num_slots: int) -> None:
        self._indexes = [_SlotIndex() for _ in range(num_slots)]

    def matches(self, batch: Batch) -> list[int]:
        """See `LookupDrafter.matches`."""
        return [self._match(row, sequence.token_ids)[0] for row, sequence in enumerate(batch.sequences)]

    def propose(
        self,
        batch: Batch,
        num_draft_tokens_B: list[int],
        noise_BEV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Proposal:
        """See `Drafter.propose`. Draws nothing: neither noise nor generator is used."""
        copied, sizes = [], []
        for row, (sequence, count) in enumerate(zip(batch.sequences, num_draft_tokens_B, strict=True)):
            size, follower = self._match(row, sequence.token_ids) if count else (0, 0)
            copied.append(_copy(sequence.token_ids, follower, count) if size else [])
            sizes.append(size)
        width = max(len(tokens) for tokens in copied)
        padded = [tokens + [0] * (width - len(tokens)) for tokens in copied]
        token_ids_BG = torch.tensor(padded, dtype=torch.int64, device=batch.device).view(len(batch), width)
        return Proposal(
            draft_version=self.draft_version,
            token_ids_BG=token_ids_BG,
            num_drafted_B=tuple(len(tokens) for tokens in copied),
            logprobs_BGV=None,
            token_logprobs_BG=torch.zeros(token_ids_BG.shape, device=batch.device),
            num_matched_B=tuple(sizes),
        )

    def observe(self, num_drafted_B: list[int], num_accepted_B: list[int]) -> None:
        """Nothing to undo: only committed tokens are indexed."""

    def clear(self, slot: int) -> None:
        self._indexes[slot] = _SlotIndex()

    def move(self, source: int, destination: int) -> None:
        self._indexes[destination], self._indexes[source] = self._indexes[source], _SlotIndex()

    def reset(self) -> None:
        self._indexes = [_SlotIndex() for _ in self._indexes]

    def refresh(self, draft_version: int) -> None:
        """No weights: a swap changes nothing here."""

    def _match(self, row: int, token_ids: list[int]) -> tuple[int, int]:
        index = self._indexes[row]
        index.extend(token_ids)
        return index.match(token_ids)


def _copy(token_ids: list[int], follower: int, count: int) -> list[int]:
    """`count` tokens from `follower` on; past the end of the text the copied tokens themselves are copied."""
    copied = token_ids[follower : follower + count]
    while len(copied) < count:
        copied += copied[: count - len(copied)]
    return copied
