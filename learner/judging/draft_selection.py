"""Chooses the best existing draft for a route by scoring all of them on the same held-out records.

A bandit without exploration: a record holds the target's log-probabilities, so the acceptance that any draft
would have had there is known without serving it. Knows no store and nothing of opening or closing routes.
Invariant: drafts are compared on the same records.
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
    """Why it cannot be scored here, though it serves; then `state` is meaningless."""

    @property
    def key(self) -> DraftKey:
        return self.route, self.draft_version

    @property
    def name(self) -> str:
        """For display."""
        is_floor = self.draft_version == FLOOR_VERSION
        return "the floor" if is_floor else f"draft {self.draft_version} of {self.route}"


FLOOR = ExistingDraft(DEFAULT_ROUTE, FLOOR_VERSION, None)


@dataclass(frozen=True)
class DraftScore:
    """Mean expected acceptance of one draft on the records of one route."""

    acceptance: float
    num_records: int


DraftScores = dict[DraftKey, DraftScore]
"""Scores of all drafts on one route."""


def scores_of_drafts(
    window: HeldOutWindow, drafts: Sequence[ExistingDraft], num_records: int, score: ScoreState
) -> DraftScores:
    """Scores of every draft on the window's last records; earlier scores are reused."""
    scores: DraftScores = {}
    for draft in drafts:
        by_record = window.scores(draft.key, partial(score, draft.state), num_records)
        usable = [one for one in by_record if one is not None]
        scores[draft.key] = DraftScore(acceptance(usable), len(usable))
    return scores


def best_draft(scores: DraftScores, drafts: Sequence[ExistingDraft]) -> ExistingDraft:
    """The draft with the highest acceptance; the first among equals, and the first of all if none could be
    scored."""
    return max(drafts, key=lambda draft: _or_least(scores[draft.key].acceptance))


def _or_least(value: float) -> float:
    """Rank a draft with a NaN score last."""
    return value if value == value else -1.0
