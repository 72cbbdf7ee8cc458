"""The draft that serves a route according to the adapter feed, and how the learner replaces it.

Knows no records and no training. Invariants: the learner always adopts what the feed says, including an
operator's rollback or pin, but for an adapter that no replica can serve, which it takes back; version numbers
only grow, even after the feed lost its data.
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
        """Adopt the draft that the feed says serves; if the feed lost its data, publish the adapter again; if
        what it says is corrupt or another model's, take that back: replicas go on with what they have, and
        candidates must be judged against that. True: another draft serves."""
        last_version = self._feed.last_version(self._route)
        if self.manifest is not None and last_version < self.manifest.draft_version:
            self._feed.publish(self.manifest, self.weights)
            return False
        self.last_version = max(self.last_version, last_version)
        latest = self._feed.latest(self._route)
        if (latest.draft_version if latest else FLOOR_VERSION) == self.version:
            return False
        latest, weights = self._with_weights(latest)
        fault = "" if latest is None else self._fault(latest, weights)
        if latest is not None and fault and self._feed.pinned(self._route) is None:
            self._take_back(latest, fault)
            return False
        self.manifest, self.weights = latest, weights
        self.state, self.unreadable = self._read(latest, weights)
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

    def _with_weights(self, latest: AdapterManifest | None) -> tuple[AdapterManifest | None, bytes]:
        """No manifest where the feed has just let go of it."""
        if latest is None:
            return None, b""
        try:
            return latest, self._feed.weights(self._route, latest.draft_version)
        except UnknownVersionError:
            return None, b""

    def _fault(self, manifest: AdapterManifest, weights: bytes) -> str:
        """Why replicas refuse the adapter and keep what they serve; empty: they may serve it. One for another
        draft is left alone on the floor: the draft may have been changed, and replicas start on the floor."""
        if manifest.target_revision != self._target_revision:
            return f"it was made for the target {manifest.target_revision[:12]}…"
        if hashlib.sha256(weights).hexdigest() != manifest.sha256:
            return "its bytes are not those that its manifest names"
        if self.state is not None and manifest.draft_revision != self._draft.draft_revision:
            return f"it was made for the draft {manifest.draft_revision[:12]}…"
        return ""

    def _take_back(self, latest: AdapterManifest, fault: str) -> None:
        reason = f"version {latest.draft_version} cannot be served: {fault}"
        try:
            self._feed.rollback(self._route, reason, self.version)
        except UnknownVersionError:  # ours is no longer kept
            self._feed.rollback(self._route, reason)

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
