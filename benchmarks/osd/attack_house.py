"""How an attack is followed: who refused it and why, or for how many rounds it served and what that cost.

Knows no attack. Rounds are those of single sequences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from benchmarks.osd.stand import INCUMBENT, House, Stand, Turn, acceptance, scaled
from buffer.records import GenerationRecord
from learner.draft import AdapterState
from learner.evaluation import RecordScore

ATTACK = INCUMBENT + 1
"""draft_version under which an attack would serve."""
HELD_OUT, FRESH = 32, 24
"""Records of a house in which the gate is attacked."""
REQUESTS_A_LOOK = 3
MAX_ROUNDS = 1000
AS_IT_IS = {"learning_rate": 1e-12, "max_steps_per_cycle": 1}
"""Learner settings under which a candidate put there stays what it is."""
WATCH_ONLY = {"min_records_per_cycle": 10_000, "max_record_age_s": 1e9}


@dataclass(frozen=True)
class Outcome:
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
    told: bool = False
    """The reason is in the feed's history and in the tracker."""
    promoted_again: bool = False


def better(stand: Stand) -> AdapterState:
    """The incumbent, gone further on its own way: a draft that is truly better."""
    return scaled(stand.incumbent_state, 1 / 0.75)


def watched(
    house: House,
    found: Outcome,
    serving: AdapterState | None,
    reference: AdapterState,
    traffic: Iterator[str],
) -> Outcome:
    """Serve until it is taken back. `serving` None: what serves is not known; what was observed counts."""
    turns: list[Turn] = []
    records: list[GenerationRecord] = []
    served = house.stand.engine.draft_version == ATTACK
    while house.pointed_version == ATTACK and sum(turn.num_rounds for turn in turns) < MAX_ROUNDS:
        turns.append(house.serve(next(traffic), REQUESTS_A_LOOK))
        records += house.served_last
        house.learner.run_cycle()
    gone = house.pointed_version != ATTACK
    house.replica.follow()
    reason = house.events("rolled_back")[-1].reason if gone else ""
    return Outcome(
        found.family,
        found.kind,
        found.seed,
        served=served,
        rolled_back=gone and house.stand.engine.draft_version == INCUMBENT,
        rounds_until_rollback=sum(turn.num_rounds for turn in turns),
        cost=_cost(house, records, turns, serving, reference),
        reason=reason,
        told=any(f"rolled_back: {reason}" == line for line in house.diary.decisions),
    )


def _cost(
    house: House,
    records: Sequence[GenerationRecord],
    turns: Sequence[Turn],
    serving: AdapterState | None,
    reference: AdapterState,
) -> float:
    if not records:
        return 0.0
    should = _expected(house.score(reference, records))
    return should - (acceptance(turns) if serving is None else _expected(house.score(serving, records)))


def _expected(scores: Sequence[RecordScore]) -> float:
    """Where drafts were attempted."""
    found = np.concatenate([score.expected_N[score.attempted_N] for score in scores])
    return float(found.mean())


def judged(house: House, found: Outcome) -> Outcome:
    """What the gate said."""
    if house.pointed_version == ATTACK:
        return Outcome(found.family, found.kind, found.seed, served=True)
    return refused(house, found, "gate", "refused")


def refused(house: House, found: Outcome, by: str, event: str) -> Outcome:
    """Who refused it, why, and whether the reason was told."""
    reasons = [one.reason for one in house.events(event)]
    reason = reasons[-1] if reasons else ""
    told = bool(reason) and any(line == f"{event}: {reason}" for line in house.diary.decisions)
    return Outcome(
        found.family,
        found.kind,
        found.seed,
        "" if found.served else by,
        found.served,
        reason=reason,
        told=told,
    )


def drawn(stand: Stand, kind: str, rng: np.random.Generator, num_records: int) -> list[GenerationRecord]:
    """Honest records of one kind of traffic."""
    records = stand.records[kind]
    return [records[index] for index in rng.permutation(len(records))[:num_records]]


def mixed(stand: Stand, rng: np.random.Generator, num_records: int) -> list[GenerationRecord]:
    """Honest records of every kind."""
    every = [record for records in stand.records.values() for record in records]
    return [every[index] for index in rng.permutation(len(every))[:num_records]]


def traffic(stand: Stand, seed: int) -> Iterator[str]:
    """The kinds in turn, endless."""
    kinds = list(stand.prompts)
    return cycle(kinds[seed % len(kinds) :] + kinds[: seed % len(kinds)])


def random_weights(state: AdapterState, rng: np.random.Generator) -> AdapterState:
    """Of the scale of the given ones."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    return {
        name: torch.randn(weight.shape, generator=generator) * weight.std() for name, weight in state.items()
    }
