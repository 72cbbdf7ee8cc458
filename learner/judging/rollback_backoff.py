"""What a rollback teaches the gate: the held-out traffic that let the loser in is convicted with it.

Pure; read from the feed's own history, so it outlives the learner and an operator's rollback counts like
the learner's. Invariant: after a rollback nothing is promoted on records older than the promotion that
failed, and each further failure in a row doubles the records that are needed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from buffer.records import AdapterEvent


@dataclass(frozen=True)
class RollbackBackoff:
    """`trusted_since_s`: older held-out records judge nothing any more."""

    trusted_since_s: float = 0.0
    num_failures: int = 0
    """Promotions in a row, the last ones, that were rolled back."""

    def min_records(self, usual: int, most: int) -> int:
        """Held-out records that the next promotion needs; at most a full window, or none could ever pass."""
        return min(max(usual, most), usual << max(0, self.num_failures - 1))


def rollback_backoff(history: Iterable[AdapterEvent]) -> RollbackBackoff:
    """`history` oldest first. A promotion that another one followed has stood its trial; a route that is
    opened again starts anew, for what was taken back when it closed was no failure."""
    found, promoted_s = RollbackBackoff(), None
    for event in history:
        if event.kind == "opened":
            found, promoted_s = RollbackBackoff(), None
        elif event.kind == "promoted":
            if promoted_s is not None:
                found = RollbackBackoff(found.trusted_since_s)
            promoted_s = event.at_s
        elif event.kind == "rolled_back" and promoted_s is not None:
            found, promoted_s = RollbackBackoff(promoted_s, found.num_failures + 1), None
    return found
