"""Scores candidate, incumbent and floor on the same held-out records and asks the gate for a decision.

Knows no store. Invariant: no record that trained a candidate is used to judge one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from buffer.records import GenerationRecord, ServingStatus
from learner.draft import AdapterState
from learner.draw import is_held_out
from learner.judging.draft_selection import FLOOR, DraftScores, ExistingDraft, scores_of_drafts
from learner.judging.gate import GateDecision, GateRule, Scores, acceptance, decide, gain_lower_bound
from learner.judging.held_out import DraftKey, HeldOutWindow
from learner.judging.rollback_backoff import RollbackBackoff
from learner.judging.speed import Operation
from learner.judging.watch import ScoreState
from learner.settings import LearnerSettings
from learner.training_schedule import HeldOutGain


@dataclass(frozen=True)
class Judgement:
    """The gate's decision, the mean held-out acceptance of the three drafts (NaN where not scored), and the
    candidate's gain over the reference."""

    decision: GateDecision
    acceptance_candidate: float = float("nan")
    acceptance_incumbent: float = float("nan")
    acceptance_floor: float = float("nan")
    held_out_gain: HeldOutGain = field(default_factory=HeldOutGain)


class Judge:
    """Keeps the window of held-out records and decides on candidates."""

    def __init__(self, settings: LearnerSettings, score: ScoreState) -> None:
        self._settings = settings
        self._score = score
        self._window = HeldOutWindow(settings.held_out_window_records)
        self._reference: ExistingDraft | None = None

    @property
    def num_records(self) -> int:
        return len(self._window)

    def split(self, records: Sequence[GenerationRecord]) -> list[GenerationRecord]:
        """Adds the held-out records to the window and returns the others, to train on."""
        held_out_share = self._settings.held_out_share
        self._window.add(record for record in records if is_held_out(record.request_id, held_out_share))
        return [record for record in records if not is_held_out(record.request_id, held_out_share)]

    def hurry(self) -> None:
        """Traffic shifted: drop most of the held-out records, so that new ones soon decide."""
        self._window.shrink(4 * self._settings.gate_min_records)

    def expire(self, now_s: float) -> None:
        """Let go of held-out records that may no longer be held."""
        self._window.expire(now_s)

    def forget(self) -> None:
        """Let go of all held-out records."""
        self._window.clear()

    def promoted(self, draft: DraftKey) -> None:
        """The candidate that was judged last was published as this draft."""
        self._window.keep_fresh_as(draft)

    def compare(self, drafts: Sequence[ExistingDraft]) -> DraftScores:
        """Score every existing draft on the last held-out records. Forgets the scores of all other drafts,
        except those of the reference of `held_out_gain`."""
        reference = [] if self._reference is None else [self._reference]
        self._window.keep_drafts(draft.key for draft in [*drafts, *reference])
        return scores_of_drafts(self._window, drafts, self._settings.route_evidence_records, self._score)

    def judge(
        self,
        candidate: AdapterState,
        incumbent: ExistingDraft,
        *,
        fault: str,
        operation: Operation,
        seed: Sequence[int],
        now_s: float,
        backoff: RollbackBackoff,
        new_reference: bool,
    ) -> Judgement:
        """`fault`: why the candidate must be refused without scoring (empty: no reason); `seed` is that of
        the bootstrap; `backoff` comes from earlier rollbacks; `new_reference`: from now on the held-out gain
        is counted from the incumbent."""
        if new_reference or self._reference is None:
            self._reference = incumbent
        self._window.expire(now_s)
        self._window.forget_before(backoff.trusted_since_s)
        if fault:
            return Judgement(GateDecision(False, fault))
        floor = self._window.scores(FLOOR.key, partial(self._score, None))
        before = floor
        if incumbent.state is not None:
            before = self._window.scores(incumbent.key, partial(self._score, incumbent.state))
        after = self._window.fresh_scores(partial(self._score, candidate))
        start, state = floor, self._reference.state
        if state is not None:
            start = self._window.scores(self._reference.key, partial(self._score, state))
        scored_by_all = [
            (new, old, base, first)
            for new, old, base, first in zip(after, before, floor, start, strict=True)
            if new is not None and old is not None and base is not None and first is not None
        ]
        *scores, reference = [list(column) for column in zip(*scored_by_all, strict=True)] or [[], [], [], []]
        decision = decide(
            *scores,
            fault="",
            operation=operation,
            rule=_rule(self._settings, backoff),
            rng=np.random.default_rng(list(seed)),
        )
        held_out_gain = self._held_out_gain(scores[0], reference, seed)
        new, old, base = (acceptance(column) for column in scores)
        return Judgement(decision, new, old, base, held_out_gain)

    def _held_out_gain(self, candidate: Scores, reference: Scores, seed: Sequence[int]) -> HeldOutGain:
        settings = self._settings
        if len(candidate) < settings.gate_min_records:
            return HeldOutGain()
        rng = np.random.default_rng([*seed, 1])
        lower = gain_lower_bound(candidate, reference, settings.gate_level, settings.gate_num_resamples, rng)
        return HeldOutGain(acceptance(candidate) - acceptance(reference), lower)


def operation(statuses: Iterable[ServingStatus], nominal_num_draft_tokens: int) -> Operation:
    """How serving runs, from the replica that reported last; the nominal draft length until one drafts."""
    latest = max(statuses, key=lambda status: status.at_s, default=None)
    if latest is None:
        return Operation(nominal_num_draft_tokens)
    return Operation(
        num_draft_tokens=latest.num_draft_tokens or nominal_num_draft_tokens,
        mean_batch_size=max(1.0, latest.mean_batch_size),
        costs=latest.costs,
        is_draft_length_fixed=latest.is_draft_length_fixed,
    )


def _rule(settings: LearnerSettings, backoff: RollbackBackoff) -> GateRule:
    return GateRule(
        min_records=backoff.min_records(settings.gate_min_records, settings.held_out_window_records),
        level=settings.gate_level,
        min_gain=settings.gate_min_gain,
        num_resamples=settings.gate_num_resamples,
    )
