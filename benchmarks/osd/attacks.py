"""Every way we know to get a bad draft served, tried on the real parts, by name and seed.

Knows no thresholds: it says what was refused, by whom and why, what was served, and how many rounds of single
sequences a bad draft drafted until it was taken back. `shift` is no attack: a good draft under traffic that
changes must stay.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch

from benchmarks.osd.bad_adapters import BAD_ADAPTERS
from benchmarks.osd.bad_records import BAD_RECORDS
from benchmarks.osd.stand import INCUMBENT, House, Stand, Turn, acceptance, scaled
from buffer.errors import VersionConflictError
from buffer.records import GenerationRecord
from learner.draft import AdapterState, export_weights
from learner.evaluation import RecordScore
from learner.trainer import Trainer
from serving.models.draft_weights import DraftWeights, StagedWeights

ATTACK = INCUMBENT + 1
"""draft_version under which an attack would serve."""
HELD_OUT, FRESH = 32, 24
"""Records of a house in which the gate is attacked."""
REQUESTS_A_LOOK = 3
MAX_ROUNDS = 1000
SHIFT_REQUESTS = 36
MUCH_WORSE, MOST_TWISTS = 0.15, 10
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


Attack = Callable[[Stand, int], Outcome]
Candidate = Callable[[AdapterState, np.random.Generator], AdapterState]
Merged = Mapping[str, torch.Tensor]
BadSwap = Callable[[StagedWeights, np.random.Generator], Merged]


# adapters that somebody or something spoilt on the way


def spoilt_adapter(stand: Stand, seed: int, kind: str) -> Outcome:
    with stand.house(**WATCH_ONLY) as house:
        weights = export_weights(better(stand))
        manifest = stand.manifest(weights, ATTACK, house.draft)
        house.feed.publish(*BAD_ADAPTERS[kind](manifest, weights, np.random.default_rng(seed)))
        house.replica.follow()
        served = stand.engine.draft_version != INCUMBENT
        house.turn()
        assert house.pointed_version == INCUMBENT or served
        return _refused(
            house, Outcome("adapter", kind, seed, served=served), "replica", "rejected_by_replica"
        )


def replayed_version(stand: Stand, seed: int) -> Outcome:
    """Other weights under the number that serves."""
    with stand.house(**WATCH_ONLY) as house:
        try:
            house.publish(export_weights(scaled(stand.incumbent_state, 0.1 * seed)), INCUMBENT)
        except VersionConflictError as error:
            return Outcome("adapter", "version replayed", seed, "feed", reason=str(error), told=True)
        return Outcome("adapter", "version replayed", seed, served=True)


# candidates that the gate has to judge


def bad_training(stand: Stand, seed: int, kind: str) -> Outcome:
    """Honest held-out records, spoilt ones to learn from."""
    rng = np.random.default_rng(seed)
    honest = _mixed(stand, rng, HELD_OUT + FRESH)
    with stand.house() as house:
        house.give(honest[:HELD_OUT], held_out=True)
        try:
            house.give([BAD_RECORDS[kind](record, rng) for record in honest[HELD_OUT:]], held_out=False)
        except ValueError as error:  # the store takes only what can be a record
            return Outcome("records", kind, seed, "store", reason=str(error), told=True)
        house.turn()
        return _judged(house, Outcome("records", kind, seed))


def _filled(state: AdapterState, rng: np.random.Generator, value: float) -> AdapterState:
    name = sorted(state)[rng.integers(len(state))]
    return {**state, name: torch.full_like(state[name], value)}


def _random(state: AdapterState, rng: np.random.Generator) -> AdapterState:
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    return {
        name: torch.randn(weight.shape, generator=generator) * weight.std() for name, weight in state.items()
    }


CANDIDATES: Mapping[str, Candidate] = {
    "NaN": lambda state, rng: _filled(state, rng, float("nan")),
    "infinity": lambda state, rng: _filled(state, rng, float("inf")),
    "random weights": _random,
    "unchanged": lambda state, rng: state,
    "the floor again": lambda state, rng: scaled(state, 0.0),
    "half unlearnt": lambda state, rng: scaled(state, 0.5),
    "overgrown": lambda state, rng: scaled(state, 50.0),
}


def bad_candidate(stand: Stand, seed: int, kind: str) -> Outcome:
    """Honest records, but the weights that are judged are not what training made."""
    rng = np.random.default_rng(seed)
    with stand.house(**AS_IT_IS) as house:
        house.offer(CANDIDATES[kind](stand.incumbent_state, rng))
        house.give(_mixed(stand, rng, HELD_OUT), held_out=True)
        house.give(_mixed(stand, rng, FRESH), held_out=False)
        house.turn()
        return _judged(house, Outcome("candidate", kind, seed))


# what only live traffic can show


def misleading_window(stand: Stand, seed: int) -> Outcome:
    """Better on all that was held out, since it learnt that well and something else wrong; then traffic is
    the something else. Afterwards the same weights knock again."""
    rng = np.random.default_rng(seed)
    kinds = list(stand.prompts)
    shown, other = (kinds[index] for index in rng.permutation(len(kinds))[:2])
    candidate = _two_faced(stand, shown, other, rng)
    with stand.house(**AS_IT_IS) as house:
        house.offer(candidate)
        house.give(_drawn(stand, shown, rng, HELD_OUT), held_out=True)
        house.give(_drawn(stand, shown, rng, FRESH), held_out=False)
        house.turn()
        found = Outcome("window", f"{shown}, then {other}", seed)
        if house.pointed_version != ATTACK:
            return _judged(house, found)
        found = _watched(house, found, candidate, stand.incumbent_state, cycle([other]))
        house.offer(candidate)
        house.give(_drawn(stand, shown, rng, FRESH), held_out=False)
        house.turn()
        return Outcome(**asdict(found) | {"promoted_again": house.pointed_version > ATTACK})


UNJUDGED: Mapping[str, Candidate] = {
    "a fifth unlearnt": lambda state, rng: scaled(state, 0.8),
    "a third unlearnt": lambda state, rng: scaled(state, 0.67),
    "half unlearnt": lambda state, rng: scaled(state, 0.5),
    "the floor": lambda state, rng: scaled(state, 0.0),
    "random weights": _random,
    "overgrown": lambda state, rng: scaled(state, 8.0),
}


def unjudged(stand: Stand, seed: int, kind: str) -> Outcome:
    """Published past the gate, fitting in every respect."""
    bad = UNJUDGED[kind](stand.incumbent_state, np.random.default_rng(seed))
    with stand.house(**WATCH_ONLY) as house:
        house.publish(export_weights(bad), ATTACK)
        house.turn()
        traffic = _traffic(stand, seed)
        return _watched(house, Outcome("unjudged", kind, seed), bad, stand.incumbent_state, traffic)


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
        return _watched(house, Outcome("swap", kind, seed), None, said, _traffic(stand, seed))


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


# how an attack is followed


def better(stand: Stand) -> AdapterState:
    """The incumbent, gone further on its own way: a draft that is truly better."""
    return scaled(stand.incumbent_state, 1 / 0.75)


def _watched(
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


def _judged(house: House, found: Outcome) -> Outcome:
    if house.pointed_version == ATTACK:
        return Outcome(found.family, found.kind, found.seed, served=True)
    return _refused(house, found, "gate", "refused")


def _refused(house: House, found: Outcome, by: str, event: str) -> Outcome:
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


def _two_faced(stand: Stand, shown: str, other: str, rng: np.random.Generator) -> AdapterState:
    """Trained on one kind of traffic as it is and on another one poisoned, until that is much worse than the
    incumbent's."""
    draft = stand.trainable()
    trainer = Trainer(draft, stand.settings)
    trainer.reset(better(stand))
    judged, poison = _drawn(stand, other, rng, 12), BAD_RECORDS["poisoned"]
    enough = _mean(trainer.score(stand.incumbent_state, judged)) - MUCH_WORSE
    for _ in range(MOST_TWISTS):
        for _ in range(3):
            wrong = [poison(record, rng) for record in _drawn(stand, other, rng, 6)]
            trainer.step([*_drawn(stand, shown, rng, 8), *wrong])
        if _mean(trainer.score(draft.state(), judged)) < enough:
            break
    return draft.state()


def _mean(scores: Sequence[RecordScore | None]) -> float:
    return float(np.mean([score.acceptance for score in scores if score is not None]))


def _drawn(stand: Stand, kind: str, rng: np.random.Generator, num_records: int) -> list[GenerationRecord]:
    records = stand.records[kind]
    return [records[index] for index in rng.permutation(len(records))[:num_records]]


def _mixed(stand: Stand, rng: np.random.Generator, num_records: int) -> list[GenerationRecord]:
    every = [record for records in stand.records.values() for record in records]
    return [every[index] for index in rng.permutation(len(every))[:num_records]]


def _traffic(stand: Stand, seed: int) -> Iterator[str]:
    kinds = list(stand.prompts)
    return cycle(kinds[seed % len(kinds) :] + kinds[: seed % len(kinds)])


def attacks() -> dict[str, list[tuple[str, Attack]]]:
    """(kind, attack) by family; `shift` is the control."""
    return {
        "adapter": [(kind, partial(spoilt_adapter, kind=kind)) for kind in BAD_ADAPTERS]
        + [("version replayed", replayed_version)],
        "candidate": [(kind, partial(bad_candidate, kind=kind)) for kind in CANDIDATES],
        "records": [(kind, partial(bad_training, kind=kind)) for kind in BAD_RECORDS],
        "unjudged": [(kind, partial(unjudged, kind=kind)) for kind in UNJUDGED],
        "swap": [(kind, partial(bad_swap, kind=kind)) for kind in BAD_SWAPS],
        "window": [("misleading window", misleading_window)] * 3,
        "shift": [("shift", shift)],
    }


def run(
    stand: Stand, num_seeds: int, families: Sequence[str] | None = None, tell: Callable[[str], None] = print
) -> list[Outcome]:
    """Every attack with every seed."""
    outcomes = []
    for family, listed in attacks().items():
        if families is not None and family not in families:
            continue
        for place, (kind, attack) in enumerate(listed):
            for seed in range(num_seeds):
                outcomes.append(attack(stand, 1000 * place + seed))
            tell(f"{family}: {kind}, {num_seeds} times")
    return outcomes
