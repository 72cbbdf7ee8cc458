"""The shapes of the pair, fresh with random weights, and how trained ones are written.

Knows nothing of training. Invariant: a folder under its final name is complete; both models share one
vocabulary.
"""

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.demo.train_pair.tokens import MAX_LENGTH

NUM_TARGET_LAYERS, WIDTH = 16, 192


def new_target(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A deep and narrow target with tied embeddings: depth is what makes a pass cost."""
    return LlamaForCausalLM(small_llama(tokenizer, NUM_TARGET_LAYERS, WIDTH, tied=True))


def new_draft(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A draft of one layer; its untied embeddings can be adapted apart."""
    return LlamaForCausalLM(small_llama(tokenizer, 1, WIDTH, tied=False))


def save_pretrained(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a bfloat16 copy of the model with its tokenizer; the folder appears whole or not at all."""
    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    copy = LlamaForCausalLM(model.config)
    copy.bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for file in aside.iterdir():
        file.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def load_pretrained(folder: Path) -> LlamaForCausalLM:
    """A written model in float32, ready to answer."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False)
    return model


def small_llama(
    tokenizer: PreTrainedTokenizerFast, num_layers: int, width: int, *, tied: bool
) -> LlamaConfig:
    """Heads are 32 wide and share two pairs of keys and values, one where their number is odd."""
    num_heads = width // 32
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=1 if num_heads % 2 else 2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
