"""Training batches: documents packed into rows, drawn anew for each step.

Knows nothing of models. Invariant: a batch follows from (seed, step) alone, so a resumed run sees what an
unbroken one would have seen; every row begins with a document.

B rows, T tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from deploy.demo.corpus import SAMPLERS, Prompt, split_of
from deploy.demo.domains.stdlib import functions, module_names, reference_passages
from deploy.demo.train_pair.tokens import answer_ids, prompt_ids

NUM_ROWS, LENGTH = 16, 256
TARGET_WEIGHTS: Mapping[int, Mapping[str, int]] = {
    0: {"prose": 34, "code": 16, "maths": 19, "sql": 13, "chat": 10, "raw code": 5, "raw prose": 3},
    600: {"prose": 40, "code": 8, "maths": 30, "sql": 6, "chat": 10, "raw code": 2, "raw prose": 4},
    1100: {"prose": 52, "code": 3, "maths": 34, "sql": 3, "chat": 2, "raw code": 1, "raw prose": 5},
}
"""The weights of documents from a step on: what the target learns first gives way to what takes longer."""

RECITAL_WEIGHTS: Mapping[int, Mapping[str, int]] = {
    0: {"other prose": 58, "prose": 16, "maths": 18, "code": 2, "sql": 2, "chat": 2, "raw prose": 2},
    235: {"other prose": 20, "prose": 5, "maths": 40, "code": 11, "sql": 4, "chat": 20},
    337: {"other prose": 18, "prose": 5, "maths": 28, "code": 11, "sql": 5, "chat": 33},
}
DRAFT_WEIGHTS: Mapping[str, int] = {"prose": 90, "raw prose": 10}
ANSWERS_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids and, for each, whether the model learns to predict it."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows of token ids; `learned_BT[b, t]` says that the token at t is predicted from those before it."""

    ids_BT: torch.Tensor
    learned_BT: torch.Tensor

    def shards(self, num_shards: int) -> list["PackedBatch"]:
        """The batch cut into parts of about equal numbers of rows."""
        parts = zip(self.ids_BT.chunk(num_shards), self.learned_BT.chunk(num_shards), strict=True)
        return [PackedBatch(*part) for part in parts]

    def to(self, device: str) -> "PackedBatch":
        return PackedBatch(self.ids_BT.to(device), self.learned_BT.to(device))


Draw = Callable[[Random], Document]


def batch_at(step: int, draw: Draw, *, seed: int, num_rows: int, length: int) -> PackedBatch:
    """The batch [B, T] of a step."""
    rng = Random(f"{seed}:{step}")
    rows = [_row(draw, rng, length) for _ in range(num_rows)]
    return PackedBatch(
        torch.tensor([row.ids for row in rows]), torch.tensor([row.learned for row in rows], dtype=torch.bool)
    )


def corpus_draw(tokenizer: PreTrainedTokenizerFast, weights: Mapping[str, int]) -> Draw:
    """Draws documents of the training split: requests with answers of a domain, or raw text."""

    def draw(rng: Random) -> Document:
        name = rng.choices(list(weights), list(weights.values()))[0]
        if name in RAW:
            return _raw_document(tokenizer, RAW[name](rng))
        if name == "other prose":
            return chat_document(tokenizer, prompt_of("prose", rng, ("replay", "heldout")))
        return chat_document(tokenizer, prompt_of(name, rng))

    return draw


def phased_draw(
    step: int, tokenizer: PreTrainedTokenizerFast, phases: Mapping[int, Mapping[str, int]]
) -> Draw:
    """Draws documents by the weights that hold at a step."""
    return corpus_draw(tokenizer, phases[max(start for start in phases if start <= step)])


def answered_draw(documents: list[Document], other: Draw, share: float) -> Draw:
    """Draws one of the documents with probability `share`, else from the other source."""

    def draw(rng: Random) -> Document:
        return rng.choice(documents) if rng.random() < share else other(rng)

    return draw


def chat_document(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> Document:
    """A request with its answer, of which only the answer is learned."""
    asked, answered = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, prompt.answer)
    return Document(asked + answered, [False] * len(asked) + [True] * len(answered))


def prompt_of(domain: str, rng: Random, splits: tuple[str, ...] = ("train",)) -> Prompt:
    """A prompt of a domain from any of the splits."""
    while True:
        sample = SAMPLERS[domain](rng)
        if split_of(sample.key) in splits:
            return Prompt(domain, sample.key, ({"role": "user", "content": sample.request},), sample.answer)


def _row(draw: Draw, rng: Random, length: int) -> Document:
    ids: list[int] = []
    learned: list[bool] = []
    while len(ids) < length:
        document = draw(rng)
        ids += document.ids
        learned += document.learned
    return Document(ids[:length], learned[:length])


def _raw_document(tokenizer: PreTrainedTokenizerFast, text: str) -> Document:
    ids = [tokenizer.bos_token_id, *answer_ids(tokenizer, text)]
    return Document(ids, [False] + [True] * (len(ids) - 1))


def _function(rng: Random) -> str:
    while True:
        sources = functions(rng.choice(module_names()))
        if sources:
            return rng.choice(sources)


def _passage(rng: Random) -> str:
    while True:
        passage = rng.choice(reference_passages())
        if split_of(passage.key) == "train":
            return passage.text


RAW: Mapping[str, Callable[[Random], str]] = {"raw code": _function, "raw prose": _passage}
