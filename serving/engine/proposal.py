"""What a drafter offers, the Protocol behind which every drafter stands, and who drafts for whom in a round.

A distribution of None is one-hot: the proposal is certain of its tokens, and is judged so. That is exact for
any tokens whatever, copied, stale or random. Legend: B rows (row = slot), G drafted, V vocabulary.
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
    """What a round of a sequence counts for."""

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
    def drafter_id(self) -> str:
        """What it is, by name; leaves the process in records and counters."""
        ...

    @property
    def draft_version(self) -> int:
        """Of its weights; FLOOR_VERSION where they have no versions."""
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
class DraftAssignment:
    """What one drafter is asked for in a round; no row is in two assignments."""

    drafter: Drafter
    num_draft_tokens_B: list[int]


class ServingDraft(NamedTuple):
    """The draft that is loaded for a row: versions are counted by route."""

    route: str
    """The one it was trained for; not the row's own where that has no draft."""
    draft_version: int

    def drafted(self, num_matched: int) -> DrafterVersion:
        """Who drafted for such a row, given how many context tokens its drafts continue."""
        return COPIED if num_matched else DrafterVersion(MODEL_DRAFTER, self.draft_version)


@dataclass(frozen=True)
class DraftPlan:
    """Who drafts for which rows in a round. No assignments: plain decoding."""

    drafts_B: tuple[ServingDraft, ...]
    """Whether or not they draft."""
    assignments: tuple[DraftAssignment, ...] = ()

    @property
    def max_draft_tokens(self) -> int:
        return max((max(assignment.num_draft_tokens_B) for assignment in self.assignments), default=0)


def combine(parts: Sequence[Proposal]) -> Proposal:
    """The proposals of all assignments of a round as one; each row from whoever drafted for it, its
    distributions too. The version is the first's: whose drafts a row has is for the plan to say."""
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
    taken = set(rows)
    return Proposal(
        draft_version=below.draft_version,
        token_ids_BG=token_ids_BG,
        num_drafted_B=tuple(
            (above if row in taken else below).num_drafted_B[row] for row in range(len(below.num_drafted_B))
        ),
        logprobs_BGV=logprobs_BGV,
        token_logprobs_BG=_widen(below.token_logprobs_BG, width).index_copy(
            0, rows_N, _widen(above.token_logprobs_BG, width)[rows_N]
        ),
        num_matched_B=tuple(
            above.num_matched(row) if row in taken else below.num_matched(row)
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
