"""What the learner tells the outside about itself: metrics, adapters, decisions. The only MLflow file.

`MlflowTracker` writes from a thread of its own through a bounded queue: a slow or dead MLflow costs the
learner nothing; what no longer fits, or what MLflow refuses, is dropped and counted. MLflow is imported
in that thread, telemetry off. Invariant: no call of a Tracker raises or waits, `close` excepted.
"""

import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from buffer.records import FLOOR_VERSION, AdapterManifest

logger = logging.getLogger(__name__)

_REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "BAD_REQUEST",
    "PERMISSION_DENIED",
}
"""Error codes that trying again cannot mend."""


class Tracker(Protocol):
    """Where the learner's story is kept."""

    @property
    def run_id(self) -> str:
        """Of the run that a resumed learner continues; empty while there is none."""
        ...

    @property
    def num_dropped(self) -> int: ...

    def log_params(self, params: Mapping[str, object]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_decision(self, key: str, text: str) -> None:
        """A tag of the run, e.g. `decision.v3`."""
        ...

    def log_adapter(self, manifest: AdapterManifest, weights: bytes) -> None:
        """The durable copy: artifacts of the run and a version in the registry."""
        ...

    def mark_serving(self, draft_version: int, previous_version: int) -> None:
        """Point the aliases `champion` and `previous`; the floor (0) has none."""
        ...

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is queued, for at most so long."""
        ...


class NullTracker:
    """Keeps nothing."""

    run_id = ""
    num_dropped = 0

    def log_params(self, params: Mapping[str, object]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_decision(self, key: str, text: str) -> None: ...

    def log_adapter(self, manifest: AdapterManifest, weights: bytes) -> None: ...

    def mark_serving(self, draft_version: int, previous_version: int) -> None: ...

    def close(self, timeout_s: float = 10.0) -> None: ...


class MlflowTracker:
    """`run_id` continues an earlier run; else one is started in `experiment_name`."""

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
        self._num_dropped = 0
        self._retry_s = retry_s
        self._queue: queue.Queue[Callable[[_Session], None]] = queue.Queue(max_queued)
        self._stop = threading.Event()
        self._places = (tracking_uri, experiment_name, registered_model_name)
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        return self._run_id

    @property
    def num_dropped(self) -> int:
        return self._num_dropped

    def log_params(self, params: Mapping[str, object]) -> None:
        kept = dict(params)
        self._submit(lambda session: session.log_params(kept))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        kept, at_s = dict(metrics), time.time()
        self._submit(lambda session: session.log_metrics(kept, step, at_s))

    def log_decision(self, key: str, text: str) -> None:
        self._submit(lambda session: session.set_tag(key, text))

    def log_adapter(self, manifest: AdapterManifest, weights: bytes) -> None:
        self._submit(lambda session: session.log_adapter(manifest, weights))

    def mark_serving(self, draft_version: int, previous_version: int) -> None:
        self._submit(lambda session: session.mark_serving(draft_version, previous_version))

    def close(self, timeout_s: float = 10.0) -> None:
        self._submit(lambda session: session.end())
        self._stop.set()
        self._thread.join(timeout_s)

    def _submit(self, job: "Callable[[_Session], None]") -> None:
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            self._num_dropped += 1

    def _work(self) -> None:
        session = self._connect()
        while session is not None:
            try:
                job = self._queue.get(timeout=0.2)
            except queue.Empty:
                if self._stop.is_set():
                    return
                continue
            while not self._done(job, session):
                if self._stop.wait(self._retry_s):
                    return

    def _connect(self) -> "_Session | None":
        """Tries until it succeeds or the tracker is closed."""
        while True:
            try:
                session = _Session(*self._places, run_id=self._run_id)
            except Exception as error:  # MLflow lets its backends' exceptions through
                logger.info("MLflow cannot be reached, trying again: %s", error)
                if self._stop.wait(self._retry_s):
                    return None
            else:
                self._run_id = session.run_id
                return session

    def _done(self, job: "Callable[[_Session], None]", session: "_Session") -> bool:
        """False if it is worth trying again. What MLflow refuses is dropped and counted."""
        try:
            job(session)
        except Exception as error:  # as above
            if getattr(error, "error_code", "") not in _REFUSALS:
                logger.info("MLflow cannot be reached, trying again: %s", error)
                return False
            logger.warning("MLflow refused a write, dropped: %s", error)
            self._num_dropped += 1
        return True


def _artifacts_beside(tracking_uri: str) -> str | None:
    """A folder beside an SQLite file, whose artifacts would else go to the working directory; a server
    has a place of its own. SQLite makes its file, not its folder: that is made here."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    folder = Path(tracking_uri.removeprefix("sqlite:///")).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "artifacts").as_uri()


class _Session:
    """MLflow itself; used by the tracker's thread only."""

    def __init__(self, tracking_uri: str, experiment_name: str, model_name: str, run_id: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._param = Metric, Param
        self._client = MlflowClient(tracking_uri, registry_uri=tracking_uri)
        self._model_name = model_name
        self._artifacts = _artifacts_beside(tracking_uri)
        self.run_id = run_id or self._start_run(experiment_name)
        self._client.update_run(self.run_id, status="RUNNING")
        if not self._client.search_registered_models(f"name = '{model_name}'"):
            self._client.create_registered_model(model_name)

    def log_params(self, params: Mapping[str, object]) -> None:
        found = [self._param(key, str(value)) for key, value in params.items()]
        self._client.log_batch(self.run_id, params=found)

    def log_metrics(self, metrics: Mapping[str, float], step: int, at_s: float) -> None:
        at_ms = int(at_s * 1000)
        found = [self._metric(key, float(value), at_ms, step) for key, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=found)

    def set_tag(self, key: str, text: str) -> None:
        self._client.set_tag(self.run_id, key, text)

    def log_adapter(self, manifest: AdapterManifest, weights: bytes) -> None:
        if self._registry_version(manifest.draft_version):
            return
        name = f"adapters/v{manifest.draft_version}"
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "adapter_model.safetensors").write_bytes(weights)
            (Path(folder) / "adapter_config.json").write_text(manifest.adapter_config_json)
            self._client.log_artifacts(self.run_id, folder, name)
        tags = {
            "draft_version": str(manifest.draft_version),
            "route": manifest.route,
            "sha256": manifest.sha256,
        }
        source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{name}"
        self._client.create_model_version(self._model_name, source, self.run_id, tags=tags)

    def mark_serving(self, draft_version: int, previous_version: int) -> None:
        for alias, wanted in (("champion", draft_version), ("previous", previous_version)):
            found = "" if wanted == FLOOR_VERSION else self._registry_version(wanted)
            if found:
                self._client.set_registered_model_alias(self._model_name, alias, found)
            else:
                self._client.delete_registered_model_alias(self._model_name, alias)

    def end(self) -> None:
        self._client.set_terminated(self.run_id)

    def _start_run(self, experiment_name: str) -> str:
        experiment = self._client.get_experiment_by_name(experiment_name)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(experiment_name, artifact_location=self._artifacts)
        )
        return str(self._client.create_run(experiment_id).info.run_id)

    def _registry_version(self, draft_version: int) -> str:
        """The registry's own number of this run's adapter; empty if it is not there."""
        for found in self._client.search_model_versions(f"name = '{self._model_name}'"):
            if found.tags.get("draft_version") == str(draft_version) and found.run_id == self.run_id:
                return str(found.version)
        return ""
