"""A real MLflow on SQLite; and one that is away, which costs the learner nothing."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from learner.draft import export_weights
from learner.tracking import MlflowTracker
from tests.learner.test_checkpoint import MANIFEST
from tests.support.tiny_learner import tiny_draft

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and its libraries' own


def tracker_on(uri: str, run_id: str = "") -> MlflowTracker:
    return MlflowTracker(
        uri, experiment_name="test", registered_model_name="draft", run_id=run_id, retry_s=0.05
    )


def test_a_run_its_adapters_and_aliases_survive_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri, draft = f"sqlite:///{tmp_path / 'mlflow.db'}", tiny_draft()
    first = replace(MANIFEST, draft_version=1, adapter_config_json=draft.config_json)
    second = replace(first, draft_version=2)
    weights = export_weights(draft.state())

    tracker = tracker_on(uri)
    tracker.log_params({"rank": 16})
    tracker.log_metrics({"loss": 2.0}, step=1)
    tracker.log_adapter(first, weights)
    tracker.mark_serving(1, 0)
    tracker.close(timeout_s=90.0)
    run_id = tracker.run_id

    resumed = tracker_on(uri, run_id)
    resumed.log_params({"rank": 32})  # refused by MLflow: dropped, counted, not fatal
    resumed.log_metrics({"loss": 1.0}, step=2)
    resumed.log_adapter(second, weights)
    resumed.mark_serving(2, 1)
    resumed.log_decision("decision.v2", "promoted: better")
    resumed.close(timeout_s=90.0)

    from mlflow import MlflowClient

    client = MlflowClient(uri, registry_uri=uri)
    assert run_id and resumed.run_id == run_id
    assert resumed.num_dropped == 1
    assert [metric.value for metric in client.get_metric_history(run_id, "loss")] == [2.0, 1.0]
    run = client.get_run(run_id)
    assert run.data.params == {"rank": "16"}
    assert run.data.tags["decision.v2"] == "promoted: better"
    assert run.info.status == "FINISHED"
    champion, previous = (client.get_model_version_by_alias("draft", a) for a in ("champion", "previous"))
    assert (champion.tags["draft_version"], previous.tags["draft_version"]) == ("2", "1")
    folder = client.download_artifacts(run_id, "adapters/v2", str(tmp_path))
    assert (Path(folder) / "adapter_model.safetensors").read_bytes() == weights


def test_an_absent_mlflow_costs_nothing_and_what_does_not_fit_is_counted() -> None:
    tracker = MlflowTracker(
        "http://127.0.0.1:9",
        experiment_name="test",
        registered_model_name="draft",
        max_queued=10,
        retry_s=0.05,
    )
    began_s = time.monotonic()
    for step in range(1000):
        tracker.log_metrics({"loss": 1.0}, step)
    assert time.monotonic() - began_s < 1.0
    assert tracker.num_dropped >= 980
    assert tracker.run_id == ""
    tracker.close(timeout_s=0.1)
