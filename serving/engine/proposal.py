"""What a drafter offers, the Protocol behind which every drafter stands, and who drafts for whom in a round.

A law of None is one-hot: the proposal is certain of its tokens, and is judged so. That is exact for any
tokens whatever, copied, stale or random. Legend: B rows (row = slot), G drafted, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from serving.engine.sequence import Batch

NGRAM_VERSION = -1
"""Stands where a draft_version would, for what n-gram lookup drafted: no draft may be credited with it."""


@dataclass(frozen=True)
class Proposal:
    """Up to G draft tokens a row, and the laws they were drawn from (snapshots, not live weights)."""

    draft_version: int
    token_ids_BG: Tensor
    """int64; columns past a row's num_drafted are padding."""
    num_drafted_B: tuple[int, ...]
    logprobs_BGV: Tensor | None
    """Final law of the draft at each position; None if it is one-hot in every row (greedy, or copied)."""
    token_logprobs_BG: Tensor
    """That law at the drafted tokens; 0 where it is one-hot. Where it is not finite, that token and all after
    it count as not drafted; NaN says that the draft is broken."""
    num_matched_B: tuple[int, ...] = ()
    """Context tokens that a row's copied drafts continue; 0 where a model drafted. Empty: 0 in all rows."""
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

    def num_matched(self, row: int) -> int:
        return self.num_matched_B[row] if self.num_matched_B else 0


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


class LookupDrafter(Drafter, Protocol):
    """A drafter that copies, and so can say beforehand what it would."""

    def matches(self, batch: Batch) -> list[int]:
        """Context tokens that would be continued, by row; 0 where it has nothing to propose."""
        ...


@dataclass(frozen=True)
class Share:
    """What one drafter is asked for in a round; no row is in two shares."""

    drafter: Drafter
    num_draft_tokens_B: list[int]


@dataclass(frozen=True)
class DraftPlan:
    """Who drafts for which rows in a round. No shares: plain decoding."""

    draft_version: int
    """Of the draft that is loaded, whether or not it drafts."""
    shares: tuple[Share, ...] = ()

    @property
    def max_draft_tokens(self) -> int:
        return max((max(share.num_draft_tokens_B) for share in self.shares), default=0)


def combine(parts: Sequence[Proposal]) -> Proposal:
    """The proposals of a round's shares as one, under the first's version; only the first may have laws."""
    whole = parts[0]
    for part in parts[1:]:
        assert part.logprobs_BGV is None
        whole = _lay_over(whole, part)
    return whole


def _lay_over(below: Proposal, above: Proposal) -> Proposal:
    """Rows that `above` drafts for come from it, all others from `below`."""
    if above.max_drafted == 0:
        return replace(below, num_broken_rows=below.num_broken_rows + above.num_broken_rows)
    width = max(below.max_drafted, above.max_drafted)
    rows = [row for row, count in enumerate(above.num_drafted_B) if count]
    rows_N = torch.tensor(rows, device=above.token_ids_BG.device)
    token_ids_BG = _widen(below.token_ids_BG, width).index_copy(
        0, rows_N, _widen(above.token_ids_BG, width)[rows_N]
    )
    logprobs_BGV = below.logprobs_BGV
    if logprobs_BGV is not None:
        missing = width - below.max_drafted
        logprobs_BGV = torch.nn.functional.pad(logprobs_BGV, (0, 0, 0, missing), value=-torch.inf)
        one_hot_NGV = torch.full_like(logprobs_BGV[: len(rows)], -torch.inf)
        one_hot_NGV.scatter_(-1, token_ids_BG[rows_N][..., None], 0.0)
        logprobs_BGV = logprobs_BGV.index_copy(0, rows_N, one_hot_NGV)
    taken = set(rows)
    return Proposal(
        draft_version=below.draft_version,
        token_ids_BG=token_ids_BG,
        num_drafted_B=tuple(
            (above if row in taken else below).num_drafted_B[row] for row in range(len(below.num_drafted_B))
        ),
        logprobs_BGV=logprobs_BGV,
        token_logprobs_BG=_widen(below.token_logprobs_BG, width).index_fill(0, rows_N, 0.0),
        num_matched_B=tuple(
            above.num_matched(row) if row in taken else below.num_matched(row)
            for row in range(len(below.num_drafted_B))
        ),
        num_chunks=below.num_chunks + above.num_chunks,
        num_broken_rows=below.num_broken_rows + above.num_broken_rows,
    )


def _widen(tensor_BG: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor_BG, (0, width - tensor_BG.shape[1]))
