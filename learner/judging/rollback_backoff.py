"""Makes the gate stricter after rollbacks, and discards the held-out records that passed the bad draft.

Pure; computed from the feed's history, so that it survives a restart and an operator's rollback counts like
the learner's. Invariant: after a rollback nothing is promoted on records older than the promotion that
failed, and each further failure in a row doubles the records that are needed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from buffer.records import AdapterEvent


@dataclass(frozen=True)
class RollbackBackoff:
    """`trusted_since_s`: older held-out records are no longer used to judge."""

    trusted_since_s: float = 0.0
    num_failures: int = 0
    """How many of the last promotions, in a row, were rolled back."""

    def min_records(self, usual: int, most: int) -> int:
        """Held-out records that the next promotion needs; at most a full window, since otherwise none could
        pass."""
        return min(max(usual, most), usual << max(0, self.num_failures - 1))


def rollback_backoff(history: Iterable[AdapterEvent]) -> RollbackBackoff:
    """`history` is oldest first. A promotion that was followed by another one did not fail. A route that is
    opened again starts without failures, because the rollback that closes a route does not count."""
    backoff, promoted_s = RollbackBackoff(), None
    for event in history:
        if event.kind == "opened":
            backoff, promoted_s = RollbackBackoff(), None
        elif event.kind == "promoted":
            if promoted_s is not None:
                backoff = RollbackBackoff(backoff.trusted_since_s)
            promoted_s = event.at_s
        elif event.kind == "rolled_back" and promoted_s is not None:
            backoff, promoted_s = RollbackBackoff(promoted_s, backoff.num_failures + 1), None
    return backoff
