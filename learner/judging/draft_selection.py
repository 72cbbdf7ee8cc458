"""A bandit that need not explore: every draft that exists is scored on what the target said anyway.

A record holds the target's rows, so what any draft would have had accepted there is known without serving it.
Knows no store and no route's life. Invariant: drafts are compared on the very same records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from learner.draft import AdapterState
from learner.judging.gate import acceptance
from learner.judging.held_out import DraftKey, HeldOutWindow
from learner.judging.watch import ScoreState


@dataclass(frozen=True, eq=False)
class ExistingDraft:
    """A draft that some route serves, or may fall back to. `state` None is the floor."""

    route: str
    draft_version: int
    state: AdapterState | None
    unreadable: str = ""
    """Why it cannot be scored here, though it serves; then `state` says nothing."""

    @property
    def key(self) -> DraftKey:
        return self.route, self.draft_version

    @property
    def name(self) -> str:
        """For people."""
        is_floor = self.draft_version == FLOOR_VERSION
        return "the floor" if is_floor else f"draft {self.draft_version} of {self.route}"


FLOOR = ExistingDraft(DEFAULT_ROUTE, FLOOR_VERSION, None)


@dataclass(frozen=True)
class DraftScore:
    """Mean expected acceptance of one draft on the records of one route."""

    acceptance: float
    num_records: int


DraftScores = dict[DraftKey, DraftScore]
"""A row of the table route x draft."""


def scores_of_drafts(
    window: HeldOutWindow, drafts: Sequence[ExistingDraft], num_records: int, score: ScoreState
) -> DraftScores:
    """Of every draft on the window's last records; what was scored before is not scored again."""
    found: DraftScores = {}
    for draft in drafts:
        scores = window.scores(draft.key, partial(score, draft.state), num_records)
        usable = [one for one in scores if one is not None]
        found[draft.key] = DraftScore(acceptance(usable), len(usable))
    return found


def best_draft(found: DraftScores, drafts: Sequence[ExistingDraft]) -> ExistingDraft:
    """Of greatest worth; of equals the first, and the first of all where nothing could be scored."""
    return max(drafts, key=lambda draft: _or_least(found[draft.key].acceptance))


def _or_least(value: float) -> float:
    """A draft that scores NaN is the worst there is."""
    return value if value == value else -1.0
