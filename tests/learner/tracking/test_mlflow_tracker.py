"""A real MLflow on SQLite, read as a reader would; and one that is away, which costs the learner nothing."""

import csv
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from learner.draft import export_weights
from learner.tracking import mlflow_tracker
from learner.tracking.acceptance_plot import acceptance_png
from learner.tracking.mlflow_tracker import CYCLES_PER_PLOT, MlflowTracker
from learner.tracking.report_text import (
    Decision,
    decisions_csv,
    decisions_from_csv,
    decisions_text,
    version_text,
)
from tests.learner.test_checkpoint import MANIFEST
from tests.support.tiny_learner import tiny_draft

EVIDENCE = {
    "acceptance_candidate": 0.6,
    "acceptance_incumbent": 0.4,
    "acceptance_floor": 0.3,
    "gain_lower_bound": 0.12,
    "tokens_per_s_candidate": 260.0,
    "tokens_per_s_incumbent": 210.0,
}
PNG = b"\x89PNG\r\n\x1a\n"
DRAFT = tiny_draft()
WEIGHTS = export_weights(DRAFT.state())


class TrackerTestbed:
    """An MLflow and the trackers that write to it, one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.run_id = ""

    @contextmanager
    def tracker(self) -> Iterator[MlflowTracker]:
        """Continues the run of the one before; all is written at the end."""
        found = MlflowTracker(
            self.uri,
            experiment_name="test",
            registered_model_name="draft",
            run_id=self.run_id,
            retry_s=0.05,
        )
        yield found
        found.close(timeout_s=90.0)
        self.run_id = found.run_id

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri, registry_uri=self.uri)

    def file(self, path: str) -> Path:
        return Path(self.client.download_artifacts(self.run_id, path, str(self.folder)))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to lay out its tables; each test gets a copy."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> TrackerTestbed:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path)
    return TrackerTestbed(tmp_path)


def promote(tracker: MlflowTracker, route: str, version: int, num_records_seen: int, why: str) -> None:
    """As the learner does."""
    manifest = replace(
        MANIFEST,
        route=route,
        draft_version=version,
        parent_version=version - 1,
        adapter_config_json=DRAFT.config_json,
        evidence=EVIDENCE,
        num_records_seen=num_records_seen,
    )
    tracker.log_adapter(manifest, WEIGHTS, why)
    tracker.mark_serving(route, version, version - 1, f"promoted: {why}")
    tracker.log_decision(route, "promoted", version, why, num_records_seen)


def test_one_run_goes_on_after_a_restart_with_steps_in_records(testbed: TrackerTestbed) -> None:
    with testbed.tracker() as tracker:
        tracker.log_params({"rank": 16})
        tracker.log_metrics("default", {"loss": 2.0}, 30)
        tracker.log_metrics("sql", {"loss": 3.0}, 10)
    run_id = testbed.run_id
    with testbed.tracker() as resumed:
        resumed.log_params({"rank": 32, "seed": 1})
        resumed.log_metrics("default", {"loss": 1.0}, 60)
    assert resumed.num_dropped == 0
    assert run_id and testbed.run_id == run_id
    client = testbed.client
    history = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(30, 2.0), (60, 1.0)]
    run = client.get_run(run_id)
    assert run.data.metrics["sql/loss"] == 3.0
    assert run.data.params == {"rank": "16", "seed": "1"}
    assert run.data.tags["changed.rank"] == "16 -> 32"
    assert run.info.status == "FINISHED"


def test_a_reader_finds_which_draft_serves_a_route_since_when_why_and_what_it_brought(
    testbed: TrackerTestbed,
) -> None:
    with testbed.tracker() as tracker:
        promote(tracker, "sql", 1, 30, "better at first")
        tracker.log_decision("sql", "refused", 2, "not better than the incumbent", 60)
        promote(tracker, "sql", 2, 90, "better again")
    client = testbed.client
    model = client.get_registered_model("draft-sql")
    assert model.tags["serving"].startswith("draft 2 since 20")
    for words in ("Draft 2 serves route sql", "since 20", "promoted: better again", "0.400 -> 0.600"):
        assert words in model.description
    assert "not better than the incumbent" in model.tags["last_refusal"]
    serving, previous = (client.get_model_version_by_alias("draft-sql", a) for a in ("serving", "previous"))
    assert (serving.tags["draft_version"], previous.tags["draft_version"]) == ("2", "1")
    tags = serving.tags
    assert (tags["route"], tags["parent"], tags["num_records_seen"]) == ("sql", "1", "90")
    assert tags["reason"] == "better again" and tags["promoted_at"].endswith("Z")
    for words in ("0.400 -> 0.600", "at least +0.1200", "210 -> 260 tokens/s"):
        assert words in tags["evidence"]
    note = client.get_run(testbed.run_id).data.tags["mlflow.note.content"]
    assert "Draft 2 serves route sql" in note and "not better than the incumbent" in note
    assert previous.tags["replaced_because"] == "promoted: better again"
    folder = testbed.file("adapters/sql/v2")
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS


def test_a_rollback_to_the_floor_says_so_and_marks_the_draft_that_left(testbed: TrackerTestbed) -> None:
    with testbed.tracker() as tracker:
        promote(tracker, "default", 1, 30, "better")
        tracker.mark_serving("default", 0, 0, "rolled back: worse on live traffic")
        tracker.log_decision("default", "rolled_back", 0, "worse on live traffic", 60)
    client = testbed.client
    model = client.get_registered_model("draft-default")
    assert model.aliases == {}
    assert "The floor serves route default" in model.description
    assert "worse on live traffic" in model.description
    (version,) = client.search_model_versions("name = 'draft-default'")
    assert version.tags["replaced_because"] == "rolled back: worse on live traffic"
    assert version.tags["served_until"] >= version.tags["serving_since"]
    run = client.get_run(testbed.run_id)
    assert run.data.tags["serving.default"] == model.description
    history = client.get_metric_history(testbed.run_id, "draft_version")
    assert [(point.step, point.value) for point in history] == [(30, 1), (60, 0)]


def test_a_draft_that_serves_again_no_longer_says_that_it_left(testbed: TrackerTestbed) -> None:
    with testbed.tracker() as tracker:
        promote(tracker, "default", 1, 30, "better")
        promote(tracker, "default", 2, 60, "better still")
        tracker.mark_serving("default", 1, 0, "rolled back: worse")
    serving = testbed.client.get_model_version_by_alias("draft-default", "serving")
    assert serving.tags["draft_version"] == "1"
    assert serving.tags["serving_because"] == "rolled back: worse"
    assert not {"served_until", "replaced_because"} & set(serving.tags)


def test_every_decision_is_a_tag_and_a_line_of_the_routes_table(testbed: TrackerTestbed) -> None:
    with testbed.tracker() as tracker:
        promote(tracker, "sql", 1, 30, "better")
    with testbed.tracker() as resumed:
        resumed.log_decision("sql", "refused", 2, "too few, records", 60)
        resumed.log_decision("sql", "rejected_by_replica", 1, "r0: corrupted", 90)
        resumed.log_metrics("sql", {"acceptance_floor": 0.3}, 90)
    tags = testbed.client.get_run(testbed.run_id).data.tags
    refused = [text for key, text in tags.items() if key == "decision.sql.000000060.refused.v2"]
    assert len(refused) == 1 and refused[0].endswith(" too few, records")
    with testbed.file("routes/decisions-sql.csv").open() as file:
        lines = [(line["kind"], line["reason"]) for line in csv.DictReader(file)]
    assert lines == [
        ("rejected_by_replica", "r0: corrupted"),
        ("refused", "too few, records"),
        ("promoted", "better"),
    ]
    serving = testbed.client.get_model_version_by_alias("draft-sql", "serving")
    assert "r0: corrupted" in serving.tags["rejected_by_replica"]


def test_the_picture_covers_the_life_before_a_restart(
    testbed: TrackerTestbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[tuple[int, float]]] = []

    def draw(route: str, series: dict[str, list[tuple[int, float]]], decisions: object) -> bytes:
        drawn.append(list(series["acceptance_candidate"]))
        return PNG

    monkeypatch.setattr(mlflow_tracker, "acceptance_png", draw)
    with testbed.tracker() as tracker:
        tracker.log_metrics("default", {"acceptance_candidate": 0.4}, 30)
    with testbed.tracker() as resumed:
        for cycle in range(CYCLES_PER_PLOT):
            resumed.log_metrics("default", {"acceptance_candidate": 0.5}, 60 + cycle)
    assert drawn[0] == [(30, 0.4)]
    assert drawn[1] == [(30, 0.4), *((60 + cycle, 0.5) for cycle in range(CYCLES_PER_PLOT))]
    assert testbed.file("routes/acceptance-default.png").read_bytes() == PNG


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(
    testbed: TrackerTestbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise RuntimeError("no canvas")

    monkeypatch.setattr(mlflow_tracker, "acceptance_png", fail)
    with testbed.tracker() as tracker:
        promote(tracker, "default", 1, 30, "better")
        tracker.log_metrics("default", {"loss": 1.0}, 30)
    assert tracker.num_dropped == 0
    assert testbed.client.get_run(testbed.run_id).data.metrics["loss"] == 1.0


def test_a_store_of_artifacts_that_cannot_be_written_costs_the_artifacts_alone(
    testbed: TrackerTestbed,
) -> None:
    with testbed.tracker() as tracker:
        tracker.log_metrics("default", {"loss": 2.0}, 30)
    artifacts = testbed.folder / "artifacts"
    shutil.rmtree(artifacts, ignore_errors=True)
    artifacts.write_text("a file where the folder should be")
    with testbed.tracker() as tracker:
        promote(tracker, "default", 1, 60, "better")
        tracker.log_metrics("default", {"loss": 1.0}, 60)
    run = testbed.client.get_run(testbed.run_id)
    assert tracker.num_dropped == 1
    assert run.data.metrics["loss"] == 1.0
    assert "decision.default.000000060.promoted.v1" in run.data.tags


def test_an_mlflow_that_lost_its_memory_gets_a_new_run(testbed: TrackerTestbed) -> None:
    testbed.run_id = "0" * 32
    with testbed.tracker() as tracker:
        tracker.log_metrics("default", {"loss": 1.0}, 30)
    assert testbed.run_id != "0" * 32
    assert testbed.client.get_run(testbed.run_id).data.metrics["loss"] == 1.0


def test_the_same_draft_told_twice_is_one_version(testbed: TrackerTestbed) -> None:
    with testbed.tracker() as tracker:
        promote(tracker, "default", 1, 30, "better")
        promote(tracker, "default", 1, 30, "better")
    assert len(testbed.client.search_model_versions("name = 'draft-default'")) == 1


def test_old_decisions_leave_the_runs_tags_but_not_the_table(
    testbed: TrackerTestbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tracker, "KEPT_DECISION_TAGS", 3)
    for first in (0, 3):
        with testbed.tracker() as tracker:
            for cycle in range(first, first + 3):
                tracker.log_decision("default", "refused", 1, f"reason {cycle}", cycle)
    kept = [key for key in testbed.client.get_run(testbed.run_id).data.tags if key.startswith("decision.")]
    assert [key.split(".")[2] for key in sorted(kept)] == ["000000003", "000000004", "000000005"]
    lines = decisions_from_csv(testbed.file("routes/decisions-default.csv").read_text())
    assert [line.reason for line in lines] == [f"reason {cycle}" for cycle in range(6)]


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
        tracker.log_metrics("default", {"loss": 1.0}, step)
    assert time.monotonic() - began_s < 1.0
    assert tracker.num_dropped >= 980
    assert tracker.run_id == ""
    tracker.close(timeout_s=0.1)


def test_decisions_come_back_from_their_table_and_the_latest_stands_on_top() -> None:
    at = "2026-01-01T00:00:00Z"
    lines = [Decision("refused", 1, 'too "few",\nsaid it', 30, at), Decision("promoted", 1, "a | b", 60, at)]
    assert decisions_from_csv(decisions_csv(lines)) == lines
    assert decisions_from_csv("") == []
    assert decisions_csv(lines).splitlines()[1].startswith(f"{at},promoted")
    shown = decisions_text(lines, 1).splitlines()
    assert shown[2:] == [f"| {at} | 60 | promoted | 1 | a / b |"]


def test_a_drafts_page_says_what_it_is() -> None:
    assert "LoRA of rank 8 on draft" in version_text(replace(MANIFEST, rank=8), "better")
    assert "full weights on draft" in version_text(replace(MANIFEST, rank=0), "better")


def test_a_picture_is_drawn_of_whatever_is_known() -> None:
    swap = Decision("rolled_back", 0, "worse", 40, "2026-01-01T00:00:00Z")
    refusal = Decision("refused", 1, "worse", 40, "2026-01-01T00:00:00Z")
    known = {"acceptance_floor": [(10, 0.3), (40, 0.3)], "acceptance_candidate": [(40, 0.5)]}
    assert acceptance_png("sql", {}, []).startswith(PNG)
    assert acceptance_png("sql", known, [swap]) != acceptance_png("sql", known, [refusal])
