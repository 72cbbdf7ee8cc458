"""Candidate, incumbent and floor on the same held-out records, and the gate's word on them.

Knows no store. Invariant: no record that trained a candidate ever judges one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from buffer.records import GenerationRecord, ServingStatus
from learner.bandit import FLOOR, ExistingDraft, Worths, worths
from learner.draft import AdapterState
from learner.draw import is_held_out
from learner.gate import GateDecision, GateRule, acceptance, decide
from learner.held_out import HeldOutWindow
from learner.settings import LearnerSettings
from learner.speed import Operation
from learner.watch import ScoreState


@dataclass(frozen=True)
class Judgement:
    """The decision, and mean held-out acceptance of the three drafts (NaN where not scored)."""

    decision: GateDecision
    acceptance_candidate: float = float("nan")
    acceptance_incumbent: float = float("nan")
    acceptance_floor: float = float("nan")


class Judge:
    """Keeps the held-out window and asks the gate."""

    def __init__(self, settings: LearnerSettings, score: ScoreState) -> None:
        self._settings = settings
        self._score = score
        self._window = HeldOutWindow(settings.held_out_window_records)

    @property
    def num_records(self) -> int:
        return len(self._window)

    def split(self, records: Sequence[GenerationRecord]) -> list[GenerationRecord]:
        """Keeps the held-out ones and returns the others, to learn from."""
        held_out_share = self._settings.held_out_share
        self._window.add(record for record in records if is_held_out(record.request_id, held_out_share))
        return [record for record in records if not is_held_out(record.request_id, held_out_share)]

    def compare(self, drafts: Sequence[ExistingDraft]) -> Worths:
        """What each draft that exists is worth on the last held-out records. Forgets every other draft."""
        self._window.keep_drafts(draft.key for draft in drafts)
        return worths(self._window, drafts, self._settings.route_evidence_records, self._score)

    def judge(
        self,
        candidate: AdapterState,
        incumbent: ExistingDraft,
        *,
        fault: str,
        operation: Operation,
        seed: Sequence[int],
        now_s: float,
    ) -> Judgement:
        """`fault` is what is already known to speak against the candidate; `seed` draws the bootstrap."""
        self._window.expire(now_s)
        if fault:
            return Judgement(GateDecision(False, fault))
        floor = self._window.scores(FLOOR.key, partial(self._score, None))
        before = floor
        if incumbent.state is not None:
            before = self._window.scores(incumbent.key, partial(self._score, incumbent.state))
        after = self._window.fresh_scores(partial(self._score, candidate))
        triples = [
            (new, old, base)
            for new, old, base in zip(after, before, floor, strict=True)
            if new is not None and old is not None and base is not None
        ]
        scores = [list(column) for column in zip(*triples, strict=True)] or [[], [], []]
        decision = decide(
            *scores,
            fault="",
            operation=operation,
            rule=_rule(self._settings),
            rng=np.random.default_rng(list(seed)),
        )
        return Judgement(decision, *(acceptance(column) for column in scores))


def operation(statuses: Iterable[ServingStatus], nominal_num_draft_tokens: int) -> Operation:
    """How the replica that reported last runs; the nominal draft length until one drafts."""
    latest = max(statuses, key=lambda status: status.at_s, default=None)
    if latest is None:
        return Operation(nominal_num_draft_tokens)
    return Operation(
        num_draft_tokens=latest.num_draft_tokens or nominal_num_draft_tokens,
        mean_batch_size=max(1.0, latest.mean_batch_size),
        costs=latest.costs,
    )


def _rule(settings: LearnerSettings) -> GateRule:
    return GateRule(
        min_records=settings.gate_min_records,
        level=settings.gate_level,
        min_gain=settings.gate_min_gain,
        num_resamples=settings.gate_num_resamples,
    )
