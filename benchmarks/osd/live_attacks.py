"""Bad drafts that only live traffic can show, served past the gate; and a good one under traffic that shifts.

Knows no thresholds. `shift` is no attack but the control: that draft must stay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from typing import NoReturn

import numpy as np
import torch

from benchmarks.osd.attack_outcome import (
    AS_IT_IS,
    ATTACK,
    FRESH,
    HELD_OUT,
    REQUESTS_A_LOOK,
    WATCH_ONLY,
    AttackOutcome,
    better,
    drawn,
    judged,
    random_weights,
    traffic,
    watched,
)
from benchmarks.osd.bad_records import BAD_RECORDS
from benchmarks.osd.testbed import Testbed, scaled
from buffer.records import AdapterManifest
from learner.draft import AdapterState, export_weights
from learner.judging.evaluation import RecordScore
from learner.trainer import Trainer
from serving.models.draft_weights import StagedWeights
from serving.served_drafts import ServedDrafts

SHIFT_REQUESTS = 36
MUCH_WORSE, MOST_TWISTS = 0.15, 10

Candidate = Callable[[AdapterState, np.random.Generator], AdapterState]
Merged = Mapping[str, torch.Tensor]
BadSwap = Callable[[StagedWeights, np.random.Generator], Merged]


def misleading_window(testbed: Testbed, seed: int) -> AttackOutcome:
    """Better on all that was held out, since it learnt that well and something else wrong; then traffic is
    the something else. Afterwards the same weights knock again."""
    rng = np.random.default_rng(seed)
    kinds = list(testbed.prompts)
    shown, other = (kinds[index] for index in rng.permutation(len(kinds))[:2])
    candidate = _two_faced(testbed, shown, other, rng)
    with testbed.deployment(**AS_IT_IS) as deployment:
        deployment.offer(candidate)
        deployment.give(drawn(testbed, shown, rng, HELD_OUT), held_out=True)
        deployment.give(drawn(testbed, shown, rng, FRESH), held_out=False)
        deployment.turn()
        found = AttackOutcome("window", f"{shown}, then {other}", seed)
        if deployment.pointed_version != ATTACK:
            return judged(deployment, found)
        found = watched(deployment, found, candidate, testbed.incumbent_state, cycle([other]))
        deployment.offer(candidate)
        deployment.give(drawn(testbed, shown, rng, FRESH), held_out=False)
        deployment.turn()
        return AttackOutcome(**asdict(found) | {"promoted_again": deployment.pointed_version > ATTACK})


UNJUDGED: Mapping[str, Candidate] = {
    "a fifth unlearnt": lambda state, rng: scaled(state, 0.8),
    "a third unlearnt": lambda state, rng: scaled(state, 0.67),
    "half unlearnt": lambda state, rng: scaled(state, 0.5),
    "the floor": lambda state, rng: scaled(state, 0.0),
    "random weights": random_weights,
    "overgrown": lambda state, rng: scaled(state, 8.0),
}


def unjudged(testbed: Testbed, seed: int, kind: str) -> AttackOutcome:
    """Published past the gate, fitting in every respect."""
    bad = UNJUDGED[kind](testbed.incumbent_state, np.random.default_rng(seed))
    with testbed.deployment(**WATCH_ONLY) as deployment:
        deployment.publish(export_weights(bad), ATTACK)
        deployment.turn()
        found = AttackOutcome("unjudged", kind, seed)
        return watched(deployment, found, bad, testbed.incumbent_state, traffic(testbed, seed))


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


class FaultyDrafts(ServedDrafts):
    """A replica's drafts that stage one adapter well and make another one live."""

    def __init__(self, testbed: Testbed, bad_swap: BadSwap, rng: np.random.Generator) -> None:
        drafts = testbed.engine.drafts
        assert drafts is not None
        super().__init__(testbed.engine, drafts.default, _no_draft)
        self._bad_swap, self._rng = bad_swap, rng

    def stage(self, route: str, manifest: AdapterManifest | None, weights: bytes = b"") -> StagedWeights:
        staged = super().stage(route, manifest, weights)
        if staged.draft_version != ATTACK:
            return staged
        return StagedWeights(ATTACK, staged.owner, self._bad_swap(staged, self._rng))


def _no_draft() -> NoReturn:
    raise AssertionError("no route is opened here")


def bad_swap(testbed: Testbed, seed: int, kind: str) -> AttackOutcome:
    """A good draft, but what serves under its number is something else."""
    said = better(testbed)
    faulty = FaultyDrafts(testbed, BAD_SWAPS[kind], np.random.default_rng(seed))
    with testbed.deployment(faulty, **WATCH_ONLY) as deployment:
        deployment.publish(export_weights(said), ATTACK)
        deployment.turn()
        return watched(deployment, AttackOutcome("swap", kind, seed), None, said, traffic(testbed, seed))


def shift(testbed: Testbed, seed: int) -> AttackOutcome:
    """A good draft; one kind of traffic, then another, harder or easier."""
    rng = np.random.default_rng(seed)
    kinds = list(testbed.prompts)
    first, second = (kinds[index] for index in rng.permutation(len(kinds))[:2])
    with testbed.deployment(**WATCH_ONLY) as deployment:
        deployment.publish(export_weights(better(testbed)), ATTACK)
        deployment.turn()
        served = testbed.engine.draft_version == ATTACK
        for number in range(SHIFT_REQUESTS // REQUESTS_A_LOOK):
            deployment.serve(
                first if 3 * number < SHIFT_REQUESTS // REQUESTS_A_LOOK else second, REQUESTS_A_LOOK
            )
            deployment.turn()
        gone = deployment.pointed_version != ATTACK
        reason = deployment.events("rolled_back")[-1].reason if gone else ""
        return AttackOutcome("shift", f"{first}, then {second}", seed, "", served, gone, reason=reason)


def _two_faced(testbed: Testbed, shown: str, other: str, rng: np.random.Generator) -> AdapterState:
    """Trained on one kind of traffic as it is and on another one poisoned, until that is much worse than the
    incumbent's."""
    draft = testbed.trainable()
    trainer = Trainer(draft, testbed.settings)
    trainer.reset(better(testbed))
    unseen, poison = drawn(testbed, other, rng, 12), BAD_RECORDS["poisoned"]
    enough = _mean(trainer.score(testbed.incumbent_state, unseen)) - MUCH_WORSE
    for _ in range(MOST_TWISTS):
        for _ in range(3):
            wrong = [poison(record, rng) for record in drawn(testbed, other, rng, 6)]
            trainer.step([*drawn(testbed, shown, rng, 8), *wrong])
        if _mean(trainer.score(draft.state(), unseen)) < enough:
            break
    return draft.state()


def _mean(scores: Sequence[RecordScore | None]) -> float:
    return float(np.mean([score.acceptance for score in scores if score is not None]))
