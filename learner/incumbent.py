"""What serves now, as the adapter feed has it, and how the learner changes it.

Knows no records and no training. Invariants: the feed's word is final (an operator's rollback or pin is
adopted, never fought); version numbers only grow, even when the feed comes back empty.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from buffer.errors import UnknownVersionError, VersionConflictError
from buffer.records import FLOOR_VERSION, AdapterEvent, AdapterManifest
from buffer.store import AdapterFeed
from learner.draft import AdapterState, TrainableDraft, export_weights, import_weights
from learner.story import TURNS


class Incumbent:
    """One route's serving draft. `state` None is the floor."""

    def __init__(
        self,
        feed: AdapterFeed,
        draft: TrainableDraft,
        *,
        route: str,
        target_revision: str,
        now_s: Callable[[], float],
        manifest: AdapterManifest | None = None,
        weights: bytes = b"",
        last_version: int = 0,
    ) -> None:
        """`manifest`, `weights` and `last_version` come from the checkpoint, if there is one."""
        self._feed = feed
        self._draft = draft
        self._route = route
        self._target_revision = target_revision
        self._now_s = now_s
        self.manifest = manifest
        self.weights = weights
        self.state: AdapterState | None = self._readable(manifest, weights)
        self.last_version = last_version
        self._told_until_s = now_s()

    @property
    def version(self) -> int:
        return self.manifest.draft_version if self.manifest else FLOOR_VERSION

    def sync(self) -> bool:
        """Adopt what the feed says serves; give an emptied feed its adapter back. True: it changed."""
        known = self._feed.last_version(self._route)
        if self.manifest is not None and known < self.manifest.draft_version:
            self._feed.publish(self.manifest, self.weights)
            return False
        self.last_version = max(self.last_version, known)
        latest = self._feed.latest(self._route)
        if (latest.draft_version if latest else FLOOR_VERSION) == self.version:
            return False
        self._adopt(latest)
        return True

    def publish(
        self, state: AdapterState, evidence: Mapping[str, float], num_records_seen: int, run_id: str
    ) -> AdapterManifest:
        """Serve this state from now on, under the next version number."""
        weights = export_weights(state)
        manifest = self._manifest(weights, evidence, num_records_seen, run_id)
        while True:
            try:
                self._feed.publish(manifest, weights)
                break
            except VersionConflictError:
                known = max(manifest.draft_version, self._feed.last_version(self._route))
                manifest = replace(manifest, draft_version=known + 1)
        self.manifest, self.weights, self.state = manifest, weights, dict(state)
        self.last_version = manifest.draft_version
        return manifest

    def refuse(self, reason: str, evidence: Mapping[str, float]) -> None:
        """A line in the history: this candidate did not get in."""
        number = max(self.last_version, self._feed.last_version(self._route)) + 1
        event = AdapterEvent("refused", self._route, number, reason, self._now_s(), dict(evidence))
        self._feed.add_event(event)

    def last_turn(self) -> tuple[str, str]:
        """(kind, reason) of the event since which this draft serves."""
        for event in reversed(self._feed.history(self._route)):
            if event.kind in TURNS and event.draft_version == self.version:
                return event.kind, event.reason
        return "adopted", "the feed says so"

    def rejections(self) -> list[AdapterEvent]:
        """By replicas, since the last call."""
        since_s = self._told_until_s
        found = [
            event
            for event in self._feed.history(self._route)
            if event.kind == "rejected_by_replica" and event.at_s > since_s
        ]
        self._told_until_s = max((event.at_s for event in found), default=since_s)
        return found

    def _manifest(
        self, weights: bytes, evidence: Mapping[str, float], num_records_seen: int, run_id: str
    ) -> AdapterManifest:
        draft = self._draft
        return AdapterManifest(
            route=self._route,
            draft_version=self.last_version + 1,
            parent_version=self.version,
            draft_id=draft.draft_id,
            draft_revision=draft.draft_revision,
            target_revision=self._target_revision,
            rank=draft.rank,
            alpha=draft.alpha,
            target_modules=draft.target_modules,
            adapter_config_json=draft.config_json,
            sha256=hashlib.sha256(weights).hexdigest(),
            num_bytes=len(weights),
            created_at_s=self._now_s(),
            mlflow_run_id=run_id,
            evidence=dict(evidence),
            num_records_seen=num_records_seen,
        )

    def _adopt(self, latest: AdapterManifest | None) -> None:
        weights = b""
        if latest is not None:
            try:
                weights = self._feed.weights(self._route, latest.draft_version)
            except UnknownVersionError:
                latest = None
        self.manifest, self.weights = latest, weights
        self.state = self._readable(latest, weights)

    def _readable(self, manifest: AdapterManifest | None, weights: bytes) -> AdapterState | None:
        """The adapter's weights; None where replicas would refuse it too and serve the floor."""
        if manifest is None or manifest.draft_revision != self._draft.draft_revision:
            return None
        if manifest.target_revision != self._target_revision:
            return None
        try:
            state = import_weights(weights)
        except ValueError:
            return None
        return None if self._draft.fault(state) else state
