"""Gaps of streams over a swap, on a real engine; a pause that is put in is seen."""

import time
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from benchmarks import swaps
from benchmarks.adapted import Adapter
from serving.engine.core import EngineCore
from serving.local import LocalEngine, load_engine
from serving.options import EngineOptions
from tests.support.tiny_adapters import tiny_adapter
from tests.support.tiny_models import save_tiny_pair

OPTIONS = EngineOptions(num_slots=swaps.NUM_STREAMS, max_seq_len=128, num_draft_tokens=3, prefix_cache_mib=0)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(swaps, "PAUSE_S", 0.1)

    def measure(engine: LocalEngine) -> dict[str, Any]:
        manifest, weights = tiny_adapter(
            engine.pair.draft_id, draft_version=1, target_revision=engine.pair.target_revision
        )
        adapter = Adapter(weights, manifest.adapter_config_json)
        return swaps.measure_swaps(engine, adapter, repeat([5, 6, 7]), num_swaps=4, num_tokens=60)

    with load_engine(*save_tiny_pair(tmp_path), OPTIONS) as engine:
        yield engine, measure


def test_every_swap_has_its_largest_gap(measured: Any) -> None:
    engine, measure = measured
    found = measure(engine)
    assert found["num_failed"] == 0 and found["num_requests"] >= swaps.NUM_STREAMS
    assert len(found["swap_gaps_in_steps"]) == len(found["staging_gaps_in_steps"]) == 4
    assert min(found["swap_gaps_in_steps"]) > 0.0


def test_a_swap_that_makes_streams_wait_is_seen(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, measure = measured
    apply = EngineCore.swap
    monkeypatch.setattr(EngineCore, "swap", lambda *given: (time.sleep(0.5), apply(*given))[1])
    found = measure(engine)
    assert min(found["swap_gaps_in_steps"]) * found["median_step_ms"] >= 400.0
