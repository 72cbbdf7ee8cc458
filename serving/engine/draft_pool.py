"""The draft models of all routes: how many tokens each drafts, swaps between rounds, and broken drafts.

Runs on the engine's thread only. Rows of a route without a draft of its own use the default route's. A draft
whose logits are not finite costs only speed: it is switched off and its floor takes its place; if the floor
is broken too, that route does not draft until a swap. Other routes are not affected.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from serving.engine.draft_length import DraftLengthController, Row
from serving.engine.proposal import DraftAssignment, Drafter, DraftPlan, LookupDrafter, ServingDraft
from serving.engine.sequence import Advance, Batch, Sequence
from serving.engine.stats import SwapReport

_log = logging.getLogger(__name__)


class BrokenDraftError(RuntimeError):
    """This draft version cannot be swapped in: it broke in this engine before, or there is no draft at
    all."""


class Staged(Protocol):
    """Draft weights that were validated and merged into separate tensors; `apply` makes them live, in
    place."""

    @property
    def draft_version(self) -> int: ...

    def apply(self) -> None: ...


class DraftSlot:
    """One route's drafter, its floor, and the versions that broke in this engine."""

    def __init__(self, route: str, drafter: Drafter, floor: Callable[[], Staged] | None) -> None:
        self.route = route
        self.drafter = drafter
        self.disabled_reason = ""
        self._floor = floor
        self._broken_versions: set[int] = set()

    @property
    def serving(self) -> ServingDraft:
        return ServingDraft(self.route, self.drafter.draft_version)

    def swap(self, staged: Staged, *, under_load: bool) -> SwapReport:
        """See `DraftPool.swap`."""
        if staged.draft_version in self._broken_versions:
            raise _not_swapped(staged, "its logits were not finite before")
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

    def give_up(self) -> SwapReport | None:
        """See `DraftPool.give_up`."""
        version = self.drafter.draft_version
        _log.error("draft_version=%d of route %s cannot draft; it was switched off", version, self.route)
        self._broken_versions.add(version)
        self.drafter.reset()
        if self._floor is not None and FLOOR_VERSION not in self._broken_versions:
            return self.swap(self._floor(), under_load=True)
        self.disabled_reason = f"draft_version={version} gave logits that are not finite"
        if self.route != DEFAULT_ROUTE:
            self.disabled_reason = f"route {self.route}: {self.disabled_reason}"
        return None


class DraftPool:
    """The drafters of all routes, their draft lengths, and the versions that are loaded."""

    def __init__(
        self,
        drafter: Drafter | None,
        controller: DraftLengthController,
        floor: Callable[[], Staged] | None,
        ngram: LookupDrafter | None = None,
    ) -> None:
        """`drafter` and `floor` are the default route's; None: no route can have a draft."""
        self.ngram = ngram
        self.controller = controller
        self._drafts: dict[str, DraftSlot] = {}
        if drafter is not None:
            self._drafts[DEFAULT_ROUTE] = DraftSlot(DEFAULT_ROUTE, drafter, floor)

    @property
    def drafter(self) -> Drafter | None:
        """The default route's drafter."""
        default = self._drafts.get(DEFAULT_ROUTE)
        return default.drafter if default is not None else None

    @property
    def versions(self) -> dict[str, int]:
        """route -> version, of every route that has a draft; the default route is always among them."""
        loaded = (draft.serving for draft in list(self._drafts.values()))
        return {DEFAULT_ROUTE: FLOOR_VERSION} | {each.route: each.draft_version for each in loaded}

    @property
    def disabled_reason(self) -> str:
        reasons = (draft.disabled_reason for draft in list(self._drafts.values()))
        return "; ".join(reason for reason in reasons if reason)

    @property
    def num_draft_tokens(self) -> int:
        """Draft length in use."""
        can_draft = any(not draft.disabled_reason for draft in list(self._drafts.values()))
        return self.controller.current if can_draft else self.controller.num_copied

    def plan(self, batch: Batch) -> DraftPlan:
        """Decide who drafts how many tokens for each row in the next round."""
        drafts_B = [self._draft_of(sequence.route) for sequence in batch.sequences]
        floor = ServingDraft(DEFAULT_ROUTE, FLOOR_VERSION)
        serving_B = tuple(floor if draft is None else draft.serving for draft in drafts_B)
        able_B = [draft if draft is not None and not draft.disabled_reason else None for draft in drafts_B]
        if self.ngram is None and not any(able_B):
            return DraftPlan(serving_B)
        matches = [0] * len(batch) if self.ngram is None else self.ngram.matches(batch)
        rows = [
            Row(
                route=sequence.route,
                estimate=sequence.estimate,
                num_tokens=len(sequence.token_ids),
                max_draft_tokens=sequence.max_draft_tokens(self.controller.longest),
                num_matched=num_matched,
                draft=None if draft is None else draft.route,
            )
            for sequence, num_matched, draft in zip(batch.sequences, matches, able_B, strict=True)
        ]
        lengths = self.controller.choose(rows, can_draft=any(able_B))
        asked: list[tuple[Drafter, list[int]]] = []
        for draft in {draft.route: draft for draft in able_B if draft is not None}.values():
            own = zip(able_B, lengths.by_model_B, strict=True)
            asked.append((draft.drafter, [count if each is draft else 0 for each, count in own]))
        if self.ngram is not None:
            asked.append((self.ngram, lengths.copied_B))
        return DraftPlan(
            serving_B, tuple(DraftAssignment(drafter, each) for drafter, each in asked if any(each))
        )

    def observe(self, sequence: Sequence, advance: Advance) -> None:
        """Tell the controller how a sequence's draft tokens fared in the last round."""
        draft = self._draft_of(sequence.route)
        self.controller.observe(
            sequence.route,
            sequence.estimate,
            advance.num_matched,
            advance.num_attempted,
            advance.num_accepted,
            DEFAULT_ROUTE if draft is None else draft.route,
        )

    def clear(self, slot: int) -> None:
        """A new sequence owns the slot."""
        for drafter in self.drafters:
            drafter.clear(slot)

    def move(self, source: int, destination: int) -> None:
        """A sequence changed its slot."""
        for drafter in self.drafters:
            drafter.move(source, destination)

    def open(self, route: str, drafter: Drafter, floor: Callable[[], Staged] | None) -> None:
        """Give a route a draft of its own; its drafter starts with no state of any sequence."""
        assert route not in self._drafts, f"route {route} has a draft"
        self._drafts[route] = DraftSlot(route, drafter, floor)
        self.controller.forget_model(lambda seen: seen == route)

    def close(self, route: str) -> None:
        """Let the default route's draft serve the route again; does nothing if the route has no draft."""
        if route != DEFAULT_ROUTE and self._drafts.pop(route, None) is not None:
            self.controller.forget_model(lambda seen: seen == route)

    def swap(self, staged: Staged, route: str = DEFAULT_ROUTE, *, under_load: bool) -> SwapReport:
        """Make staged weights live. Raises BrokenDraftError, after which nothing changed, or whatever `apply`
        raises, after which the route's floor serves."""
        draft = self._drafts.get(route)
        if draft is None:
            raise _not_swapped(staged, "no draft is loaded")
        report = draft.swap(staged, under_load=under_load)
        self.controller.forget_model(lambda seen: self.serves(route, seen))
        return report

    def give_up(self, route: str) -> SwapReport | None:
        """This route's draft gave NaN or raised. Returns the swap to its floor, or None where its drafting
        stops."""
        report = self._drafts[route].give_up()
        if report is not None:
            self.controller.forget_model(lambda seen: self.serves(route, seen))
        return report

    def serves(self, draft_route: str, route: str) -> bool:
        """Whether rows of `route` use the draft of `draft_route`."""
        draft = self._draft_of(route)
        return draft is not None and draft.route == draft_route

    def _draft_of(self, route: str) -> DraftSlot | None:
        return self._drafts.get(route) or self._drafts.get(DEFAULT_ROUTE)

    @property
    def drafters(self) -> list[Drafter]:
        """All drafters, n-gram lookup included."""
        drafters = [draft.drafter for draft in self._drafts.values()]
        return drafters if self.ngram is None else [*drafters, self.ngram]


def _not_swapped(staged: Staged, why: str) -> BrokenDraftError:
    return BrokenDraftError(f"draft_version={staged.draft_version} was not swapped in: {why}")
