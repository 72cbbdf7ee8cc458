"""Acceptance on prompts that nobody learns from: the mean, and its interval over prompts.

Greedy: replayed rounds, accepted over attempted tokens. At temperature 1: the expected acceptance of the
ratio test, which is how requests without a seed are served, by the one estimator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.osd.recorded_answers import RecordedAnswer
from benchmarks.osd.replay import Replay
from buffer.records import GenerationRecord
from learner.draft import TrainableDraft
from learner.judging.evaluation import score_records

_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class HeldOutAcceptance:
    """A mean and its 95 % interval over prompts."""

    acceptance: float
    low: float
    high: float


class HeldOut:
    """Recorded requests of one domain and temperature."""

    def __init__(self, recorded: Sequence[RecordedAnswer], replay: Replay) -> None:
        self.recorded, self._replay = recorded, replay
        self._records = [_standard(replay.bare_record(one)) for one in recorded]

    def acceptance(self, draft: TrainableDraft) -> float:
        """Of the draft as it stands."""
        counts_P2 = self.counts(draft)
        return float(counts_P2[:, 0].sum() / counts_P2[:, 1].sum())

    def measure(self, draft: TrainableDraft) -> HeldOutAcceptance:
        """By a bootstrap over prompts."""
        counts_P2 = self.counts(draft)
        draws = np.random.default_rng(0).integers(len(counts_P2), size=(_NUM_RESAMPLES, len(counts_P2)))
        sums = counts_P2[draws].sum(1)
        low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
        return HeldOutAcceptance(
            float(counts_P2[:, 0].sum() / counts_P2[:, 1].sum()), float(low), float(high)
        )

    def counts(self, draft: TrainableDraft) -> NDArray[np.float64]:
        """[P, 2]: by prompt, accepted (or what is expected of it) and attempted tokens."""
        if self.recorded[0].seed is None:
            played = self._replay.play(draft, 0, self.recorded)
            return np.array([(one.num_accepted, one.num_attempted) for one in played], float)
        scores = score_records(
            draft,
            draft.state(),
            self._records,
            max_row_tokens=1 << 20,
            max_tokens_per_pass=8192,
            max_positions_per_pass=2048,
        )
        found = [score.expected_N for score in scores if score is not None]
        return np.array([(expected_N.sum(), len(expected_N)) for expected_N in found], float)


def _standard(record: GenerationRecord) -> GenerationRecord:
    return replace(record, sampling=replace(record.sampling, mode="standard"))
