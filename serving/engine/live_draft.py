"""The draft that serves: whether and how far to draft, swaps between rounds, and what to do when it breaks.

Runs on the engine's thread only. A draft that gives logits that are not finite costs nothing but speed: it is
switched off and the floor takes its place; if the floor itself is broken there is no drafting until a swap.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from serving.engine.draft_length import DraftLengthController
from serving.engine.proposal import Drafter
from serving.engine.sequence import Batch
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
    """A drafter, its draft length, and its version."""

    def __init__(
        self,
        drafter: Drafter | None,
        controller: DraftLengthController,
        floor: Callable[[], StagedWeights] | None,
    ) -> None:
        self.drafter = drafter
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
        return self.controller.current if self._can_draft else 0

    def lengths(self, batch: Batch) -> list[int]:
        """How many tokens each row may draft in the next round."""
        limit = (
            self.controller.choose([sequence.belief for sequence in batch.sequences])
            if self._can_draft
            else 0
        )
        return [sequence.max_draft_tokens(limit) for sequence in batch.sequences]

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
    def _can_draft(self) -> bool:
        return self.drafter is not None and not self.disabled_reason
