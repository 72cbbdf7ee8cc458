"""Opens and closes routes, and clusters untagged prompts into routes: read `review` first.

Knows no training. Invariants: `default` is always open and takes the records of every route that is not;
after a route is closed, `default`'s draft serves its requests and trains on its records, and its own draft is
gone. Of isolated routes it trains on no record, whether they are open or not: what their tenants write
reaches no centroid and no other draft.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.records import AdapterEvent, GenerationRecord
from buffer.route_table import RouteTable
from buffer.store import AdapterFeed, RecordStore, StreamKey
from learner import checkpoint
from learner.judging.draft_selection import FLOOR, ExistingDraft, best_draft
from learner.route_learner import RouteLearner
from learner.routing.policy import RoutePolicy, Standing, has_lost, reason_to_close, routes_to_open
from learner.routing.prompt_kinds import PromptKinds
from learner.routing.route_book import (
    RouteBook,
    checkpoint_folder,
    forget_checkpoints,
    read_book,
    write_book,
)
from learner.routing.route_clusters import restricted, told_of
from learner.settings import LearnerSettings

logger = logging.getLogger(__name__)

BuildDraft = Callable[[str, checkpoint.Checkpoint | None, Callable[[], ExistingDraft]], RouteLearner]
"""Builds a route's learner from the route, its checkpoint, and a function that gives the draft that serves it
until it has its own."""


class Routes:
    """`build` makes a route's learner from its checkpoint; `folder` holds the checkpoints and the route book.
    The constructor touches neither store nor feed."""

    def __init__(
        self,
        build: BuildDraft,
        store: RecordStore,
        feed: AdapterFeed,
        settings: LearnerSettings,
        *,
        folder: Path,
        target_revision: str,
        is_sound: Callable[[GenerationRecord, str], bool],
        now_s: Callable[[], float],
        wait_for_disk: Callable[[checkpoint.CheckpointError], None],
        has_memory: Callable[[], bool] = lambda: True,
        isolated: Collection[str] = (),
    ) -> None:
        """`is_sound`: whether a record may train the draft of a route. `wait_for_disk` is called before what
        could not be written is tried again. `has_memory`: whether the training state of one more route fits
        now."""
        self._isolated = set(isolated)
        self._wait_for_disk, self._has_memory = wait_for_disk, has_memory
        self._refused: set[str] = set()
        """Routes that found no memory, which is told once."""
        self._build, self._store, self._feed, self._settings = build, store, feed, settings
        self._target_revision, self._now_s = target_revision, now_s
        self._is_sound = is_sound
        self._folder = folder
        self._policy = RoutePolicy(
            settings.max_routes,
            settings.route_min_records,
            settings.route_idle_s,
            settings.route_losses_before_close,
        )
        book = read_book(self._folder)
        self._standings = dict(book.standings)
        self._kinds = PromptKinds(settings, target_revision, self._public(book.table))
        self._used: dict[str, list[str]] = {}
        self._num_unreviewed = 0
        self.drafts: dict[str, RouteLearner] = {}
        for route in (
            DEFAULT_ROUTE,
            *(name for name, standing in book.standings.items() if standing.is_open),
        ):
            found = checkpoint.read_latest(checkpoint_folder(self._folder, route))
            for stream, entry_ids in found.acked_entry_ids.items() if found else ():
                self._used[stream] = [*self._used.get(stream, ()), *entry_ids]
            self.drafts[route] = build(route, found, self._default_draft)

    def __iter__(self) -> Iterator[RouteLearner]:
        return iter(list(self.drafts.values()))

    @property
    def default(self) -> RouteLearner:
        return self.drafts[DEFAULT_ROUTE]

    def existing(self, route: str) -> list[ExistingDraft]:
        """Every draft that may serve this route and can be scored, `default`'s first, and the floor."""
        default = self.default.serving
        floor = [] if default.key == FLOOR.key else [FLOOR]
        closed = {DEFAULT_ROUTE, *self._isolated - {route}}
        others = [draft.serving for draft in self if draft.has_own and draft.route not in closed]
        return [draft for draft in [default, *floor, *others] if not draft.unreadable]

    def streams_of(self, draft: RouteLearner, streams: Sequence[StreamKey]) -> list[StreamKey]:
        """The streams whose records train it."""
        if draft.route == DEFAULT_ROUTE:
            shared = self.shared_streams(streams)
            return [key for key in shared if key.route == DEFAULT_ROUTE or key.route not in self.drafts]
        return [key for key in streams if key.route == draft.route]

    def shared_streams(self, streams: Sequence[StreamKey]) -> list[StreamKey]:
        """Those whose records may train `default`'s draft."""
        return [key for key in streams if key.route not in self._isolated]

    def untrained_streams(self, streams: Sequence[StreamKey]) -> list[StreamKey]:
        """Those whose records train no draft: of isolated routes that have none."""
        return [key for key in streams if key.route in self._isolated and key.route not in self.drafts]

    def used_entry_ids(self) -> dict[str, list[str]]:
        """Entry ids that checkpoints have used, by stream; perhaps not yet acknowledged."""
        return self._used

    def start(self) -> None:
        """On the first cycle: open the routes that the feed serves, as far as there is room, and publish the
        table of the route book if the feed has none."""
        for route in self._feed.routes():
            latest = self._feed.latest(route)
            if route not in self.drafts and latest and latest.target_revision == self._target_revision:
                found = checkpoint.read_latest(checkpoint_folder(self._folder, route))
                self.drafts[route] = self._build(route, found, self._default_draft)
                self._standings[route] = self._standings.get(route, Standing()).opened(self._now_s())
        for route in list(self.drafts)[1 + self._policy.max_routes :]:
            self._close(route, f"max_routes is {self._policy.max_routes}, so no draft is trained for it")
        table = self._feed.route_table()
        if table is not None and self._kinds.table is None:
            is_ours = table.target_revision == self._target_revision
            self._kinds.table = self._public(table) if is_ours else None
        if table is None or self._isolated.intersection(table.routes):
            self._put_table()

    def remember(self, records: Sequence[GenerationRecord]) -> None:
        """Keep the prompts of sound records, to cluster untagged traffic; not those of isolated routes, which
        records may name, too."""
        self._isolated.update(record.route for record in records if record.isolated)
        self._kinds.remember(self._shared(records))

    def expire(self, now_s: float) -> None:
        """Let go of records and prompts that may no longer be held."""
        self._kinds.expire(now_s)
        for draft in self:
            draft.expire(now_s)

    def forget(self) -> None:
        """Let go of all records and prompts."""
        self._kinds.forget()
        for draft in self:
            draft.forget()

    def arrived(self, records: Sequence[GenerationRecord]) -> None:
        """Count new sound records for their routes."""
        self.remember(records)
        self._num_unreviewed += len(self._shared(records))
        for route, num_records in Counter(
            self._kinds.kind_of(record, self.drafts) for record in records
        ).items():
            if route == DEFAULT_ROUTE:
                continue
            standing = self._standings.get(route)
            if standing is None:
                num_kept = sum(self._store.size(key).num_records for key in self._streams_named(route))
                standing = Standing(num_records=num_kept - num_records)
            self._standings[route] = standing.after_records(num_records, self._now_s())

    def review(self, streams: Sequence[StreamKey]) -> None:
        """Close idle routes, cluster prompts again, open routes that have enough records. Drops the standing
        of a closed route that has neither a stream nor a cluster of prompts."""
        active = {key.route for key in streams}.union(self._kinds.routes)
        for route, standing in list(self._standings.items()):
            if not standing.is_open and route not in active:
                del self._standings[route]
        for route, standing in list(self._standings.items()):
            if standing.is_open and (reason := reason_to_close(standing, self._now_s(), self._policy)):
                self._close(route, reason)
        if self._num_unreviewed >= self._settings.route_review_records and self._settings.max_routes:
            self._num_unreviewed = 0
            self._look_again_at_kinds()
        for route in routes_to_open(self._standings, self._policy):
            if self._has_memory():
                self._open(route)
            elif route not in self._refused:
                self._refused.add(route)
                logger.warning("route %s gets no draft of its own: too little memory is free", route)

    def decided(self, draft: RouteLearner) -> None:
        """After each decision on a route's candidate: check whether its own draft is the best one for it."""
        existing = self.existing(draft.route)
        draft.compare(existing)
        if draft.route == DEFAULT_ROUTE or draft.serving.unreadable:
            return
        best = best_draft(draft.scores_of_drafts, existing)
        standing = self._standings[draft.route].after_decision(best.route == draft.route)
        self._standings[draft.route] = standing
        if has_lost(standing, self._policy):
            self._give_up(draft, best)

    def save(self, draft: RouteLearner, used_entry_ids: dict[str, list[str]]) -> None:
        """Write the route's checkpoint, then the route book."""
        folder = checkpoint_folder(self._folder, draft.route)
        self._until_written(lambda: draft.save(folder, used_entry_ids))
        self._write_book()

    # opening and closing

    def _default_draft(self) -> ExistingDraft:
        return self.default.serving

    def _open(self, route: str) -> None:
        """Open a route; its candidate starts from the draft that is best on the route's held-out records."""
        draft = self._build(route, None, self._default_draft)
        draft.bootstrap_records = draft.judge.split(self._kept(route))
        existing = self.existing(route)
        draft.compare(existing)
        draft.start_from(best_draft(draft.scores_of_drafts, existing))
        standing = self._standings[route]
        reason = f"{standing.num_records} records; starts from {draft.start.name}"
        self._tell("opened", draft, reason)
        forget_checkpoints(self._folder, route)
        self.drafts[route] = draft
        self._standings[route] = standing.opened(self._now_s())
        self.save(draft, {})
        self._put_table()

    def _close(self, route: str, reason: str) -> None:
        """Close a route, unless an operator pinned a version of it."""
        draft = self.drafts[route]
        if self._feed.pinned(route) is not None:
            return
        if self._feed.latest(route) is not None:
            self._feed.rollback(route, f"closed: {reason}", FLOOR_VERSION)
        self._tell("closed", draft, reason)
        del self.drafts[route]
        self._standings[route] = self._standings[route].closed()
        self._write_book()
        forget_checkpoints(self._folder, route)
        self._put_table()

    def _give_up(self, draft: RouteLearner, best: ExistingDraft) -> None:
        """The route's own draft has long not been the best: start again from another route's draft if that is
        best (once from each), or close the route if what `default` would serve is best."""
        self._standings[draft.route] = replace(self._standings[draft.route], num_losses=0)
        if best.route != DEFAULT_ROUTE and best.key != draft.start.key:
            draft.start_from(best)
        elif best.route == DEFAULT_ROUTE or not draft.has_own:
            self._close(draft.route, f"{best.name} has long been as good or better for it")

    def _tell(self, kind: str, draft: RouteLearner, reason: str) -> None:
        """Add an event to the route's history. In both kinds `default`'s draft serves it afterwards."""
        evidence = draft.acceptance_by_draft()
        event = AdapterEvent(kind, draft.route, FLOOR_VERSION, reason, self._now_s(), evidence)
        self._feed.add_event(event)
        draft.progress.serving_changed(kind, None, b"", reason)

    # prompts without a tag

    def _kept(self, route: str) -> list[GenerationRecord]:
        """Kept records of the route; before it had a name they came as `default`'s."""
        wanted, seed = self._settings.route_window_records, self._settings.seed
        kept: list[GenerationRecord] = []
        for key in self._streams_named(route, DEFAULT_ROUTE):
            drawn = self._store.draw_replay(key, wanted, seed)
            sound = (record for record in drawn if self._is_sound(record, route))
            kept += [record for record in sound if self._kinds.belongs(record, route)]
        return kept

    def _streams_named(self, *routes: str) -> list[StreamKey]:
        """Of both capture modes, in the order of the routes."""
        known = self._store.keys()
        ours = [key for key in known if key.target_revision == self._target_revision]
        return [key for route in routes for key in ours if key.route == route]

    def _look_again_at_kinds(self) -> None:
        kinds = self._kinds.look_again(self.drafts, self._now_s())
        if kinds is None:
            return
        for route in self._kinds.routes:
            if route != DEFAULT_ROUTE and route not in self._standings:
                self._standings[route] = Standing(num_records=kinds[route])
        self._put_table()

    def _put_table(self) -> None:
        """Publish the table with open routes only."""
        if self._kinds.table is not None:
            shared = [route for route in self.drafts if route not in self._isolated]
            self._feed.put_route_table(told_of(self._kinds.table, shared))

    def _public(self, table: RouteTable | None) -> RouteTable | None:
        """Without centroids of isolated routes, which it has if they were not isolated before."""
        if table is None or not self._isolated.intersection(table.routes):
            return table
        return restricted(table, [route for route in table.routes if route not in self._isolated])

    def _write_book(self) -> None:
        book = RouteBook(self._standings, self._kinds.table)
        self._until_written(lambda: write_book(self._folder, book))

    def _until_written(self, write: Callable[[], None]) -> None:
        while True:
            try:
                return write()
            except checkpoint.CheckpointError as error:
                self._wait_for_disk(error)

    def _shared(self, records: Sequence[GenerationRecord]) -> list[GenerationRecord]:
        """Those that may say where other tenants' prompts belong."""
        return [record for record in records if record.route not in self._isolated]
