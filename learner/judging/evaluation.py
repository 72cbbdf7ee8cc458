"""Scores a draft on given records: acceptance and speed, kept by record so that pairs can be compared.

Knows no store. Invariant: a score refers to the request's own final distribution and uses the estimator of
acceptance.py, at the positions whose token was emitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from buffer.records import GenerationRecord
from learner.batch import collate, pack
from learner.draft import AdapterState, TrainableDraft
from learner.judging.acceptance import position_acceptance
from learner.judging.speed import output_tokens_by_length
from learner.rows import TrainingRow, trajectory_row

LEAST_ATTEMPTED = 4
"""Attempted draft tokens that a record needs for its rate to be used."""


@dataclass(frozen=True, eq=False)
class RecordScore:
    """Score of one draft on one record, by position in output order."""

    expected_N: NDArray[np.float32]
    given_emitted_N: NDArray[np.float32]
    attempted_N: NDArray[np.bool_]
    accepted_N: NDArray[np.bool_]
    """The last two are what serving observed, whatever draft is scored."""

    @property
    def acceptance(self) -> float:
        """Mean over positions."""
        return float(self.expected_N.mean())

    def tokens_per_round(self, longest: int) -> NDArray[np.float64]:
        """Expected tokens a round by draft length, 0 to `longest`: the mean over all positions at which a
        round might start."""
        by_length_LN = output_tokens_by_length(self.expected_N, self.given_emitted_N, longest)
        return np.asarray(by_length_LN.mean(axis=1), np.float64)


def score_records(
    draft: TrainableDraft,
    state: AdapterState | None,
    records: Sequence[GenerationRecord],
    *,
    max_row_tokens: int,
    max_tokens_per_pass: int,
    max_positions_per_pass: int,
) -> list[RecordScore | None]:
    """One score a record, in order, of the draft with the weights `state` (None: the floor).

    A record without a usable position gives None."""
    rows = [trajectory_row(record, max_row_tokens) for record in records]
    present = [row for row in rows if row is not None]
    scores: dict[int, RecordScore] = {}
    with draft.with_weights(state):
        for group in pack(present, max_tokens_per_pass, max_positions_per_pass):
            scores.update(_score_group(draft, group))
    return [None if row is None else scores[id(row)] for row in rows]


def _score_group(draft: TrainableDraft, rows: Sequence[TrainingRow]) -> dict[int, RecordScore]:
    batch = collate(rows, draft.device)
    acceptance = position_acceptance(batch, draft.logits(batch))
    ends = np.cumsum([len(row.positions) for row in rows])[:-1]
    expected = np.split(acceptance.expected_N.cpu().numpy(), ends)
    given_emitted = np.split(acceptance.given_emitted_N.cpu().numpy(), ends)
    return {
        id(row): RecordScore(
            expected[index], given_emitted[index], row.positions.attempted_N, row.positions.accepted_N
        )
        for index, row in enumerate(rows)
    }


def observed_rates(records: Sequence[GenerationRecord]) -> list[float]:
    """Accepted over attempted, by record; without records that have too few draft tokens."""
    counts = [observed_acceptance([record]) for record in records]
    return [accepted / attempted for accepted, attempted in counts if attempted >= LEAST_ATTEMPTED]


def observed_acceptance(records: Sequence[GenerationRecord]) -> tuple[int, int]:
    """(accepted, attempted) tokens of drafts, as serving counted them; copied tokens left out."""
    rounds = (trace for record in records for trace in record.rounds)
    traces = [trace for trace in rounds if trace.is_by_draft]
    return sum(trace.num_accepted for trace in traces), sum(trace.num_attempted for trace in traces)
