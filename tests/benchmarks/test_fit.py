"""What a part guesses is counted at the target's own tokens."""

from itertools import cycle
from pathlib import Path

import pytest

from benchmarks.fit import measure
from serving.models.loading import load_pair
from tests.support.tiny_models import save_tiny_pair

PROMPTS = [[1, 2, 3], [4, 5, 6, 7], list(range(30))]


def test_the_last_exit_is_the_target_and_earlier_ones_guess_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, _ = save_tiny_pair(tmp_path)
    figures = measure(load_pair(target), cycle(PROMPTS), exit_layers=[0, 2], num_prompts=3, max_tokens=6)
    parts = figures["parts"]
    assert figures["num_prompts"] == 3 and 3 <= figures["num_tokens"] <= 18
    assert parts["self:2"]["acceptance_before"] == 1.0
    assert parts["self:0"]["acceptance_before"] < 1.0
    assert all(0.0 <= row["acceptance_after"] <= 1.0 for row in parts.values())
    assert [row["layers"] for row in parts.values()] == [1, 3]
