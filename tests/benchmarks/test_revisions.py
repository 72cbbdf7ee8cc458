"""A checkout beside itself: the same answers; and the negative control, another target, is seen."""

from itertools import repeat
from pathlib import Path

import pytest

from benchmarks import revisions
from benchmarks.revisions import compare, started
from tests.support.tiny_models import save_tiny_pair

HERE = Path(__file__).parents[2]


def test_a_checkout_beside_itself_says_the_same_and_another_target_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revisions, "CLIENTS", (1,))
    target, draft = save_tiny_pair(tmp_path)
    said, arms = list[str](), ("off", "adaptive")
    with (
        started(HERE, target, draft, 1, "off") as now,
        started(HERE, target, draft, 1, "off") as base,
        started(HERE, draft, draft, 1, "off") as other,
    ):
        for each in (now, base, other):
            each.wait()
        same = compare(now, base, repeat([5, 6, 7, 8]), 2, said.append, arms)
        different = compare(now, other, repeat([5, 6, 7, 8]), 2, said.append, arms)
    assert list(same) == ["off, 1 at once", "adaptive, 1 at once"] and len(said) == 4
    assert all(row["identical"] == 1.0 and len(row["ratios"]) == 2 for row in same.values())
    assert all(row["identical"] == 0.0 for row in different.values())
