"""Every way we know to get a bad draft served, tried on the real parts, by name and seed.

Knows no thresholds: it says what was refused, by whom and why. What offline evidence can show is here, what
only live traffic can is in `live_attacks`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.osd.attack_outcome import (
    AS_IT_IS,
    ATTACK,
    FRESH,
    HELD_OUT,
    WATCH_ONLY,
    AttackOutcome,
    better,
    judged,
    mixed,
    random_weights,
    refused,
)
from benchmarks.osd.bad_adapters import BAD_ADAPTERS
from benchmarks.osd.bad_records import BAD_RECORDS
from benchmarks.osd.live_attacks import (
    BAD_SWAPS,
    UNJUDGED,
    Candidate,
    bad_swap,
    misleading_window,
    shift,
    unjudged,
)
from benchmarks.osd.testbed import INCUMBENT, Testbed, scaled
from buffer.errors import VersionConflictError
from learner.draft import AdapterState, export_weights

Attack = Callable[[Testbed, int], AttackOutcome]


# adapters that somebody or something spoilt on the way


def spoilt_adapter(testbed: Testbed, seed: int, kind: str) -> AttackOutcome:
    with testbed.deployment(**WATCH_ONLY) as deployment:
        weights = export_weights(better(testbed))
        manifest = testbed.manifest(weights, ATTACK, deployment.draft)
        deployment.feed.publish(*BAD_ADAPTERS[kind](manifest, weights, np.random.default_rng(seed)))
        deployment.replica.follow()
        served = testbed.engine.draft_version != INCUMBENT
        deployment.turn()
        assert deployment.pointed_version == INCUMBENT or served
        return refused(
            deployment, AttackOutcome("adapter", kind, seed, served=served), "replica", "rejected_by_replica"
        )


def replayed_version(testbed: Testbed, seed: int) -> AttackOutcome:
    """Other weights under the number that serves."""
    with testbed.deployment(**WATCH_ONLY) as deployment:
        try:
            deployment.publish(export_weights(scaled(testbed.incumbent_state, 0.1 * seed)), INCUMBENT)
        except VersionConflictError as error:
            return AttackOutcome(
                "adapter", "version replayed", seed, "feed", reason=str(error), reported=True
            )
        return AttackOutcome("adapter", "version replayed", seed, served=True)


# candidates that the gate has to judge


def bad_training(testbed: Testbed, seed: int, kind: str) -> AttackOutcome:
    """Honest held-out records, spoilt ones to learn from."""
    rng = np.random.default_rng(seed)
    honest = mixed(testbed, rng, HELD_OUT + FRESH)
    with testbed.deployment() as deployment:
        deployment.give(honest[:HELD_OUT], held_out=True)
        try:
            deployment.give([BAD_RECORDS[kind](record, rng) for record in honest[HELD_OUT:]], held_out=False)
        except ValueError as error:  # the store takes only what can be a record
            return AttackOutcome("records", kind, seed, "store", reason=str(error), reported=True)
        deployment.turn()
        return judged(deployment, AttackOutcome("records", kind, seed))


def _filled(state: AdapterState, rng: np.random.Generator, value: float) -> AdapterState:
    name = sorted(state)[rng.integers(len(state))]
    return {**state, name: torch.full_like(state[name], value)}


CANDIDATES: Mapping[str, Candidate] = {
    "NaN": lambda state, rng: _filled(state, rng, float("nan")),
    "infinity": lambda state, rng: _filled(state, rng, float("inf")),
    "random weights": random_weights,
    "unchanged": lambda state, rng: state,
    "the floor again": lambda state, rng: scaled(state, 0.0),
    "half unlearnt": lambda state, rng: scaled(state, 0.5),
    "overgrown": lambda state, rng: scaled(state, 50.0),
}


def bad_candidate(testbed: Testbed, seed: int, kind: str) -> AttackOutcome:
    """Honest records, but the weights that are judged are not what training made."""
    rng = np.random.default_rng(seed)
    with testbed.deployment(**AS_IT_IS) as deployment:
        deployment.offer(CANDIDATES[kind](testbed.incumbent_state, rng))
        deployment.give(mixed(testbed, rng, HELD_OUT), held_out=True)
        deployment.give(mixed(testbed, rng, FRESH), held_out=False)
        deployment.turn()
        return judged(deployment, AttackOutcome("candidate", kind, seed))


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
    testbed: Testbed,
    num_seeds: int,
    families: Sequence[str] | None = None,
    report: Callable[[str], None] = print,
) -> list[AttackOutcome]:
    """Every attack with every seed."""
    outcomes = []
    for family, listed in attacks().items():
        if families is not None and family not in families:
            continue
        for place, (kind, attack) in enumerate(listed):
            for seed in range(num_seeds):
                outcomes.append(attack(testbed, 1000 * place + seed))
            report(f"{family}: {kind}, {num_seeds} times")
    return outcomes
