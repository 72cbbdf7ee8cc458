"""The measure of structured output: what it lists and bounds, and that it sees a wrong answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import structured
from benchmarks.structured import bounded, measure_cost, measure_suite, suite
from serving.local import load_engine
from serving.options import EngineOptions
from tests.support.tiny_models import save_tiny_pair

GROUPS: list[dict[str, Any]] = [
    {
        "description": "one of three",
        "schema": {"enum": ["a", 2, None]},
        "tests": [{"data": "a", "valid": True}, {"data": "b", "valid": False}],
    },
    {"description": "no", "schema": {"not": {"type": "string"}}, "tests": [{"data": 1, "valid": True}]},
    {"description": "old", "schema": {"extends": {}}, "tests": [{"data": 1, "valid": True}]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "draft4").mkdir()
    (tmp_path / "draft4" / "enum.json").write_text(json.dumps(GROUPS))
    return tmp_path


def test_cases_are_named_by_file_group_and_test(folder: Path) -> None:
    names = [case.name for case in suite(folder)]
    assert names == ["draft4/enum.json#0.0", "draft4/enum.json#0.1", "draft4/enum.json#1.0"]
    with pytest.raises(FileNotFoundError, match="draft4"):
        list(suite(folder / "draft4"))


def test_texts_and_lists_are_bounded_wherever_the_schema_does_not() -> None:
    made = bounded({"properties": {"a": {"minLength": 30}, "b": {"items": {"type": "string"}}}})
    assert made["properties"]["a"]["maxLength"] == 30
    assert made["properties"]["b"]["items"]["maxLength"] == structured.MAX_LENGTH
    assert made["maxItems"] == structured.MAX_ITEMS
    assert "maxLength" not in bounded({"enum": ["long enough to be cut"]})


def test_answers_are_counted_and_a_wrong_one_is_seen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = save_tiny_pair(tmp_path / "pair")
    with load_engine(
        target, draft, EngineOptions(num_slots=8, max_seq_len=400, num_draft_tokens=3)
    ) as engine:
        found = measure_suite(engine, list(suite(folder)), 12, print)
        assert found["case_ids"] == ["draft4/enum.json#0.0", "draft4/enum.json#0.1"]
        assert list(found["refused"]) == ["draft4/enum.json#1.0"]
        for judged in (found["temperature 0"], found["temperature 1"]):
            assert (judged["num_ended"], judged["num_valid"], judged["num_identical"]) == (2, 2, 2)
            assert judged["num_draft_tokens"] > 0
        monkeypatch.setattr(structured, "_text", lambda engine, answer: '"b"')
        again = measure_suite(engine, list(suite(folder)), 12, print, temperatures=(0.0,))
        assert again["temperature 0"]["num_valid"] == 0
        cost = measure_cost(engine, 1, 4, print)
        assert len(cost) == 8 and all(each["seconds_over_plain"] > 0 for each in cost.values())
