"""lm-eval on a whole service, with speculation off and on: the scores that people compare are the same.

lm-eval is a program of its own and asks over REST, as anybody would: which of four responses is the likeliest
through `/v1/completions` (`local-completions`), and a generated one through chat (`local-chat-completions`).
Its tasks are made of the rows of a folder; nothing is fetched.
"""

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from deploy.demo.question_rows import DataError, Exchange, check_folder, rows
from deploy.errors import DeployError
from deploy.settings_source import load_settings
from deploy.wiring import running_system

ARMS = {"off": 0, "on": 3}
"""Draft length, by name."""
CHOICE, ANSWER = "everdraft_choice", "everdraft_answer"
NUM_CHOICES, ANSWER_TOKENS, MAX_SEQ_LEN, NUM_SLOTS = 4, 48, 512, 4
_MAX_QUESTION_CHARS, _MAX_RESPONSE_CHARS = 400, 200
_DRAFTED = "everdraft_spec_decode_num_draft_tokens_total"


class LmEvalError(DeployError, RuntimeError):
    """lm-eval failed; nothing is known of the scores."""


@dataclass(frozen=True)
class LmEvalPlan:
    """What to measure; `program` is lm-eval's."""

    target: str
    draft: str
    data: Path
    program: str
    num_rows: int = 40
    port: int = 8000


def measure_lm_eval(plan: LmEvalPlan, report: Callable[[str], None]) -> dict[str, Any]:
    """Scores by arm, and whether they, the answers and the log-likelihoods are equal. Raises DataError and
    LmEvalError."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        write_tasks(folder, plan)
        found = {arm: _arm(plan, arm, folder, report) for arm in ARMS}
    off, on = (found[arm] for arm in ARMS)
    return {
        "num_rows": plan.num_rows,
        "scores": {arm: each.scores for arm, each in found.items()},
        "num_draft_tokens": {arm: each.num_drafted for arm, each in found.items()},
        "scores_equal": off.scores == on.scores,
        "answers_equal": off.responses[ANSWER] == on.responses[ANSWER],
        "largest_loglikelihood_difference": max(
            abs(one - other) for one, other in zip(off.loglikelihoods, on.loglikelihoods, strict=True)
        ),
    }


@dataclass(frozen=True)
class _Evaluated:
    """What lm-eval found on one service, by task."""

    scores: dict[str, dict[str, float]]
    responses: dict[str, list[Any]]
    """Of each row, as lm-eval logs them."""
    num_drafted: int

    @property
    def loglikelihoods(self) -> list[float]:
        return [float(value) for row in self.responses[CHOICE] for [[value, _]] in row]


def _arm(plan: LmEvalPlan, arm: str, folder: Path, report: Callable[[str], None]) -> _Evaluated:
    serving: dict[str, Any] = {
        "target": plan.target,
        "draft": plan.draft,
        "model_name": "target",
        "num_slots": NUM_SLOTS,
        "max_seq_len": MAX_SEQ_LEN,
        "speculation": "model",
        "num_draft_tokens": ARMS[arm],
        "compile": "off",
    }
    cluster = {"port": plan.port, "state_dir": str(folder / f"state-{arm}"), "learn": False}
    settings = load_settings(None, {}, {"serving": serving, "cluster": cluster, "mlflow": {"enabled": False}})
    with running_system(settings, report) as system:
        report(f"speculation {arm}: lm-eval asks {plan.num_rows} rows of two tasks")
        choice = _run(plan, system.url, folder, folder / arm, CHOICE)
        answer = _run(plan, system.url, folder, folder / arm, ANSWER)
        drafted = _counter(httpx.get(f"{system.url}/metrics").text, _DRAFTED)
    return _Evaluated({CHOICE: choice[0], ANSWER: answer[0]}, {CHOICE: choice[1], ANSWER: answer[1]}, drafted)


def _run(plan: LmEvalPlan, url: str, tasks: Path, out: Path, task: str) -> tuple[dict[str, float], list[Any]]:
    """One task's scores and responses. Log-likelihoods are asked for one after another, because chunks of
    another shape round differently."""
    asks_choice = task == CHOICE
    path = "v1/completions" if asks_choice else "v1/chat/completions"
    arguments = {"model": "target", "base_url": f"{url}/{path}", "num_concurrent": 1 if asks_choice else 4}
    command = [
        plan.program,
        "run",
        "--model",
        "local-completions" if asks_choice else "local-chat-completions",
    ]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--tasks", task, "--include_path", str(tasks), "--output_path", str(out / task)]
    command += ["--log_samples", *([] if asks_choice else ["--apply_chat_template"])]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "hf")}
    ended = subprocess.run(
        command, env={**os.environ, **offline, "OPENAI_API_KEY": "none"}, capture_output=True, text=True
    )
    if ended.returncode != 0:
        raise LmEvalError(f"lm-eval ended with {ended.returncode} on {task}: {ended.stderr[-2000:]}")
    [results] = (out / task).rglob("results_*.json")
    [samples] = (out / task).rglob("samples_*.jsonl")
    scores = json.loads(results.read_text(encoding="utf-8"))["results"][task]
    logged = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return (
        {name.partition(",")[0]: value for name, value in scores.items() if name.endswith(",none")},
        [row["resps"] for row in sorted(logged, key=lambda row: int(row["doc_id"]))],
    )


def _counter(text: str, name: str) -> int:
    """Sum of a counter's samples in Prometheus' text."""
    return int(sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)))


def write_tasks(folder: Path, plan: LmEvalPlan) -> None:
    """The rows of both tasks, and what lm-eval needs to know of them."""
    asked = list(_asked(plan))
    common = {"dataset_path": "json", "test_split": "test", "target_delimiter": "", "num_fewshot": 0}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    answer = {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "response",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "chrf"}],
    }
    for task, own in ((CHOICE, choice), (ANSWER, answer)):
        file = folder / f"{task}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
        described = {"task": task, "dataset_kwargs": {"data_files": {"test": str(file)}}, **common, **own}
        (folder / f"{task}.yaml").write_text(json.dumps(described), encoding="utf-8")  # JSON is YAML


def _asked(plan: LmEvalPlan) -> Iterator[dict[str, Any]]:
    """Rows from the files in turn, each with the responses of three others of its file."""
    chooser = random.Random(0)
    pools = [[row for row in rows(file) if _is_short(row)] for file in check_folder(plan.data)]
    pools = [pool for pool in pools if len({row.answer for row in pool}) >= NUM_CHOICES]
    if not pools:
        raise DataError(
            f"data={plan.data} holds no .jsonl file with {NUM_CHOICES} short `response`s to choose from; "
            "nothing was measured"
        )
    for number in range(plan.num_rows):
        pool = pools[number % len(pools)]
        right = chooser.choice(pool)
        others = sorted({row.answer for row in pool} - {right.answer})
        choices = [right.answer, *chooser.sample(others, NUM_CHOICES - 1)]
        chooser.shuffle(choices)
        yield {
            "question": right.question,
            "response": right.answer,
            "choices": choices,
            "answer": choices.index(right.answer),
        }


def _is_short(row: Exchange) -> bool:
    return len(row.question) <= _MAX_QUESTION_CHARS and 0 < len(row.answer) <= _MAX_RESPONSE_CHARS
