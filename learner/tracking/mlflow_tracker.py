"""Sends the learner's metrics, adapters and decisions to MLflow. The only file that imports MLflow.

`MlflowTracker` writes from a thread of its own through a bounded queue (outbox.py): a slow or unreachable
MLflow does not delay the learner. MLflow is imported in that thread, telemetry off. One run covers a learner
over all its restarts: its page says which draft serves each route and why, its artifacts hold the adapters,
and for each route a plot and all decisions. Knows no training.
"""

import json
import logging
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from buffer.names import DEFAULT_ROUTE
from buffer.records import SERVING_CHANGES, AdapterManifest
from buffer.redaction import redacted
from learner.tracking.acceptance_plot import PLOTTED, acceptance_png
from learner.tracking.outbox import Outbox
from learner.tracking.registry import RouteRegistry
from learner.tracking.report_text import (
    Decision,
    decisions_csv,
    decisions_from_csv,
    decisions_text,
    moment,
    shortened,
)
from learner.tracking.tracker import NullTracker, Tracker

__all__ = ["MlflowTracker", "NullTracker", "Tracker"]

logger = logging.getLogger(__name__)

_REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "BAD_REQUEST",
    "PERMISSION_DENIED",
}
"""Error codes for which a retry is useless."""
_UNWRITABLE = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)

KEPT_DECISION_TAGS = 20
"""Number of latest decisions kept as tags of the run; every decision is in its route's table."""
CYCLES_PER_PLOT = 20
_KEPT_LINES = 5000
"""Number of points and lines kept of a route's curves and table."""
_NOTE = "mlflow.note.content"


class MlflowTracker:
    """`run_id` continues an earlier run, if it is still there; else one is started in `experiment_name`.
    A route's registered model is called `<registered_model_name>-<route>`."""

    def __init__(
        self,
        tracking_uri: str,
        *,
        experiment_name: str,
        registered_model_name: str,
        run_id: str = "",
        max_queued: int = 1000,
        retry_s: float = 2.0,
    ) -> None:
        self._run_id = run_id
        self._places = (tracking_uri, experiment_name, registered_model_name)
        self._outbox = Outbox(
            self._connect, _is_refusal, name="MLflow", max_queued=max_queued, retry_s=retry_s
        )

    @property
    def run_id(self) -> str:
        return self._run_id

    @property
    def num_dropped(self) -> int:
        return self._outbox.num_dropped

    def log_params(self, params: Mapping[str, object]) -> None:
        kept = {name: redacted(str(value)) for name, value in params.items()}
        self._outbox.submit(lambda session: session.log_params(kept))

    def log_metrics(self, route: str, metrics: Mapping[str, float], num_records_seen: int) -> None:
        kept, at_s = dict(metrics), time.time()
        self._outbox.submit(lambda session: session.log_metrics(route, kept, num_records_seen, at_s))

    def log_decision(
        self, route: str, kind: str, draft_version: int, reason: str, num_records_seen: int
    ) -> None:
        at = moment(time.time())
        decision = Decision(kind, draft_version, shortened(reason), num_records_seen, at)
        self._outbox.submit(lambda session: session.log_decision(route, decision))

    def log_adapter(self, manifest: AdapterManifest, weights: bytes, reason: str) -> None:
        self._outbox.submit(lambda session: session.log_adapter(manifest, weights, reason))

    def mark_serving(self, route: str, draft_version: int, previous_version: int, reason: str) -> None:
        since = moment(time.time())
        self._outbox.submit(
            lambda session: session.mark_serving(route, draft_version, previous_version, since, reason)
        )

    def close(self, timeout_s: float = 10.0) -> None:
        self._outbox.submit(lambda session: session.end())
        self._outbox.close(timeout_s)

    def _connect(self) -> "_Session":
        session = _Session(*self._places, run_id=self._run_id)
        self._run_id = session.run_id
        return session


def _is_refusal(error: Exception) -> bool:
    """Whether a retry is useless. An artifact store that cannot be written from here counts too, because it
    must not block the other jobs."""
    return isinstance(error, _UNWRITABLE) or getattr(error, "error_code", "") in _REFUSALS


def _artifacts_beside(tracking_uri: str) -> str | None:
    """Artifact folder beside an SQLite file (MLflow's default would be the working directory); None for a
    server, which has its own. SQLite creates its file but not the folder, so it is created here."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    folder = Path(tracking_uri.removeprefix("sqlite:///")).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "artifacts").as_uri()


def _metric_name(route: str, name: str) -> str:
    """The route is put before the slash, so that MLflow groups a route's charts."""
    return name if route == DEFAULT_ROUTE else f"{route}/{name}"


class _Session:
    """The MLflow client and its state; used by the outbox's thread only."""

    def __init__(self, tracking_uri: str, experiment_name: str, model_name: str, run_id: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._param = Metric, Param
        self._client = MlflowClient(tracking_uri, registry_uri=tracking_uri)
        self._registry = RouteRegistry(self._client, model_name)
        self._artifacts = _artifacts_beside(tracking_uri)
        self.run_id = run_id if self._is_known(run_id) else self._start_run(experiment_name)
        self._client.update_run(self.run_id, status="RUNNING")
        tags = self._client.get_run(self.run_id).data.tags
        own = {key: text for key, text in tags.items() if key.startswith("decision.")}
        self._decision_tags = sorted(own, key=lambda key: own[key])
        self._decisions: dict[str, list[Decision]] = {}
        self._serving = {key: text for key, text in tags.items() if key.startswith("serving.")}
        self._series: dict[str, dict[str, list[tuple[int, float]]]] = {}
        self._num_cycles: defaultdict[str, int] = defaultdict(int)

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log the parameters once a run; what a restart changed becomes a tag."""
        logged = self._client.get_run(self.run_id).data.params
        new = [self._param(key, value) for key, value in params.items() if key not in logged]
        self._client.log_batch(self.run_id, params=new)
        for key, value in params.items():
            if logged.get(key, value) != value:
                self._set_tag(f"changed.{key}", f"{logged[key]} -> {value}")

    def log_metrics(self, route: str, metrics: Mapping[str, float], step: int, at_s: float) -> None:
        series = self._series_of(route)  # before it grows
        entries = [
            self._metric(_metric_name(route, key), float(value), int(at_s * 1000), step)
            for key, value in metrics.items()
        ]
        self._client.log_batch(self.run_id, metrics=entries)
        for key in PLOTTED:
            if key in metrics:
                series[key] = [*series[key], (step, float(metrics[key]))][-_KEPT_LINES:]
        self._num_cycles[route] += 1
        if self._num_cycles[route] % CYCLES_PER_PLOT == 0:
            self._if_possible(lambda: self._draw(route))

    def log_decision(self, route: str, decision: Decision) -> None:
        self._tag_decision(*decision.tag(route))
        if decision.kind in SERVING_CHANGES:
            name = _metric_name(route, "draft_version")
            version = decision.draft_version
            self._client.log_metric(self.run_id, name, version, step=decision.num_records_seen)
        else:
            self._registry.note(route, decision)
        self._if_possible(lambda: self._tell(route, decision))
        if (
            decision.kind == "closed"
        ):  # routes come and go in a long run; if needed again, it is read from MLflow
            for by_route in (self._series, self._decisions, self._num_cycles):
                by_route.pop(route, None)

    def log_adapter(self, manifest: AdapterManifest, weights: bytes, reason: str) -> None:
        if self._registry.has(manifest):
            return
        name = f"adapters/{manifest.route}/v{manifest.draft_version}"
        files = {
            "adapter_model.safetensors": weights,
            "adapter_config.json": manifest.adapter_config_json.encode(),
            "manifest.json": json.dumps(asdict(manifest), indent=1).encode(),
        }
        self._upload(name, files)
        place = f"{self._client.get_run(self.run_id).info.artifact_uri}/{name}"
        self._registry.add(manifest, reason, place, self.run_id)

    def mark_serving(self, route: str, version: int, previous_version: int, since: str, reason: str) -> None:
        text = self._registry.mark_serving(route, version, previous_version, since, reason)
        self._serving[f"serving.{route}"] = text
        self._set_tag(f"serving.{route}", text)

    def end(self) -> None:
        for route in list(self._series):
            self._if_possible(partial(self._draw, route))
        self._client.set_terminated(self.run_id)

    def _if_possible(self, act: Callable[[], None]) -> None:
        """Run a job for plots and tables; its failure is only logged."""
        try:
            act()
        except Exception as error:  # whatever matplotlib or an artifact store may raise
            logger.info("a picture or table was not kept: %s", redacted(str(error)))

    def _tell(self, route: str, decision: Decision) -> None:
        """Write the route's table and the run's own page: the texts of all routes, and the latest
        decisions."""
        lines = self._decisions_of(route)
        lines.append(decision)
        del lines[:-_KEPT_LINES]
        texts = [text for _, text in sorted(self._serving.items())]
        latest = f"Latest decisions of route {route}; all of them: Artifacts, `routes/`."
        self._set_tag(_NOTE, "\n\n".join([*texts, latest, decisions_text(lines)]))
        self._upload("routes", {f"decisions-{route}.csv": decisions_csv(lines).encode()})
        if decision.kind in SERVING_CHANGES:
            self._draw(route)

    def _draw(self, route: str) -> None:
        picture = acceptance_png(route, self._series_of(route), self._decisions_of(route))
        self._upload("routes", {f"acceptance-{route}.png": picture})

    def _decisions_of(self, route: str) -> list[Decision]:
        """The route's decisions so far; those of an earlier process are read once."""
        if route not in self._decisions:
            path = f"routes/decisions-{route}.csv"
            stored = [file.path for file in self._client.list_artifacts(self.run_id, "routes")]
            text = ""
            if path in stored:
                with tempfile.TemporaryDirectory() as folder:
                    local_path = self._client.download_artifacts(self.run_id, path, folder)
                    text = Path(local_path).read_text()
            self._decisions[route] = decisions_from_csv(text)
        return self._decisions[route]

    def _tag_decision(self, key: str, text: str) -> None:
        self._set_tag(key, text)
        self._decision_tags = [*(old for old in self._decision_tags if old != key), key]
        while len(self._decision_tags) > KEPT_DECISION_TAGS:
            self._client.delete_tag(self.run_id, self._decision_tags[0])
            del self._decision_tags[0]

    def _upload(self, folder_name: str, files: Mapping[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self._client.log_artifacts(self.run_id, folder, folder_name)

    def _series_of(self, route: str) -> dict[str, list[tuple[int, float]]]:
        """The route's points so far; those of an earlier process are read once."""
        if route not in self._series:
            self._series[route] = {
                key: [(point.step, point.value) for point in self._history(_metric_name(route, key))]
                for key in PLOTTED
            }
        return self._series[route]

    def _history(self, name: str) -> list[Any]:
        return list(self._client.get_metric_history(self.run_id, name))[-_KEPT_LINES:]

    def _set_tag(self, key: str, text: str) -> None:
        self._client.set_tag(self.run_id, key, text)

    def _is_known(self, run_id: str) -> bool:
        """Whether the run can be continued: an MLflow that lost its data gets a new run."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(run_id) and self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _start_run(self, experiment_name: str) -> str:
        experiment = self._client.get_experiment_by_name(experiment_name)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(experiment_name, artifact_location=self._artifacts)
        )
        return str(self._client.create_run(experiment_id, run_name="learner").info.run_id)
