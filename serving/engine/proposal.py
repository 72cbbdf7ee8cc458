"""What a drafter offers, and the Protocol behind which every drafter stands."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from serving.engine.sequence import Batch


@dataclass(frozen=True)
class Proposal:
    """Up to G draft tokens a row, and the laws they were drawn from (snapshots, not live weights)."""

    draft_version: int
    token_ids_BG: Tensor
    """int64; columns past a row's num_drafted are padding."""
    num_drafted_B: tuple[int, ...]
    logprobs_BGV: Tensor | None
    """Final law of the draft at each position; None if every row is greedy: the law is one-hot."""
    token_logprobs_BG: Tensor
    """That law at the drafted tokens; 0 for greedy rows. Where it is not finite, that token and all after it
    count as not drafted; NaN says that the draft is broken."""
    num_chunks: int = 0
    """Passes that only caught up: real time, but not what drafting costs."""
    num_broken_rows: int = 0
    """All rows if the drafter raised; broken ones are told by their `token_logprobs_BG`."""

    @classmethod
    def empty(cls, num_rows: int, draft_version: int, device: torch.device | str) -> "Proposal":
        """A round of draft length 0."""
        return cls(
            draft_version=draft_version,
            token_ids_BG=torch.zeros((num_rows, 0), dtype=torch.int64, device=device),
            num_drafted_B=(0,) * num_rows,
            logprobs_BGV=None,
            token_logprobs_BG=torch.zeros((num_rows, 0), device=device),
        )

    @property
    def max_drafted(self) -> int:
        return int(self.token_ids_BG.shape[1])


class Drafter(Protocol):
    """Proposes tokens for the rows of a batch (row = slot) and keeps its own state by slot."""

    @property
    def draft_version(self) -> int: ...

    def propose(
        self,
        batch: Batch,
        num_draft_tokens_B: list[int],
        noise_BEV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Proposal:
        """At most `num_draft_tokens_B[b]` tokens for row b; fewer is always allowed.

        `noise_BEV`: Gumbel noise of the coming output positions, zero on rows that are not coupled.
        """
        ...

    def observe(self, num_drafted_B: list[int], num_accepted_B: list[int]) -> None:
        """How the last proposal fared, by row; called before tokens are appended."""
        ...

    def clear(self, slot: int) -> None:
        """A new sequence owns the slot."""
        ...

    def move(self, source: int, destination: int) -> None:
        """A sequence changed its slot."""
        ...

    def reset(self) -> None:
        """Forget all state, e.g. after NaN."""
        ...

    def refresh(self, draft_version: int) -> None:
        """The live weights are now this version: renew state made by the old when it costs no stall."""
        ...
