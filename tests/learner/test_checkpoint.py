"""Killed and resumed, the learner goes on bit for bit; a corrupt file never ends it."""

import json
from pathlib import Path

import pytest
import torch

from buffer.records import AdapterManifest, GenerationRecord
from learner import checkpoint
from learner.checkpoint import Checkpoint
from learner.routing.policy import Standing
from learner.routing.route_book import RouteBook, read_book, write_book
from learner.trainer import Trainer
from tests.support.record_factory import RecordFactory
from tests.support.tiny_learner import quick_settings, tiny_draft, tiny_pair

MANIFEST = AdapterManifest(
    route="default",
    draft_version=3,
    parent_version=2,
    draft_id="tiny-draft",
    draft_revision="draft-1",
    target_revision="target-1",
    rank=16,
    alpha=32.0,
    target_modules=("q_proj",),
    adapter_config_json="{}",
    sha256="00",
    num_bytes=3,
    created_at_s=1.5,
    evidence={"gain_lower_bound": 0.1},
)


@pytest.fixture(scope="module")
def records() -> list[GenerationRecord]:
    return RecordFactory(*tiny_pair()).records(30, max_tokens=6)


def saved(trainer: Trainer, **changes: object) -> Checkpoint:
    fields: dict[str, object] = {
        "adapter": trainer.draft.state(),
        "optimizer": trainer.optimizer_state(),
        "generator_state": trainer.rng.bit_generator.state,
        "num_steps": trainer.num_steps,
    }
    return Checkpoint(**fields | changes)  # type: ignore[arg-type]


def keep_going(_step_s: float) -> bool:
    return True


def test_a_resumed_trainer_continues_bit_for_bit(records: list[GenerationRecord], tmp_path: Path) -> None:
    whole = Trainer(tiny_draft(), quick_settings())
    whole.train(records, records[:6], keep_going)
    checkpoint.write(tmp_path, saved(whole))
    whole.train(records, records[:6], keep_going)

    found = checkpoint.read_latest(tmp_path)
    assert found is not None
    resumed = Trainer(tiny_draft(seed=99), quick_settings(seed=99))
    resumed.restore(found.adapter, found.optimizer, found.generator_state, found.num_steps)
    resumed.train(records, records[:6], keep_going)

    assert resumed.num_steps == whole.num_steps
    assert all(torch.equal(value, resumed.draft.state()[key]) for key, value in whole.draft.state().items())
    fresh = Trainer(tiny_draft(), quick_settings())
    fresh.restore(found.adapter, {}, found.generator_state, found.num_steps)
    fresh.train(records, records[:6], keep_going)
    assert not all(torch.equal(value, fresh.draft.state()[key]) for key, value in whole.draft.state().items())


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    trainer = Trainer(tiny_draft(), quick_settings())
    written = saved(
        trainer,
        num_records_seen=7,
        last_version=3,
        acked_entry_ids={"default": ["1-0", "2-0"]},
        incumbent_manifest=MANIFEST,
        incumbent_weights=b"abc",
        mlflow_run_id="run",
        schedule={"slowdown": 2},
    )
    checkpoint.write(tmp_path, written)
    found = checkpoint.read_latest(tmp_path)
    assert found is not None
    assert found.incumbent_manifest == MANIFEST
    assert found.incumbent_weights == b"abc"
    for name in (
        "num_steps",
        "num_records_seen",
        "last_version",
        "acked_entry_ids",
        "mlflow_run_id",
        "schedule",
    ):
        assert getattr(found, name) == getattr(written, name)
    assert found.generator_state == written.generator_state


def test_the_schedule_under_its_older_name_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written before version 0.2, which called it `pace`."""
    written = saved(Trainer(tiny_draft(), quick_settings()), schedule={"slow": True})
    dumps = json.dumps
    monkeypatch.setattr(checkpoint.json, "dumps", lambda plain: dumps(plain).replace('"schedule"', '"pace"'))
    checkpoint.write(tmp_path, written)
    found = checkpoint.read_latest(tmp_path)
    assert found is not None and found.schedule == {"slow": True}


def test_a_corrupt_or_torn_file_gives_the_one_before(tmp_path: Path) -> None:
    trainer = Trainer(tiny_draft(), quick_settings())
    checkpoint.write(tmp_path, saved(trainer, last_version=1))
    newest = checkpoint.write(tmp_path, saved(trainer, last_version=2))
    data = newest.read_bytes()
    for damaged in (data[:-100], data[:-1] + bytes([data[-1] ^ 1]), b""):
        newest.write_bytes(damaged)
        found = checkpoint.read_latest(tmp_path)
        assert found is not None
        assert found.last_version == 1
    (tmp_path / "0000000003-deadbeef.part").write_bytes(b"killed while writing")
    assert checkpoint.read_latest(tmp_path) is not None


def test_only_the_last_files_are_kept_and_none_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.read_latest(tmp_path / "missing") is None
    trainer = Trainer(tiny_draft(), quick_settings())
    for version in range(5):
        checkpoint.write(tmp_path, saved(trainer, last_version=version))
    assert len(list(tmp_path.iterdir())) == checkpoint.KEPT_FILES
    found = checkpoint.read_latest(tmp_path)
    assert found is not None
    assert found.last_version == 4


def test_the_candidate_is_a_mean_of_what_was_trained_and_comes_back_with_it(
    records: list[GenerationRecord], tmp_path: Path
) -> None:
    trainer = Trainer(tiny_draft(), quick_settings(mean_over_steps=60))
    trainer.train(records, [], keep_going)
    assert any(not torch.equal(mean, trainer.trained[key]) for key, mean in trainer.candidate.items())
    checkpoint.write(tmp_path, saved(trainer, adapter=trainer.trained))
    found = checkpoint.read_latest(tmp_path)
    assert found is not None
    resumed = Trainer(tiny_draft(seed=99), quick_settings())
    resumed.restore(found.adapter, found.optimizer, found.generator_state, found.num_steps)
    assert all(torch.equal(mean, resumed.candidate[key]) for key, mean in trainer.candidate.items())
    trainer.reset(None)
    assert all(torch.equal(trainer.trained[key], mean) for key, mean in trainer.candidate.items())


def test_without_a_mean_the_candidate_is_what_was_trained(records: list[GenerationRecord]) -> None:
    trainer = Trainer(tiny_draft(), quick_settings(mean_over_steps=0))
    trainer.train(records, [], keep_going)
    assert all(torch.equal(trainer.trained[key], mean) for key, mean in trainer.candidate.items())


def test_each_target_of_a_state_folder_has_a_folder_of_its_own(tmp_path: Path) -> None:
    one, other = (checkpoint.folder_of_target(tmp_path, 60 * digit) for digit in "12")
    assert one != other
    checkpoint.write(one, saved(Trainer(tiny_draft(), quick_settings())))
    assert checkpoint.read_latest(other) is None


def test_what_an_earlier_build_left_in_the_folder_goes_to_the_target_that_it_served(tmp_path: Path) -> None:
    left = saved(Trainer(tiny_draft(), quick_settings()), incumbent_manifest=MANIFEST, last_version=3)
    checkpoint.write(tmp_path, left)
    checkpoint.write(tmp_path / "routes" / "sql", left)
    write_book(tmp_path, RouteBook({"sql": Standing(num_records=7)}))
    assert checkpoint.read_latest(checkpoint.folder_of_target(tmp_path, "target-2")) is None
    own = checkpoint.folder_of_target(tmp_path, "target-1")
    found, of_route = checkpoint.read_latest(own), checkpoint.read_latest(own / "routes" / "sql")
    assert found is not None and found.last_version == 3 and of_route is not None
    assert read_book(own).standings["sql"].num_records == 7
    assert checkpoint.folder_of_target(tmp_path, "target-1") == own
