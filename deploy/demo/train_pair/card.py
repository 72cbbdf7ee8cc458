"""The model card of the pair: what it is, how it came to be, what was measured.

Knows nothing of how training works. Invariant: every number on it is measured on the files that it lies
beside.
"""

import os
import platform
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from deploy.demo.train_pair.batches import (
    ANSWERS_SHARE,
    DRAFT_WEIGHTS,
    LENGTH,
    NUM_ROWS,
    RECITAL_WEIGHTS,
    TARGET_WEIGHTS,
)
from deploy.demo.train_pair.fit import Report
from deploy.demo.train_pair.measure import CONTEXT_TOKENS, DomainMeasure, measure_domains, pass_seconds
from deploy.demo.train_pair.models import load_pretrained
from deploy.demo.train_pair.tokens import load_tokenizer

PHASES = {"target": TARGET_WEIGHTS, "recital": RECITAL_WEIGHTS, "draft": {0: DRAFT_WEIGHTS}}
CARD = Path(__file__).with_name("card.md")


def write_card(out: Path, reports: dict[str, Report]) -> None:
    """Measure the pair in `out` and write `README.md` beside it."""
    target, draft = load_pretrained(out / "target"), load_pretrained(out / "draft")
    measured = measure_domains(target, draft, load_tokenizer(out / "target"))
    text = CARD.read_text(encoding="utf-8").format(
        shape=_shape(target, draft),
        python=platform.python_version(),
        weights="\n".join(row for name, phases in PHASES.items() for row in _phases(name, phases)),
        answers_percent=round(100 * ANSWERS_SHARE),
        training="\n".join(_training(name, report) for name, report in reports.items()),
        today=date.today().isoformat(),
        threads=os.cpu_count(),
        processor=platform.machine(),
        torch=torch.__version__,
        context=CONTEXT_TOKENS,
        costs="\n".join(_costs(target, draft, threads) for threads in (1, 2)),
        acceptance="\n".join(
            f"| {name} | {row.acceptance_rate:.3f} | {row.num_tokens} |" for name, row in measured.items()
        ),
        samples="\n".join(_sample(name, row) for name, row in measured.items()),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def _shape(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> str:
    rows = (
        ("layers", *(model.config.num_hidden_layers for model in (target, draft))),
        ("parameters", *(f"{model.num_parameters():,}" for model in (target, draft))),
        (
            "embeddings",
            *("tied" if model.config.tie_word_embeddings else "untied" for model in (target, draft)),
        ),
    )
    return "\n".join(f"| {name} | {left} | {right} |" for name, left, right in rows)


def _training(name: str, report: Report) -> str:
    minutes = round(report.elapsed_s / 60)
    return f"| {name} | {report.num_steps} | {NUM_ROWS} x {LENGTH} | {minutes} | {report.loss:.3f} |"


def _costs(target: LlamaForCausalLM, draft: LlamaForCausalLM, num_threads: int) -> str:
    costs = [1000 * pass_seconds(model, num_threads=num_threads) for model in (target, draft)]
    return f"| {num_threads} thread(s) | {costs[0]:.2f} ms | {costs[1]:.2f} ms | {costs[0] / costs[1]:.1f} |"


def _phases(name: str, phases: Mapping[int, Mapping[str, int]]) -> list[str]:
    return [f"| {name} | {start} | {_weights(weights)} |" for start, weights in phases.items()]


def _weights(weights: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {weight}" for name, weight in weights.items())


def _sample(name: str, measure: DomainMeasure) -> str:
    asked = measure.prompt.messages[0]["content"]
    return f"\n### {name}\n> {asked}\n\n~~~text\n{measure.answer}\n~~~"
