"""The draft that serves: whether and how far to draft, swaps between rounds, and what to do when it breaks.

Runs on the engine's thread only. A draft that gives logits that are not finite costs nothing but speed: it is
switched off and the floor takes its place; if the floor itself is broken there is no drafting until a swap.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from serving.engine.draft_length import DraftLengthController, Row
from serving.engine.proposal import Drafter, DraftPlan, LookupDrafter, Share
from serving.engine.sequence import Advance, Batch, Sequence
from serving.engine.stats import SwapReport

_log = logging.getLogger(__name__)

FLOOR_VERSION = 0


class BrokenDraftError(RuntimeError):
    """This draft version cannot be swapped in: it broke here before, or there is no draft at all."""


class StagedWeights(Protocol):
    """Draft weights that were validated and merged aside; `apply` makes them live, in place."""

    @property
    def draft_version(self) -> int: ...

    def apply(self) -> None: ...


class LiveDraft:
    """The drafters, how far they draft, and the version that is loaded."""

    def __init__(
        self,
        drafter: Drafter | None,
        controller: DraftLengthController,
        floor: Callable[[], StagedWeights] | None,
        ngram: LookupDrafter | None = None,
    ) -> None:
        self.drafter = drafter
        self.ngram = ngram
        self.controller = controller
        self.disabled_reason = ""
        self._floor = floor
        self._broken_versions: set[int] = set()

    @property
    def draft_version(self) -> int:
        return self.drafter.draft_version if self.drafter is not None else FLOOR_VERSION

    @property
    def num_draft_tokens(self) -> int:
        """Draft length in use."""
        return self.controller.current if self._can_draft else self.controller.num_copied

    def plan(self, batch: Batch) -> DraftPlan:
        """Who drafts how many tokens for each row in the next round."""
        if not self._can_draft and self.ngram is None:
            return DraftPlan(self.draft_version)
        matches = [0] * len(batch) if self.ngram is None else self.ngram.matches(batch)
        rows = [
            Row(
                route=sequence.request.route,
                belief=sequence.belief,
                num_tokens=len(sequence.token_ids),
                max_draft_tokens=sequence.max_draft_tokens(self.controller.longest),
                num_matched=num_matched,
            )
            for sequence, num_matched in zip(batch.sequences, matches, strict=True)
        ]
        lengths = self.controller.choose(rows, can_draft=self._can_draft)
        asked = ((self.drafter, lengths.by_model_B), (self.ngram, lengths.copied_B))
        shares = (Share(drafter, each) for drafter, each in asked if drafter is not None and any(each))
        return DraftPlan(self.draft_version, tuple(shares))

    def observe(self, sequence: Sequence, advance: Advance) -> None:
        """How a sequence's drafts fared in the last round."""
        self.controller.observe(
            sequence.request.route,
            sequence.belief,
            advance.num_matched,
            advance.num_attempted,
            advance.num_accepted,
        )

    def clear(self, slot: int) -> None:
        """A new sequence owns the slot."""
        for drafter in self._drafters:
            drafter.clear(slot)

    def move(self, source: int, destination: int) -> None:
        """A sequence changed its slot."""
        for drafter in self._drafters:
            drafter.move(source, destination)

    def swap(self, staged: StagedWeights, *, under_load: bool) -> SwapReport:
        """Make staged weights live. Raises BrokenDraftError, and then nothing changed; whatever else
        `apply` raises, and then the floor serves."""
        if self.drafter is None or staged.draft_version in self._broken_versions:
            why = "no draft is loaded" if self.drafter is None else "its logits were not finite before"
            raise BrokenDraftError(f"draft_version={staged.draft_version} was not swapped in: {why}")
        began_s = time.perf_counter()
        try:
            staged.apply()
        except Exception:
            if self._floor is not None:
                self._floor().apply()
                self.drafter.refresh(FLOOR_VERSION)
            raise
        self.drafter.refresh(staged.draft_version)
        self.controller.forget_model()
        self.disabled_reason = ""
        return SwapReport(staged.draft_version, time.perf_counter() - began_s, under_load)

    def give_up(self, draft_version: int) -> SwapReport | None:
        """This version gave NaN or raised. Returns the swap to the floor, or None where drafting stops."""
        assert self.drafter is not None
        _log.error("draft_version=%d cannot draft; it was switched off", draft_version)
        self._broken_versions.add(draft_version)
        self.drafter.reset()
        if self._floor is not None and FLOOR_VERSION not in self._broken_versions:
            return self.swap(self._floor(), under_load=True)
        self.disabled_reason = f"draft_version={draft_version} gave logits that are not finite"
        return None

    @property
    def _drafters(self) -> list[Drafter]:
        return [drafter for drafter in (self.drafter, self.ngram) if drafter is not None]

    @property
    def _can_draft(self) -> bool:
        return self.drafter is not None and not self.disabled_reason
