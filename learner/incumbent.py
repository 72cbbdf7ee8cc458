"""The draft that serves a route according to the adapter feed, and how the learner replaces it.

Knows no records and no training. Invariants: the learner always adopts what the feed says, including an
operator's rollback or pin; version numbers only grow, even after the feed lost its data.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from buffer.errors import UnknownVersionError, VersionConflictError
from buffer.names import FLOOR_VERSION
from buffer.records import SERVING_CHANGES, AdapterEvent, AdapterManifest
from buffer.store import AdapterFeed
from learner.draft import AdapterState, TrainableDraft, export_weights


class Incumbent:
    """One route's serving draft. `state` None is the floor, unless `unreadable` says otherwise."""

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
        self.state, self.unreadable = self._read(manifest, weights)
        """`unreadable`: why the serving draft cannot be scored under these settings, e.g. its rank
        differs."""
        self.last_version = last_version

    @property
    def version(self) -> int:
        return self.manifest.draft_version if self.manifest else FLOOR_VERSION

    def sync(self) -> bool:
        """Adopt the draft that the feed says serves; if the feed lost its data, publish the adapter again.
        True: another draft serves."""
        last_version = self._feed.last_version(self._route)
        if self.manifest is not None and last_version < self.manifest.draft_version:
            self._feed.publish(self.manifest, self.weights)
            return False
        self.last_version = max(self.last_version, last_version)
        latest = self._feed.latest(self._route)
        if (latest.draft_version if latest else FLOOR_VERSION) == self.version:
            return False
        self._adopt(latest)
        return True

    def parent(self) -> AdapterState | None:
        """The weights that a rollback would go to; None is the floor, also if the parent is no longer
        kept."""
        if self.manifest is None:
            return None
        try:
            parent = self._feed.manifest(self._route, self.manifest.parent_version)
            return self._read(parent, self._feed.weights(self._route, parent.draft_version))[0]
        except UnknownVersionError:
            return None

    def publish(
        self,
        state: AdapterState,
        evidence: Mapping[str, float],
        num_records_seen: int,
        run_id: str,
        on_trial: bool = False,
    ) -> AdapterManifest:
        """Publish this state under the next version number; `on_trial`: on one replica first."""
        weights = export_weights(state)
        manifest = self._manifest(weights, evidence, num_records_seen, run_id)
        while True:
            try:
                self._feed.publish(manifest, weights, on_trial)
                break
            except VersionConflictError:
                last_version = max(manifest.draft_version, self._feed.last_version(self._route))
                manifest = replace(manifest, draft_version=last_version + 1)
        self.manifest, self.weights, self.state = manifest, weights, dict(state)
        self.unreadable = ""
        self.last_version = manifest.draft_version
        return manifest

    def refuse(self, reason: str, evidence: Mapping[str, float]) -> None:
        """Add a `refused` event to the history."""
        number = max(self.last_version, self._feed.last_version(self._route)) + 1
        event = AdapterEvent("refused", self._route, number, reason, self._now_s(), dict(evidence))
        self._feed.add_event(event)

    def last_serving_change(self) -> tuple[str, str]:
        """(kind, reason) of the event since which this draft serves."""
        for event in reversed(self._feed.history(self._route)):
            if event.kind in SERVING_CHANGES and event.draft_version == self.version:
                return event.kind, event.reason
        return "adopted", "the feed says so"

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
        self.state, self.unreadable = self._read(latest, weights)

    def _read(self, manifest: AdapterManifest | None, weights: bytes) -> tuple[AdapterState | None, str]:
        """The adapter's weights, None if replicas would refuse it and serve the floor; and the reason if
        replicas serve it but it cannot be read here."""
        if manifest is None or manifest.draft_revision != self._draft.draft_revision:
            return None, ""
        if manifest.target_revision != self._target_revision:
            return None, ""
        if hashlib.sha256(weights).hexdigest() != manifest.sha256:
            return None, ""
        try:
            return self._draft.read(weights, manifest), ""
        except ValueError as error:
            return None, (
                f"draft {manifest.draft_version} serves and cannot be scored under these settings ({error}); "
                "no candidate can be judged against it: give it back its settings, or roll back to the floor"
            )
