"""The stages of training the pair: tokenizer and target, then the draft, then the card.

Knows nothing of losses or text. Invariant: a stage reads only what the stages before it wrote.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.demo.train_pair.answers import greedy_answers
from deploy.demo.train_pair.batches import (
    ANSWERS_SHARE,
    DRAFT_WEIGHTS,
    LENGTH,
    NUM_ROWS,
    RECITAL_WEIGHTS,
    TARGET_WEIGHTS,
    Document,
    PackedBatch,
    answered_draw,
    batch_at,
    corpus_draw,
    phased_draw,
    prompt_of,
)
from deploy.demo.train_pair.card import write_card
from deploy.demo.train_pair.fit import Budget, Report, fit, optimizers_for
from deploy.demo.train_pair.losses import distillation_loss, next_token_loss
from deploy.demo.train_pair.models import load_pretrained, new_draft, new_target, save_pretrained
from deploy.demo.train_pair.tokens import load_tokenizer, prompt_ids, train_tokenizer

NUM_ANSWERS = 800


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Where a training run writes, and what it may spend."""

    out: Path
    work: Path
    seed: int
    num_threads: int
    target_budget: Budget
    recital_budget: Budget
    draft_budget: Budget


def train_target(plan: TrainingPlan) -> None:
    """Train the target on every domain and write it."""
    torch.manual_seed(plan.seed)
    tokenizer = _tokenizer(plan)
    target = new_target(tokenizer)
    batches = _Batches(tokenizer, TARGET_WEIGHTS, plan.seed, plan.num_threads)
    report = _learn_documents(target, batches, 3e-3, plan.target_budget, plan.work / "target.pt")
    save_pretrained(target, tokenizer, plan.out / "target")
    _note(plan, "target", report)


def recite_prose(plan: TrainingPlan) -> None:
    """Teach the trained target the prose that the demo asks for; the draft never sees it."""
    torch.manual_seed(plan.seed + 2)
    tokenizer, target = _tokenizer(plan), load_pretrained(plan.out / "target")
    target.requires_grad_(True)
    batches = _Batches(tokenizer, RECITAL_WEIGHTS, plan.seed + 2, plan.num_threads)
    report = _learn_documents(target, batches, 1.5e-3, plan.recital_budget, plan.work / "recital.pt")
    save_pretrained(target, tokenizer, plan.out / "target")
    _note(plan, "recital", report)


def train_draft(plan: TrainingPlan) -> None:
    """Train the draft on prose alone, to say what the target says there, and write it."""
    torch.manual_seed(plan.seed + 1)
    tokenizer, target = _tokenizer(plan), load_pretrained(plan.out / "target")
    draft = new_draft(tokenizer)
    documents = _answered_prose(plan, target, tokenizer)
    draw = answered_draw(documents, corpus_draw(tokenizer, DRAFT_WEIGHTS), ANSWERS_SHARE)
    batch = partial(batch_at, draw=draw, seed=plan.seed, num_rows=NUM_ROWS, length=LENGTH)
    optimizers = optimizers_for(draft, matrix_rate=3e-3, other_rate=3e-3)
    report = fit(
        draft,
        lambda step: [
            partial(distillation_loss, draft, target, part) for part in batch(step).shards(plan.num_threads)
        ],
        optimizers,
        plan.draft_budget,
        plan.work / "draft.pt",
    )
    save_pretrained(draft, tokenizer, plan.out / "draft")
    _note(plan, "draft", report)


def write_model_card(plan: TrainingPlan) -> None:
    """Measure the written pair and describe it."""
    reports = json.loads((plan.work / "reports.json").read_text(encoding="utf-8"))
    write_card(plan.out, {name: Report(**report) for name, report in reports.items()})


@dataclass(frozen=True, slots=True)
class _Batches:
    tokenizer: PreTrainedTokenizerFast
    phases: Mapping[int, Mapping[str, int]]
    seed: int
    num_shards: int

    def shards(self, step: int) -> list[PackedBatch]:
        draw = phased_draw(step, self.tokenizer, self.phases)
        return batch_at(step, draw, seed=self.seed, num_rows=NUM_ROWS, length=LENGTH).shards(self.num_shards)


def _learn_documents(
    target: LlamaForCausalLM, batches: _Batches, rate: float, budget: Budget, checkpoint: Path
) -> Report:
    def losses_at(step: int) -> list[Callable[[], torch.Tensor]]:
        return [partial(next_token_loss, target, shard) for shard in batches.shards(step)]

    optimizers = optimizers_for(target, matrix_rate=rate, other_rate=rate)
    return fit(target, losses_at, optimizers, budget, checkpoint)


def _tokenizer(plan: TrainingPlan) -> PreTrainedTokenizerFast:
    folder = plan.work / "tokenizer"
    if not folder.exists():
        train_tokenizer(plan.seed).save_pretrained(folder)
    return load_tokenizer(folder)


def _answered_prose(
    plan: TrainingPlan, target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> list[Document]:
    file = plan.work / "answers.json"
    if not file.exists():
        rng = Random(plan.seed)
        asked = [prompt_ids(tokenizer, prompt_of("prose", rng)) for _ in range(NUM_ANSWERS)]
        file.write_text(json.dumps([asked, greedy_answers(target, tokenizer, asked)]), encoding="utf-8")
    pairs = zip(*json.loads(file.read_text(encoding="utf-8")), strict=True)
    return [Document(asked + answer, [False] * len(asked) + [True] * len(answer)) for asked, answer in pairs]


def _note(plan: TrainingPlan, name: str, report: Report) -> None:
    file = plan.work / "reports.json"
    reports = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**reports, name: asdict(report)}), encoding="utf-8")


STAGES: Mapping[str, Callable[[TrainingPlan], None]] = {
    "target": train_target,
    "recital": recite_prose,
    "draft": train_draft,
    "card": write_model_card,
}
