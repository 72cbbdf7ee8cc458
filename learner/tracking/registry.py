"""The drafts in MLflow's registry: one registered model a route, one model version a promoted draft.

Imports no MLflow: it is given the client. Invariant: the alias `serving` points at the draft that serves,
`previous` at the one that a rollback goes to; the floor has no version there, so the model's description says
when it serves.
"""

from collections.abc import Mapping
from typing import Any

from buffer.names import FLOOR_VERSION
from buffer.records import AdapterManifest
from learner.tracking.report_text import Decision, named, serving_text, version_tags, version_text

_FAREWELL = frozenset(("served_until", "replaced_because"))
"""Tags of a draft that no longer serves; they are removed if it serves again."""


class RouteRegistry:
    """The name of a registered model is made of `base_name` and the route."""

    def __init__(self, client: Any, base_name: str) -> None:
        self._client, self._base_name = client, base_name
        self._known: set[str] = set()

    def has(self, manifest: AdapterManifest) -> bool:
        """Whether the registry has these weights under this version."""
        registered = self._find(manifest.route, manifest.draft_version)
        return registered is not None and registered.tags.get("sha256") == manifest.sha256

    def add(self, manifest: AdapterManifest, reason: str, source: str, run_id: str) -> None:
        """Add a promoted draft; `source` is the location of its files."""
        self._client.create_model_version(
            self._model(manifest.route),
            source,
            run_id,
            tags=version_tags(manifest, reason),
            description=version_text(manifest, reason),
        )

    def mark_serving(self, route: str, version: int, previous_version: int, since: str, reason: str) -> str:
        """Move the aliases, and tag the draft that served before with when and why it was replaced. Returns
        the route's new description."""
        model, registered = self._model(route), self._find(route, version)
        before = self._client.get_registered_model(model).aliases.get("serving")
        if before and (registered is None or str(before) != str(registered.version)):
            self._tag(route, str(before), {"served_until": since, "replaced_because": reason})
        if registered:
            for key in _FAREWELL.intersection(registered.tags):
                self._client.delete_model_version_tag(model, str(registered.version), key)
            self._tag(route, str(registered.version), {"serving_since": since, "serving_because": reason})
        self._point(model, "serving", registered)
        self._point(model, "previous", self._find(route, previous_version))
        gain = registered.tags.get("evidence", "") if registered else ""
        text = serving_text(route, version, previous_version, since, reason, gain)
        self._client.update_registered_model(model, description=text)
        self._client.set_registered_model_tag(model, "serving", f"{named(version)} since {since}")
        return text

    def note(self, route: str, decision: Decision) -> None:
        """Tag the route's model with a refusal, and a draft's version with its rejection by replicas."""
        if decision.kind == "refused":
            text = f"{decision.decided_at} at {decision.num_records_seen} records: {decision.reason}"
            self._client.set_registered_model_tag(self._model(route), "last_refusal", text)
        elif registered := self._find(route, decision.draft_version):
            self._tag(
                route, str(registered.version), {decision.kind: f"{decision.decided_at} {decision.reason}"}
            )

    def _point(self, model: str, alias: str, registered: Any | None) -> None:
        if registered:
            self._client.set_registered_model_alias(model, alias, str(registered.version))
        else:
            self._client.delete_registered_model_alias(model, alias)

    def _tag(self, route: str, version: str, tags: Mapping[str, str]) -> None:
        for key, text in tags.items():
            self._client.set_model_version_tag(self._model(route), version, key, text)

    def _model(self, route: str) -> str:
        """The registered model of a route, created if it is missing."""
        name = f"{self._base_name}-{route}"
        if name not in self._known:
            if not self._client.search_registered_models(f"name = '{name}'"):
                self._client.create_registered_model(name, tags={"route": route})
            self._known.add(name)
        return name

    def _find(self, route: str, draft_version: int) -> Any | None:
        """The registry's latest version of this draft; None for the floor, and if there is none."""
        versions = [
            version
            for version in self._client.search_model_versions(f"name = '{self._model(route)}'")
            if draft_version != FLOOR_VERSION and version.tags.get("draft_version") == str(draft_version)
        ]
        return max(versions, key=lambda version: int(version.version), default=None)
