"""The rows that lm-eval is asked to score, and where it is installed a whole run on a tiny pair."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.lm_eval import ANSWER, CHOICE, NUM_CHOICES, LmEvalPlan, measure_lm_eval, write_tasks
from deploy.demo.question_rows import DataError
from tests.support.ports import free_port
from tests.support.tiny_models import save_tiny_pair

PROGRAM = shutil.which("lm_eval")


def plan_over(folder: Path, num_responses: int, target: str = "", draft: str = "") -> LmEvalPlan:
    folder.mkdir()
    asked = [
        {"prompt": f"question {number}?", "response": f"{number} foxes"} for number in range(num_responses)
    ]
    (folder / "a.jsonl").write_text(
        "\n".join(map(json.dumps, [*asked, {"prompt": "x" * 999, "response": "y"}]))
    )
    return LmEvalPlan(target, draft, folder, PROGRAM or "", num_rows=6, port=free_port())


def test_each_row_has_its_own_response_among_others_of_the_file(tmp_path: Path) -> None:
    write_tasks(tmp_path, plan_over(tmp_path / "data", 9))
    rows = [json.loads(line) for line in (tmp_path / f"{CHOICE}.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {len(set(row["choices"])) for row in rows} == {NUM_CHOICES}
    for row in rows:
        assert row["choices"][row["answer"]] == row["response"]
        assert row["question"].split()[1].rstrip("?") == row["response"].split()[0]
    assert len({row["answer"] for row in rows}) > 1, "a task whose answer is always the same scores nothing"
    assert (tmp_path / f"{ANSWER}.jsonl").read_text() == (tmp_path / f"{CHOICE}.jsonl").read_text()
    for task in (CHOICE, ANSWER):
        described = json.loads((tmp_path / f"{task}.yaml").read_text())
        assert described["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / f"{task}.jsonl")


def test_a_folder_with_too_few_responses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing was measured"):
        write_tasks(tmp_path, plan_over(tmp_path / "data", NUM_CHOICES - 1))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(PROGRAM is None, reason="no lm-eval here")
@pytest.mark.timeout(600)
def test_speculation_changes_no_score(tmp_path: Path) -> None:
    found = measure_lm_eval(plan_over(tmp_path / "data", 9, *save_tiny_pair(tmp_path)), lambda line: None)
    assert found["scores_equal"] and found["answers_equal"]
    assert found["largest_loglikelihood_difference"] < 1e-3
    assert found["num_draft_tokens"]["off"] == 0 < found["num_draft_tokens"]["on"]
