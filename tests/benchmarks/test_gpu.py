"""The GPU benchmark runs where there is none, at a tiny shape: the same code, no figure worth keeping."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_models
from benchmarks.gpu import main
from benchmarks.gpu_models import SyntheticAcceptance
from serving.engine.passes.runner import Runner
from tests.test_architecture import SERVICES, run_in_a_clean_interpreter


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("gpu")
    arguments = ["--tiny", "--device", "cpu", "--batches", "1,3", "--dtype", "float32"]
    main([*arguments, "--report", str(folder / "gpu.json"), "--profile", str(folder / "profile.txt")])
    profile = (folder / "profile.txt").read_text(encoding="utf-8")
    assert "one target pass" in profile and "one round" in profile
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8"))


def test_the_report_has_every_pass_round_and_generation(report: Any) -> None:
    assert report.keys() == {"name", "command", "environment", "metrics", "series"}
    assert report["command"].startswith("python -m benchmarks.gpu --tiny")
    assert {"date", "accelerator", "libraries"} <= report["environment"].keys()
    metrics = report["metrics"]
    passes = {(row["model"], row["batch"], row["tokens"], row["arm"]) for row in metrics["passes"]}
    assert passes == {
        (model, batch, tokens, arm)
        for model, tokens in (("target", 1), ("target", 6), ("draft", 1))
        for batch in (1, 3)
        for arm in ("transformers eager", "engine eager", "engine static")
    }
    assert [row["batch"] for row in metrics["rounds"]] == [1, 3]
    assert len(metrics["generation"]) == 6
    for row in metrics["passes"] + metrics["rounds"]:
        assert row["over_floor"] == pytest.approx(row["seconds"] / row["floor_s"])
        assert row["over_floor"] > 0
    assert metrics["static_error_target"] < 1e-4 and metrics["static_error_draft"] < 1e-4


def test_the_synthetic_acceptance_is_the_one_that_was_set(report: Any) -> None:
    """Up to six tokens a round at 0.8 a token: 3.7 expected; the pattern is fixed, so is the result."""
    for row in report["metrics"]["rounds"]:
        assert 2.5 < row["block_efficiency"] < 5.0
    by_arm = {(row["arm"], row["batch"]): row for row in report["metrics"]["generation"]}
    assert by_arm["engine off", 1]["block_efficiency"] == 1.0
    assert by_arm["engine, synthetic acceptance", 1]["block_efficiency"] > 1.5


def test_a_synthetic_pattern_of_none_or_all_accepts_none_or_all() -> None:
    cpu = torch.device("cpu")
    model = gpu_models.build(
        gpu_models.TINY_TARGET, max_positions=64, device=cpu, dtype=torch.float32, seed=0
    )
    token_ids_BT, positions_BT = torch.tensor([[3, 4, 5]]), torch.tensor([[0, 1, 2]])
    for acceptance, agrees in ((0.0, False), (1.0, True)):
        runner = SyntheticAcceptance(model, num_slots=1, max_seq_len=32, acceptance=acceptance)
        runner.overrules = True
        best = runner.forward(token_ids_BT, positions_BT, kv_len=3).argmax(-1)
        assert [int(best[0, 0]) == 4, int(best[0, 1]) == 5] == [agrees, agrees]
        own = Runner(model, num_slots=1, max_seq_len=32).forward(token_ids_BT, positions_BT, kv_len=3)
        assert int(best[0, 2]) == int(own[0, 2].argmax())


def test_the_bytes_under_a_floor_are_the_weights_read_and_the_context() -> None:
    cpu = torch.device("cpu")
    for shape, tied in ((gpu_models.TINY_TARGET, False), (gpu_models.TINY_DRAFT, True)):
        model = gpu_models.build(shape, max_positions=64, device=cpu, dtype=torch.bfloat16, seed=0)
        stored = sum(weight.numel() for weight in model.parameters())
        table = shape["vocab_size"] * shape["hidden_size"]
        context = 3 * 10 * shape["num_hidden_layers"] * 2 * 2 * 16
        expected = 2 * (stored - (0 if tied else table) + context)
        assert gpu_models.pass_bytes(model, num_rows=3, kv_len=10) == expected


def test_it_loads_no_service() -> None:
    loaded = run_in_a_clean_interpreter("import benchmarks.gpu")
    assert "torch" in loaded
    assert SERVICES.isdisjoint(loaded)


def test_serving_knows_no_synthetic_rule() -> None:
    root = Path(__file__).parents[2]
    for file in (root / "serving").rglob("*.py"):
        assert "Synthetic" not in file.read_text(encoding="utf-8")
