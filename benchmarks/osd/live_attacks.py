"""Bad drafts that only live traffic can show, served past the gate; and a good one under traffic that shifts.

Knows no thresholds. `shift` is no attack but the control: that draft must stay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from typing import Any

import numpy as np
import torch

from benchmarks.osd.attack_house import (
    AS_IT_IS,
    ATTACK,
    FRESH,
    HELD_OUT,
    REQUESTS_A_LOOK,
    WATCH_ONLY,
    Outcome,
    better,
    drawn,
    judged,
    random_weights,
    traffic,
    watched,
)
from benchmarks.osd.bad_records import BAD_RECORDS
from benchmarks.osd.stand import Stand, scaled
from learner.draft import AdapterState, export_weights
from learner.evaluation import RecordScore
from learner.trainer import Trainer
from serving.models.draft_weights import DraftWeights, StagedWeights

SHIFT_REQUESTS = 36
MUCH_WORSE, MOST_TWISTS = 0.15, 10

Candidate = Callable[[AdapterState, np.random.Generator], AdapterState]
Merged = Mapping[str, torch.Tensor]
BadSwap = Callable[[StagedWeights, np.random.Generator], Merged]


def misleading_window(stand: Stand, seed: int) -> Outcome:
    """Better on all that was held out, since it learnt that well and something else wrong; then traffic is
    the something else. Afterwards the same weights knock again."""
    rng = np.random.default_rng(seed)
    kinds = list(stand.prompts)
    shown, other = (kinds[index] for index in rng.permutation(len(kinds))[:2])
    candidate = _two_faced(stand, shown, other, rng)
    with stand.house(**AS_IT_IS) as house:
        house.offer(candidate)
        house.give(drawn(stand, shown, rng, HELD_OUT), held_out=True)
        house.give(drawn(stand, shown, rng, FRESH), held_out=False)
        house.turn()
        found = Outcome("window", f"{shown}, then {other}", seed)
        if house.pointed_version != ATTACK:
            return judged(house, found)
        found = watched(house, found, candidate, stand.incumbent_state, cycle([other]))
        house.offer(candidate)
        house.give(drawn(stand, shown, rng, FRESH), held_out=False)
        house.turn()
        return Outcome(**asdict(found) | {"promoted_again": house.pointed_version > ATTACK})


UNJUDGED: Mapping[str, Candidate] = {
    "a fifth unlearnt": lambda state, rng: scaled(state, 0.8),
    "a third unlearnt": lambda state, rng: scaled(state, 0.67),
    "half unlearnt": lambda state, rng: scaled(state, 0.5),
    "the floor": lambda state, rng: scaled(state, 0.0),
    "random weights": random_weights,
    "overgrown": lambda state, rng: scaled(state, 8.0),
}


def unjudged(stand: Stand, seed: int, kind: str) -> Outcome:
    """Published past the gate, fitting in every respect."""
    bad = UNJUDGED[kind](stand.incumbent_state, np.random.default_rng(seed))
    with stand.house(**WATCH_ONLY) as house:
        house.publish(export_weights(bad), ATTACK)
        house.turn()
        found = Outcome("unjudged", kind, seed)
        return watched(house, found, bad, stand.incumbent_state, traffic(stand, seed))


def _half(staged: StagedWeights, rng: np.random.Generator) -> Merged:
    names = sorted(staged.merged)
    kept = rng.permutation(len(names))[: len(names) // 2]
    return {names[index]: staged.merged[names[index]] for index in kept}


def _merged_twice(staged: StagedWeights, rng: np.random.Generator) -> Merged:
    floor = staged.owner.floor_parameters()
    return {name: 2 * merged - floor[name] for name, merged in staged.merged.items()}


def _signs(staged: StagedWeights, rng: np.random.Generator) -> Merged:
    return {name: merged.sign() * merged.abs().mean() for name, merged in staged.merged.items()}


BAD_SWAPS: Mapping[str, BadSwap] = {
    "nothing was copied": lambda staged, rng: {},
    "half was copied": _half,
    "merged twice": _merged_twice,
    "only signs were copied": _signs,
}


class FaultyWeights:
    """A replica's weights that stage one adapter well and make another one live."""

    def __init__(self, weights: DraftWeights, swap: BadSwap, rng: np.random.Generator) -> None:
        self._weights, self._swap, self._rng = weights, swap, rng

    def stage(self, weights: bytes, **said: Any) -> StagedWeights:
        staged = self._weights.stage(weights, **said)
        if staged.draft_version != ATTACK:
            return staged
        return StagedWeights(ATTACK, staged.owner, self._swap(staged, self._rng))

    def stage_floor(self) -> StagedWeights:
        return self._weights.stage_floor()


def bad_swap(stand: Stand, seed: int, kind: str) -> Outcome:
    """A good draft, but what serves under its number is something else."""
    said = better(stand)
    weights = stand.engine.draft_weights
    assert weights is not None
    faulty = FaultyWeights(weights, BAD_SWAPS[kind], np.random.default_rng(seed))
    with stand.house(faulty, **WATCH_ONLY) as house:
        house.publish(export_weights(said), ATTACK)
        house.turn()
        return watched(house, Outcome("swap", kind, seed), None, said, traffic(stand, seed))


def shift(stand: Stand, seed: int) -> Outcome:
    """A good draft; one kind of traffic, then another, harder or easier."""
    rng = np.random.default_rng(seed)
    kinds = list(stand.prompts)
    first, second = (kinds[index] for index in rng.permutation(len(kinds))[:2])
    with stand.house(**WATCH_ONLY) as house:
        house.publish(export_weights(better(stand)), ATTACK)
        house.turn()
        served = stand.engine.draft_version == ATTACK
        for number in range(SHIFT_REQUESTS // REQUESTS_A_LOOK):
            house.serve(first if 3 * number < SHIFT_REQUESTS // REQUESTS_A_LOOK else second, REQUESTS_A_LOOK)
            house.turn()
        gone = house.pointed_version != ATTACK
        reason = house.events("rolled_back")[-1].reason if gone else ""
        return Outcome("shift", f"{first}, then {second}", seed, "", served, gone, reason=reason)


def _two_faced(stand: Stand, shown: str, other: str, rng: np.random.Generator) -> AdapterState:
    """Trained on one kind of traffic as it is and on another one poisoned, until that is much worse than the
    incumbent's."""
    draft = stand.trainable()
    trainer = Trainer(draft, stand.settings)
    trainer.reset(better(stand))
    unseen, poison = drawn(stand, other, rng, 12), BAD_RECORDS["poisoned"]
    enough = _mean(trainer.score(stand.incumbent_state, unseen)) - MUCH_WORSE
    for _ in range(MOST_TWISTS):
        for _ in range(3):
            wrong = [poison(record, rng) for record in drawn(stand, other, rng, 6)]
            trainer.step([*drawn(stand, shown, rng, 8), *wrong])
        if _mean(trainer.score(draft.state(), unseen)) < enough:
            break
    return draft.state()


def _mean(scores: Sequence[RecordScore | None]) -> float:
    return float(np.mean([score.acceptance for score in scores if score is not None]))
