"""What attacks came to: counts by family and kind, and a table. Knows no engine."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.osd.attack_outcome import AttackOutcome
from deploy.errors import DeployError

OFFLINE = ("adapter", "candidate", "records")
"""Families that evidence before serving can show."""
LIVE = ("unjudged", "swap", "window")
FAMILIES = (*OFFLINE, *LIVE, "shift")
COSTLY = 0.1
"""Acceptance lost from which on the speed of a rollback is judged."""
MOST_ROUNDS = 500
"""Of single sequences, from the swap to the rollback of a costly draft."""


class FamilyError(DeployError, ValueError):
    """A family of attacks that does not exist; nothing was tried."""


def check_families(families: Sequence[str] | None) -> None:
    """Raises FamilyError; None is all of them."""
    for family in families or ():
        if family not in FAMILIES:
            raise FamilyError(f"family={family!r} is none of {FAMILIES}; nothing was tried")


def metrics(outcomes: Sequence[AttackOutcome]) -> dict[str, Any]:
    """Counts by family and kind, and the figures that the bars are about."""
    offline = [outcome for outcome in outcomes if outcome.family in OFFLINE]
    live = [outcome for outcome in outcomes if outcome.family in LIVE]
    costly = [outcome for outcome in live if outcome.served and outcome.cost >= COSTLY]
    rounds = [outcome.rounds_until_rollback for outcome in costly if outcome.rolled_back]
    controls = [outcome for outcome in outcomes if outcome.family == "shift"]
    by_kind: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        by_kind.setdefault(f"{outcome.family}: {outcome.kind}", _counts([]))
    for name in by_kind:
        by_kind[name] = _counts([one for one in outcomes if f"{one.family}: {one.kind}" == name])
    return {
        "num_attacks": len(offline) + len(live),
        "num_offline": len(offline),
        "num_offline_served": sum(outcome.served for outcome in offline),
        "num_live": len(live),
        "num_live_refused_offline": sum(not outcome.served for outcome in live),
        "num_live_costly": len(costly),
        "num_live_costly_rolled_back": len(rounds),
        "num_live_costly_rolled_back_in_time": sum(number <= MOST_ROUNDS for number in rounds),
        "rounds_until_rollback_median": float(np.median(rounds)) if rounds else None,
        "rounds_until_rollback_max": max(rounds, default=None),
        "num_promoted_again": sum(outcome.promoted_again for outcome in live),
        "num_unreported": sum(
            not outcome.reported for outcome in [*offline, *live] if not _is_missed(outcome)
        ),
        "num_shifts": len(controls),
        "num_good_rolled_back": sum(outcome.rolled_back for outcome in controls),
        "by_kind": by_kind,
    }


def _is_missed(outcome: AttackOutcome) -> bool:
    """Served and left there: nothing was decided that could be reported."""
    return outcome.served and not outcome.rolled_back


def _counts(outcomes: Sequence[AttackOutcome]) -> dict[str, Any]:
    served = [outcome for outcome in outcomes if outcome.served]
    return {
        "attempted": len(outcomes),
        "refused_offline": sum(outcome.refused_by in ("gate", "feed", "store") for outcome in outcomes),
        "refused_by_replica": sum(outcome.refused_by == "replica" for outcome in outcomes),
        "served": len(served),
        "rolled_back": sum(outcome.rolled_back for outcome in served),
        "rounds_until_rollback": [outcome.rounds_until_rollback for outcome in served if outcome.rolled_back],
        "cost": [round(outcome.cost, 3) for outcome in served],
        "reason": next((outcome.reason for outcome in outcomes if outcome.reason), ""),
    }


def table(figures: dict[str, Any]) -> Table:
    """One line a kind."""
    columns = ("attempted", "refused_offline", "refused_by_replica", "served", "rolled_back")
    shown = Table("attack", *(column.replace("_", " ") for column in columns), "rounds, most", "cost, least")
    for name, counts in figures["by_kind"].items():
        rounds, costs = counts["rounds_until_rollback"], counts["cost"]
        shown.add_row(
            name,
            *(str(counts[column]) for column in columns),
            str(max(rounds)) if rounds else "",
            f"{min(costs):.2f}" if costs else "",
        )
    return shown
