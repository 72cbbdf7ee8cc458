"""Clusters untagged prompts into kinds by the target's hidden states.

Knows no drafts and no store. Invariant: a prompt near no kind belongs to `default`.
"""

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.names import DEFAULT_ROUTE
from buffer.records import GenerationRecord
from buffer.route_table import RouteTable
from learner.routing.route_clusters import fit_routes, restricted
from learner.settings import LearnerSettings

KINDS_PER_ROUTE = 2
"""More kinds are distinguished than may have a draft, so that each route with a draft has prompts of one
kind."""


@dataclass(frozen=True, eq=False)
class RememberedPrompt:
    """A prompt's embedding, and until when it may be held."""

    route: str
    prompt_H: NDArray[Any]
    expires_at_s: float


class PromptKinds:
    """The last prompts, and the table with the centroid of each kind; `table` None: no kind is known yet."""

    def __init__(self, settings: LearnerSettings, target_revision: str, table: RouteTable | None) -> None:
        self.table = table
        self._settings, self._target_revision = settings, target_revision
        self._prompts: deque[RememberedPrompt] = deque(maxlen=settings.route_window_records)

    @property
    def routes(self) -> tuple[str, ...]:
        """Names of the known kinds."""
        return self.table.routes if self.table else ()

    def remember(self, records: Sequence[GenerationRecord]) -> None:
        """Keep the prompts of sound records."""
        for record in records:
            prompt_H = record.prompt_embedding_H
            if prompt_H is not None and (
                not self._prompts or self._prompts[-1].prompt_H.shape == prompt_H.shape
            ):
                self._prompts.append(RememberedPrompt(record.route, prompt_H, record.expires_at_s))

    def expire(self, now_s: float) -> None:
        """Let go of prompts whose records have expired."""
        if any(prompt.expires_at_s <= now_s for prompt in self._prompts):
            kept = [prompt for prompt in self._prompts if prompt.expires_at_s > now_s]
            self._prompts = deque(kept, self._prompts.maxlen)

    def forget(self) -> None:
        """Let go of all prompts; the table stays."""
        self._prompts.clear()

    def nearest(self, prompt_H: NDArray[Any] | None) -> str:
        """The kind whose centroid is nearest to a prompt."""
        if self.table is None or prompt_H is None or prompt_H.shape != self.table.mean_H.shape:
            return DEFAULT_ROUTE
        return self.table.route_of(prompt_H)

    def kind_of(self, record: GenerationRecord, open_routes: Collection[str]) -> str:
        """The record's route; for one of `default`, the closed route that it would belong to."""
        if record.route != DEFAULT_ROUTE:
            return record.route
        route = self.nearest(record.prompt_embedding_H)
        return DEFAULT_ROUTE if route in open_routes else route

    def belongs(self, record: GenerationRecord, route: str) -> bool:
        return record.route == route or self.nearest(record.prompt_embedding_H) == route

    def look_again(self, open_routes: Collection[str], now_s: float) -> Counter[str] | None:
        """Cluster the last prompts again: names the kinds of prompts that `default` still gets, and updates
        every route's centroid. Returns how many of the last prompts are of each kind; None: there were no
        prompts."""
        names = {DEFAULT_ROUTE, *open_routes, *self.routes}
        prompts = [(prompt.route, prompt.prompt_H) for prompt in self._prompts if prompt.route in names]
        if not prompts:
            return None
        labels, embeddings = zip(*prompts, strict=True)
        self.table = fit_routes(
            np.stack(embeddings),
            labels,
            previous=self.table,
            max_kinds=KINDS_PER_ROUTE * self._settings.max_routes,
            target_revision=self._target_revision,
            now_s=now_s,
            seed=self._settings.seed,
        )
        kinds = Counter(self.nearest(prompt_H) for route, prompt_H in prompts if route == DEFAULT_ROUTE)
        self.table = restricted(self.table, [*open_routes, *kinds])
        return kinds
