"""The benchmark's pair: a target trained on the four domains, a draft trained on general English alone.

Kept outside the tree, seeded; a run that was killed goes on where it was, and no stage is done twice.
Invariant: a model folder under its final name is complete, and nothing of the splits `stream` and `heldout`
was ever trained on.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.osd.corpus import DOMAINS, exchanges, general_english
from deploy.demo.train_pair.batches import Document, Draw, batch_at
from deploy.demo.train_pair.fit import Budget, fit, optimizers_for
from deploy.demo.train_pair.losses import next_token_loss
from deploy.demo.train_pair.models import save_pretrained, small_llama
from deploy.demo.train_pair.tokens import byte_level_bpe, chat_ids, load_tokenizer

NUM_ROWS, ROW_TOKENS = 16, 256
RATE = 3e-3


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model's size follows from; see `small_llama`."""

    num_layers: int
    width: int


@dataclass(frozen=True, slots=True)
class PairPlan:
    """How large a pair, learnt from which folder, in how many minutes, and where it is kept."""

    data: Path
    out: Path
    target: Shape = Shape(22, 192)
    draft: Shape = Shape(1, 128)
    vocab_size: int = 8192
    target_minutes: float = 55.0
    draft_minutes: float = 6.0
    num_threads: int = 2
    device: str = "cpu"
    seed: int = 0

    def folder(self, name: str) -> Path:
        return self.out / name


def train_pair(plan: PairPlan, report: Callable[[str], None] = print) -> None:
    """Train what is missing of tokenizer, draft and target, in this order. Raises CorpusError."""
    tokenizer = _tokenizer(plan, report)
    if not plan.folder("draft").exists():
        _train(plan, "draft", plan.draft, _english_draw(plan, tokenizer), tokenizer, report)
    if not plan.folder("target").exists():
        _train(plan, "target", plan.target, _domain_draw(plan, tokenizer), tokenizer, report)


def _train(
    plan: PairPlan,
    name: str,
    shape: Shape,
    draw: Draw,
    tokenizer: PreTrainedTokenizerFast,
    report: Callable[[str], None],
) -> None:
    is_target = name == "target"
    torch.manual_seed(plan.seed + is_target)
    model = LlamaForCausalLM(small_llama(tokenizer, shape.num_layers, shape.width, tied=is_target))
    nn.Module.to(model, plan.device)
    report(f"{name}: {asdict(shape)}, {sum(weight.numel() for weight in model.parameters()):,} parameters")

    def losses_at(step: int) -> list[Callable[[], torch.Tensor]]:
        batch = batch_at(step, draw, seed=plan.seed, num_rows=NUM_ROWS, length=ROW_TOKENS)
        shards = batch.to(plan.device).shards(plan.num_threads)
        return [partial(next_token_loss, model, shard) for shard in shards]

    budget = Budget(10**6, plan.target_minutes if is_target else plan.draft_minutes)
    optimizers = optimizers_for(model, matrix_rate=RATE, other_rate=RATE)
    fitted = fit(model, losses_at, optimizers, budget, plan.out / f"{name}.pt")
    save_pretrained(model, tokenizer, plan.folder(name))
    report(f"{name}: {fitted.num_steps} steps in {fitted.elapsed_s / 60:.0f} minutes, loss {fitted.loss:.2f}")


def _tokenizer(plan: PairPlan, report: Callable[[str], None]) -> PreTrainedTokenizerFast:
    folder = plan.folder("tokenizer")
    if not folder.exists():
        report(f"tokenizer: {plan.vocab_size} tokens")
        texts = [
            f"{row.question}\n{row.answer}"
            for domain in DOMAINS
            for row in exchanges(plan.data, domain, "train")
        ]
        byte_level_bpe([*texts, *general_english(plan.data)], plan.vocab_size).save_pretrained(folder)
    return load_tokenizer(folder)


def _domain_draw(plan: PairPlan, tokenizer: PreTrainedTokenizerFast) -> Draw:
    """A request with its answer, every domain as often; question and answer are both learnt."""
    documents = {domain: _documents(plan, domain, tokenizer) for domain in DOMAINS}
    return lambda rng: rng.choice(documents[rng.choice(DOMAINS)])


def _documents(plan: PairPlan, domain: str, tokenizer: PreTrainedTokenizerFast) -> list[Document]:
    found = []
    for row in exchanges(plan.data, domain, "train"):
        asked = chat_ids(tokenizer, {"role": "user", "content": row.question})
        ids = [*asked, *tokenizer.encode(row.answer, add_special_tokens=False), tokenizer.eos_token_id]
        found.append(Document(ids[:ROW_TOKENS], [False, *[True] * (len(ids) - 1)][:ROW_TOKENS]))
    return found


def _english_draw(plan: PairPlan, tokenizer: PreTrainedTokenizerFast) -> Draw:
    texts = general_english(plan.data)
    special = tokenizer.bos_token_id, tokenizer.eos_token_id

    def draw(rng: Random) -> Document:
        ids = [special[0], *tokenizer.encode(rng.choice(texts), add_special_tokens=False), special[1]]
        return Document(ids, [False, *[True] * (len(ids) - 1)])

    return draw
