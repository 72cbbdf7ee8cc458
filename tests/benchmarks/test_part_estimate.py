"""The estimate for a large target is the cost model, worked out by hand."""

import pytest

from benchmarks.part_estimate import Hardware, estimate, rows


def test_a_part_is_as_dear_as_its_layers_and_its_head() -> None:
    assert estimate(2, 0.8).draft_ms == pytest.approx(3 * 0.115 + 0.33)
    assert estimate(2, 0.8, whole_block=False).draft_ms == pytest.approx(2.25 * 0.115 + 0.33)
    assert estimate(0, 0.8, kept_tokens=64_128).draft_ms == pytest.approx(0.115 + 0.165)


def test_the_speed_is_tokens_a_round_over_the_time_of_a_round() -> None:
    gpu = Hardware(pass_ms=10.0, head_ms=1.0, layer_ms=0.0, round_ms=2.0)
    found = estimate(3, 0.5, hardware=gpu)
    by_length = [sum(0.5**n for n in range(length + 1)) * 10 / (12 + length) for length in range(1, 9)]
    assert found.speedup == pytest.approx(max(by_length))
    assert found.num_draft_tokens == 1 + by_length.index(max(by_length))


def test_every_part_and_head_has_a_row() -> None:
    table = list(rows())
    assert len(table) == len(set(table)) == 30
