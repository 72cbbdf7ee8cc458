"""Converts records to rows: the tokens that the draft reads, and the target's values at each position.

A record gives one row over its own trajectory (prompt and output) and, for rounds that ended in a
rejection, one short row that follows the draft's own tokens past it. Knows no model and no tensors.
Invariant: the logits at column c decide the token after the c-th, so position p of prompt + output is
read at column p - 1 (less what was cut from the left). OSD's own code reads column p, one too late.

Legend: T columns, N verified positions of a row, K kept entries, G drafted tokens of a round.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from buffer.records import GenerationRecord, RecordSampling, RoundTrace

NO_TOKEN = -1
"""Emitted token of an off-trajectory position, and id of a padded kept entry."""

_MOST_KEPT_MASS = 1.05
"""Kept log-probabilities are float16: rounding alone may lift their sum a little over 1."""


@dataclass(frozen=True, eq=False)
class Positions:
    """The target's log-probabilities at N verified positions."""

    position_N: NDArray[np.int64]
    """Index, in the row's whole context, of the token that is decided."""
    topk_token_ids_NK: NDArray[np.int64]
    topk_logprobs_NK: NDArray[np.float32]
    """The target's raw log-probabilities at temperature 1, largest first; padded entries are -inf."""
    retemper_N: NDArray[np.float32]
    emitted_token_id_N: NDArray[np.int64]
    emitted_logprob_N: NDArray[np.float32]
    """Final distribution of the target at the emitted token."""
    attempted_N: NDArray[np.bool_]
    """Counts draft models only: in a round that copied, no position is attempted, accepted or rejected."""
    accepted_N: NDArray[np.bool_]
    first_rejected_N: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.position_N)

    def keep(self, mask_N: NDArray[np.bool_]) -> "Positions":
        return Positions(**{name: array[mask_N] for name, array in vars(self).items()})

    @staticmethod
    def join(parts: Sequence["Positions"]) -> "Positions":
        """Concatenated in order; rows of different K are padded to the widest."""
        num_kept = max(part.topk_token_ids_NK.shape[1] for part in parts)
        widened = [vars(part._widened(num_kept)) for part in parts]
        return Positions(**{name: np.concatenate([part[name] for part in widened]) for name in widened[0]})

    def usable(self) -> NDArray[np.bool_]:
        """Positions whose values are finite: others must not reach a loss."""
        finite_N = np.isfinite(self.retemper_N) & np.isfinite(self.emitted_logprob_N)
        best_N = self.topk_logprobs_NK[:, 0]
        return finite_N & np.isfinite(best_N) & ~np.isnan(self.topk_logprobs_NK).any(1)

    def _widened(self, num_kept: int) -> "Positions":
        num_missing = num_kept - self.topk_token_ids_NK.shape[1]
        if num_missing == 0:
            return self  # the usual case; padding by 0 entries took a third of a learner's time
        missing = ((0, 0), (0, num_missing))
        arrays = dict(vars(self))
        arrays["topk_token_ids_NK"] = np.pad(self.topk_token_ids_NK, missing, constant_values=NO_TOKEN)
        arrays["topk_logprobs_NK"] = np.pad(self.topk_logprobs_NK, missing, constant_values=-np.inf)
        return Positions(**arrays)


@dataclass(frozen=True, eq=False)
class TrainingRow:
    """One sequence for the draft to read. `first_position`: index in the context of its first column."""

    token_ids_T: NDArray[np.int64]
    first_position: int
    positions: Positions
    weight: float
    sampling: RecordSampling

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def column_N(self) -> NDArray[np.int64]:
        """Column of the draft's logits for each position."""
        return self.positions.position_N - 1 - self.first_position


def record_fault(record: GenerationRecord, target_revision: str, vocab_size: int) -> str:
    """Why this record must not be trained on; empty if it may be."""
    if record.target_revision != target_revision:
        return f"target_revision={record.target_revision!r} is not {target_revision!r}"
    if not record.rounds or not len(record.prompt_token_ids):
        return "no rounds or no prompt"
    num_prompt = len(record.prompt_token_ids)
    num_tokens = num_prompt + len(record.output_token_ids)
    for number, trace in enumerate(record.rounds):
        if fault := _trace_fault(trace, num_prompt, num_tokens):
            return f"round {number}: {fault}"
    found = [record.prompt_token_ids, record.output_token_ids]
    found += [trace.drafted_token_ids_G for trace in record.rounds]
    found += [trace.topk_token_ids_EK.ravel() for trace in record.rounds]
    if any(len(ids) and (ids.min() < 0 or ids.max() >= vocab_size) for ids in found):
        return f"token ids outside 0..{vocab_size - 1}"
    return ""


def _trace_fault(trace: RoundTrace, num_prompt: int, num_tokens: int) -> str:
    """Why this round cannot be what a replica saw. Single values that are not finite do not count; their
    positions are left out."""
    num_emitted, ids_EK = len(trace.emitted_target_logprobs_C), trace.topk_token_ids_EK
    if ids_EK.ndim != 2 or not ids_EK.size:
        return "kept target entries are not [E, K]"
    if not 0 <= trace.num_accepted <= trace.num_attempted <= trace.num_drafted:
        return (
            f"{trace.num_accepted} accepted of {trace.num_attempted} attempted, {trace.num_drafted} drafted"
        )
    if not num_prompt <= trace.start <= trace.start + num_emitted <= num_tokens:
        return f"{num_emitted} emitted tokens from {trace.start} on lie outside the output"
    ordered_EK = np.sort(ids_EK, axis=1)
    if (ordered_EK[:, 1:] == ordered_EK[:, :-1]).any():
        return "a token is kept twice"  # it would count twice, and any draft would look better than it is
    mass_E = np.exp(trace.topk_logprobs_EK.astype(np.float32)).sum(1)
    return "kept probabilities exceed 1" if (mass_E > _MOST_KEPT_MASS).any() else ""


def trajectory_row(record: GenerationRecord, max_tokens: int) -> TrainingRow | None:
    """The positions whose token was emitted, on the record's own context; None if none is usable."""
    sequence_T = _sequence(record)
    parts = [_emitted_positions(trace, sequence_T) for trace in record.rounds]
    return _row(sequence_T[:-1], Positions.join(parts), max_tokens, 1.0, record.sampling)


def rejected_suffix_rows(
    record: GenerationRecord, context_tokens: int, max_rounds: int, weight: float, rng: np.random.Generator
) -> Iterator[TrainingRow]:
    """Rows over the draft's own tokens after a rejection, of at most `max_rounds` rounds drawn by `rng`."""
    if weight == 0.0 or max_rounds == 0:
        return
    sequence_T = _sequence(record)
    rejected = [trace for trace in record.rounds if _rejection(trace, sequence_T) is not None]
    for index in sorted(rng.permutation(len(rejected))[:max_rounds]):
        trace = rejected[index]
        context_T = np.concatenate([sequence_T[: trace.start], trace.drafted_token_ids_G]).astype(np.int64)
        positions = _suffix_positions(trace)
        row = _row(context_T, positions, context_tokens + trace.num_drafted, weight, record.sampling)
        if row is not None:
            yield row


def _sequence(record: GenerationRecord) -> NDArray[np.int64]:
    return np.concatenate([record.prompt_token_ids, record.output_token_ids]).astype(np.int64)


def _rejection(trace: RoundTrace, sequence_T: NDArray[np.int64]) -> int | None:
    """Index in the round of the draft's rejected token; None for a full or cut round, or one that copied."""
    if not trace.is_by_draft:
        return None
    index = trace.num_accepted
    position = trace.start + index
    if index >= min(trace.num_drafted, trace.num_attempted) or position >= len(sequence_T):
        return None
    return None if sequence_T[position] == trace.drafted_token_ids_G[index] else index


def _emitted_positions(trace: RoundTrace, sequence_T: NDArray[np.int64]) -> Positions:
    num_emitted = min(len(trace.emitted_target_logprobs_C), len(sequence_T) - trace.start)
    rejected = _rejection(trace, sequence_T)
    return _positions(
        trace,
        np.arange(max(0, num_emitted)),
        emitted=lambda position_N: sequence_T[position_N],
        emitted_logprobs_C=trace.emitted_target_logprobs_C,
        rejected=NO_TOKEN if rejected is None else rejected,
    )


def _suffix_positions(trace: RoundTrace) -> Positions:
    index_N = np.arange(trace.num_accepted + 1, trace.num_drafted + 1)
    return _positions(
        trace,
        index_N,
        emitted=lambda position_N: np.full(len(position_N), NO_TOKEN, np.int64),
        emitted_logprobs_C=np.zeros(trace.num_drafted + 1, np.float32),
        rejected=NO_TOKEN,
    )


def _positions(
    trace: RoundTrace,
    index_N: NDArray[np.int64],
    emitted: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    emitted_logprobs_C: NDArray[np.float32],
    rejected: int,
) -> Positions:
    """Verified positions `index_N` of one round; past a rejection none is attempted or accepted."""
    position_N = trace.start + index_N.astype(np.int64)
    return Positions(
        position_N=position_N,
        topk_token_ids_NK=trace.topk_token_ids_EK[index_N].astype(np.int64),
        topk_logprobs_NK=trace.topk_logprobs_EK[index_N].astype(np.float32),
        retemper_N=trace.retemper_E[index_N].astype(np.float32),
        emitted_token_id_N=emitted(position_N),
        emitted_logprob_N=emitted_logprobs_C[index_N].astype(np.float32),
        attempted_N=(index_N < trace.num_attempted) & trace.is_by_draft,
        accepted_N=(index_N < trace.num_accepted) & trace.is_by_draft,
        first_rejected_N=index_N == rejected,
    )


def _row(
    context_T: NDArray[np.int64],
    positions: Positions,
    max_tokens: int,
    weight: float,
    sampling: RecordSampling,
) -> TrainingRow | None:
    """Build a row: cut the context from the left, drop positions that lost most of it or are not usable."""
    cut = max(0, len(context_T) - max_tokens)
    least_context = 0 if cut == 0 else max_tokens // 4
    kept = positions.keep(positions.usable() & (positions.position_N - 1 - cut >= least_context))
    return TrainingRow(context_T[cut:], cut, kept, weight, sampling) if len(kept) else None
