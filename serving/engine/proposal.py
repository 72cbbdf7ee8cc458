"""What a drafter proposes, the Protocol of all drafters, and which drafter drafts for which rows in a round.

A distribution of None is one-hot: the proposal gives its tokens probability 1, and is verified so. That is
exact for any tokens, whether copied, stale or random. Legend: B rows (row = slot), G drafted, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from buffer.names import MODEL_DRAFTER, NGRAM_DRAFTER
from serving.engine.passes.transfer import to_device
from serving.engine.sequence import Batch


class DrafterVersion(NamedTuple):
    """The drafter, and the version of its weights, under which a sequence's round is counted."""

    drafter_id: str
    draft_version: int | None
    """None where the drafter's weights have no versions."""


COPIED = DrafterVersion(NGRAM_DRAFTER, None)


@dataclass(frozen=True)
class Proposal:
    """Up to G draft tokens a row, and the distributions they were drawn from (snapshots, not live
    weights)."""

    draft_version: int
    token_ids_BG: Tensor
    """int64; columns past a row's num_drafted are padding."""
    num_drafted_B: tuple[int, ...]
    logprobs_BGV: Tensor | None
    """Final distribution of the draft at each position; None if it is one-hot in every row (greedy, or
    copied)."""
    token_logprobs_BG: Tensor
    """That distribution at the drafted tokens; 0 where it is one-hot. Where it is not finite, that token and
    all after it count as not drafted; NaN says that the draft is broken."""
    num_matched_B: tuple[int, ...] = ()
    """Context tokens that a row's copied drafts continue; 0 where a model drafted. Empty: 0 in all rows."""
    num_chunks: int = 0
    """Passes that only caught up with the context: they take time, but are no cost of drafting."""
    num_broken_rows: int = 0
    """All rows if the drafter raised; single broken rows are marked in `token_logprobs_BG`."""

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
    def drafter_id(self) -> str:
        """Its name, which records and counters carry out of the process."""
        ...

    @property
    def draft_version(self) -> int:
        """Version of its weights; FLOOR_VERSION if they have no versions."""
        ...

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
        """Called after verification, before tokens are appended, with the usable and accepted draft tokens of
        the last proposal, by row."""
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
        """The live weights are now this version: recompute state of the old ones when that delays no
        round."""
        ...


class LookupDrafter(Drafter, Protocol):
    """A drafter that copies, and can say beforehand how many context tokens match."""

    def matches(self, batch: Batch) -> list[int]:
        """Length of the match that a copy would continue, by row; 0 if it has nothing to propose."""
        ...


@dataclass(frozen=True)
class DraftAssignment:
    """Draft tokens requested of one drafter in a round, by row; no row is in two assignments."""

    drafter: Drafter
    num_draft_tokens_B: list[int]


class ServingDraft(NamedTuple):
    """The draft that is loaded for a row: versions are counted by route."""

    route: str
    """The route that it was trained for; not the row's own if that has no draft."""
    draft_version: int

    def drafted(self, num_matched: int) -> DrafterVersion:
        """The drafter of such a row, given how many context tokens its draft continues (0: the model)."""
        return COPIED if num_matched else DrafterVersion(MODEL_DRAFTER, self.draft_version)


@dataclass(frozen=True)
class DraftPlan:
    """The assignments of all drafters in a round. No assignments: plain decoding."""

    drafts_B: tuple[ServingDraft, ...]
    """The draft that is loaded for each row, whether or not it drafts."""
    assignments: tuple[DraftAssignment, ...] = ()

    @property
    def max_draft_tokens(self) -> int:
        return max((max(assignment.num_draft_tokens_B) for assignment in self.assignments), default=0)


def combine(parts: Sequence[Proposal]) -> Proposal:
    """The proposals of all assignments of a round as one: each row, with its distributions, comes from the
    drafter that drafted for it. The version is that of the first; the plan has the version of each row."""
    whole = parts[0]
    for part in parts[1:]:
        whole = _lay_over(whole, part)
    return whole


def _lay_over(below: Proposal, above: Proposal) -> Proposal:
    """Rows that `above` drafts for come from it, all others from `below`."""
    num_chunks = below.num_chunks + above.num_chunks
    num_broken_rows = below.num_broken_rows + above.num_broken_rows
    if above.max_drafted == 0:
        return replace(below, num_chunks=num_chunks, num_broken_rows=num_broken_rows)
    width = max(below.max_drafted, above.max_drafted)
    rows = [row for row, count in enumerate(above.num_drafted_B) if count]
    rows_N = to_device([rows], above.token_ids_BG.device)[0]
    token_ids_BG = _widen(below.token_ids_BG, width).index_copy(
        0, rows_N, _widen(above.token_ids_BG, width)[rows_N]
    )
    logprobs_BGV = None
    example = below.logprobs_BGV if below.logprobs_BGV is not None else above.logprobs_BGV
    if example is not None:
        vocab_size = example.shape[-1]
        logprobs_BGV = _logprobs(below, width, vocab_size).index_copy(
            0, rows_N, _logprobs(above, width, vocab_size, rows_N)
        )
    from_above = set(rows)
    return Proposal(
        draft_version=below.draft_version,
        token_ids_BG=token_ids_BG,
        num_drafted_B=tuple(
            (above if row in from_above else below).num_drafted_B[row]
            for row in range(len(below.num_drafted_B))
        ),
        logprobs_BGV=logprobs_BGV,
        token_logprobs_BG=_widen(below.token_logprobs_BG, width).index_copy(
            0, rows_N, _widen(above.token_logprobs_BG, width)[rows_N]
        ),
        num_matched_B=tuple(
            above.num_matched(row) if row in from_above else below.num_matched(row)
            for row in range(len(below.num_drafted_B))
        ),
        num_chunks=num_chunks,
        num_broken_rows=num_broken_rows,
    )


def _logprobs(part: Proposal, width: int, vocab_size: int, rows_N: Tensor | None = None) -> Tensor:
    """[B, width, V] or, of some rows, [N, width, V]: distributions as they are, or one-hot at the tokens."""
    rows = slice(None) if rows_N is None else rows_N
    if part.logprobs_BGV is not None:
        missing = width - part.max_drafted
        return torch.nn.functional.pad(part.logprobs_BGV[rows], (0, 0, 0, missing), value=-torch.inf)
    token_ids_NG = _widen(part.token_ids_BG, width)[rows]
    one_hot_NGV = torch.full((*token_ids_NG.shape, vocab_size), -torch.inf, device=token_ids_NG.device)
    return one_hot_NGV.scatter_(-1, token_ids_NG[..., None], 0.0)


def _widen(tensor_BG: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor_BG, (0, width - tensor_BG.shape[1]))
