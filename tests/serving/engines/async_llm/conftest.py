"""Small models that vLLM's processor backend can run (head_dim 32), and engines on them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from serving.options import EngineOptions

VOCAB_SIZE = 16
"""Small, so that every output can be enumerated."""


@dataclass(frozen=True)
class Models:
    """Folders; both of one shape, so that the target's weights fit into the draft."""

    target: str
    draft: str


def save_model(folder: Path, seed: int, *, tied: bool = False, vocab_size: int = VOCAB_SIZE) -> str:
    """Random, of high entropy but not flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.25 if not tied else 0.15,
        tie_word_embeddings=tied,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Models]:
    made: dict[bool, Models] = {}

    def of(tied: bool) -> Models:
        if tied not in made:
            root = tmp_path_factory.mktemp("tied" if tied else "untied")
            made[tied] = Models(
                save_model(root / "target", 1, tied=tied), save_model(root / "draft", 2, tied=tied)
            )
        return made[tied]

    return of


@contextlib.contextmanager
def engine_on(
    models: Models, *, compiled: bool = False, num_draft_tokens: int | None = 3, **arguments: Any
) -> Iterator[Any]:
    from serving.engines.async_llm.engine import load_async_llm

    options = EngineOptions(
        num_slots=16,
        max_seq_len=128,
        num_draft_tokens=num_draft_tokens,
        compile="on" if compiled else "off",
        prefix_cache_mib=0,
    )
    engine = load_async_llm(models.target, models.draft, options, skip_tokenizer_init=True, **arguments)
    try:
        yield engine
    finally:
        engine.close()
