"""The engine's own costs are measured on real parts; no figure is judged here."""

import itertools
from pathlib import Path

import pytest

from benchmarks.overheads import BATCHES, Work, measure
from serving.models.loading import load_pair
from tests.support.tiny_models import save_tiny_pair


@pytest.mark.slow
def test_every_comparison_has_its_pairs_and_its_bound(tmp_path: Path) -> None:
    pair = load_pair(*save_tiny_pair(tmp_path))
    prompts = ([5 + number % 300, 7, 9] for number in itertools.count())
    said: list[str] = []
    metrics = measure(Work(pair, prompts, 2, "off", said.append))
    assert metrics["passes"].startswith("eager")
    for batch in BATCHES:
        own_ms = metrics["outside_forwards"][f"batch_{batch}"]
        assert all(own_ms[kind] > 0.0 for kind in ("no_speculation", "greedy", "temperature_1"))
        for comparison in ("capture", "random_draft"):
            figures = metrics[comparison][f"batch_{batch}"]
            assert len(figures["ratios"]) == figures["num_pairs"] == 2
            assert min(figures["ratios"]) <= figures["ratio_lower_95"] <= figures["ratio_mean"]
        assert metrics["capture"][f"batch_{batch}"]["num_dropped_records"] == 0
        assert metrics["random_draft"][f"batch_{batch}"]["num_attempted"] > 0
    assert len(said) == 3 * 2 * len(BATCHES)
