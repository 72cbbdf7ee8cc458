"""How an attack is followed: who refused it and why, or for how many rounds it served and what that cost.

Knows no attack. Rounds are those of single sequences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from benchmarks.osd.testbed import INCUMBENT, InProcessDeployment, ServedTurn, Testbed, acceptance, scaled
from buffer.records import GenerationRecord
from learner.draft import AdapterState
from learner.judging.evaluation import RecordScore

ATTACK = INCUMBENT + 1
"""draft_version under which an attack would serve."""
HELD_OUT, FRESH = 32, 24
"""Records of a deployment in which the gate is attacked."""
REQUESTS_A_LOOK = 3
MAX_ROUNDS = 1000
AS_IT_IS = {"learning_rate": 1e-12, "max_steps_per_cycle": 1}
"""Learner settings under which a candidate put there stays what it is."""
WATCH_ONLY = {"min_records_per_cycle": 10_000, "max_record_age_s": 1e9}


@dataclass(frozen=True)
class AttackOutcome:
    """What became of one attack. `refused_by`: store, feed, replica or gate (before it, the learner: what is
    nothing to learn from, and weights that are none, reach the gate as a fault)."""

    family: str
    kind: str
    seed: int
    refused_by: str = ""
    served: bool = False
    rolled_back: bool = False
    rounds_until_rollback: int = 0
    cost: float = 0.0
    """Acceptance lost while it served, at the same positions: against its parent, or where a swap did
    something else than it said, against what it said."""
    reason: str = ""
    reported: bool = False
    """The reason is in the feed's history and in the tracker."""
    promoted_again: bool = False


def better(testbed: Testbed) -> AdapterState:
    """The incumbent, gone further on its own way: a draft that is truly better."""
    return scaled(testbed.incumbent_state, 1 / 0.75)


def watched(
    deployment: InProcessDeployment,
    found: AttackOutcome,
    serving: AdapterState | None,
    reference: AdapterState,
    traffic: Iterator[str],
) -> AttackOutcome:
    """Serve until it is taken back. `serving` None: what serves is not known; what was observed counts."""
    turns: list[ServedTurn] = []
    records: list[GenerationRecord] = []
    served = deployment.testbed.engine.draft_version == ATTACK
    while deployment.pointed_version == ATTACK and sum(turn.num_rounds for turn in turns) < MAX_ROUNDS:
        turns.append(deployment.serve(next(traffic), REQUESTS_A_LOOK))
        records += deployment.served_last
        deployment.learner.run_cycle()
    gone = deployment.pointed_version != ATTACK
    deployment.replica.follow()
    reason = deployment.events("rolled_back")[-1].reason if gone else ""
    return AttackOutcome(
        found.family,
        found.kind,
        found.seed,
        served=served,
        rolled_back=gone and deployment.testbed.engine.draft_version == INCUMBENT,
        rounds_until_rollback=sum(turn.num_rounds for turn in turns),
        cost=_cost(deployment, records, turns, serving, reference),
        reason=reason,
        reported=any(f"rolled_back: {reason}" == line for line in deployment.diary.decisions),
    )


def _cost(
    deployment: InProcessDeployment,
    records: Sequence[GenerationRecord],
    turns: Sequence[ServedTurn],
    serving: AdapterState | None,
    reference: AdapterState,
) -> float:
    if not records:
        return 0.0
    should = _expected(deployment.score(reference, records))
    return should - (acceptance(turns) if serving is None else _expected(deployment.score(serving, records)))


def _expected(scores: Sequence[RecordScore]) -> float:
    """Where drafts were attempted."""
    found = np.concatenate([score.expected_N[score.attempted_N] for score in scores])
    return float(found.mean())


def judged(deployment: InProcessDeployment, found: AttackOutcome) -> AttackOutcome:
    """What the gate said."""
    if deployment.pointed_version == ATTACK:
        return AttackOutcome(found.family, found.kind, found.seed, served=True)
    return refused(deployment, found, "gate", "refused")


def refused(deployment: InProcessDeployment, found: AttackOutcome, by: str, event: str) -> AttackOutcome:
    """Who refused it, why, and whether the reason was reported."""
    reasons = [one.reason for one in deployment.events(event)]
    reason = reasons[-1] if reasons else ""
    reported = bool(reason) and any(line == f"{event}: {reason}" for line in deployment.diary.decisions)
    return AttackOutcome(
        found.family,
        found.kind,
        found.seed,
        "" if found.served else by,
        found.served,
        reason=reason,
        reported=reported,
    )


def drawn(testbed: Testbed, kind: str, rng: np.random.Generator, num_records: int) -> list[GenerationRecord]:
    """Honest records of one kind of traffic."""
    records = testbed.records[kind]
    return [records[index] for index in rng.permutation(len(records))[:num_records]]


def mixed(testbed: Testbed, rng: np.random.Generator, num_records: int) -> list[GenerationRecord]:
    """Honest records of every kind."""
    every = [record for records in testbed.records.values() for record in records]
    return [every[index] for index in rng.permutation(len(every))[:num_records]]


def traffic(testbed: Testbed, seed: int) -> Iterator[str]:
    """The kinds in turn, endless."""
    kinds = list(testbed.prompts)
    return cycle(kinds[seed % len(kinds) :] + kinds[: seed % len(kinds)])


def random_weights(state: AdapterState, rng: np.random.Generator) -> AdapterState:
    """Of the scale of the given ones."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    return {
        name: torch.randn(weight.shape, generator=generator) * weight.std() for name, weight in state.items()
    }
