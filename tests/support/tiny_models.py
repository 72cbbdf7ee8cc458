"""Tiny random Llama and Qwen3 pairs on disk, with a shared byte-level BPE tokenizer and a chat template."""

from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS_TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }}: "
    "{{ tool.function.description }} {% endfor %}Write <tool_call>.<|end|>{% endif %}"
    "{% for message in messages %}<|{{ 'user' if message['role'] == 'tool' else message['role'] }}|>"
    "{{ message['content'] }}{% for call in message.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Shows tools as Hermes does."""
_SPECIAL_TOKENS = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
_TEXT = [
    "the quick brown fox jumps over the lazy dog while forty-two wizards count to 1,234,567.",
    "def add(a, b):\n    return a + b\n",
    "SELECT name FROM city WHERE population > 1000 ORDER BY name;",
    "Grüße aus Köln: naïve café, señor, 東京, привет, 🙂🙃",
]


def save_tiny_pair(
    folder: Path | str, *, arch: str = "llama", vocab_size: int = 320, seed: int = 0
) -> tuple[str, str]:
    """A target of 3 layers and a draft of 1, random weights. Returns both folders as strings."""
    folder = Path(folder)
    tokenizer = tiny_tokenizer(vocab_size)
    paths = []
    for name, num_layers in (("target", 3), ("draft", 1)):
        torch.manual_seed(seed + num_layers)
        model = tiny_model(arch, num_layers, vocab_size, tokenizer)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        paths.append(str(folder / name))
    return paths[0], paths[1]


def save_tiny_caller(folder: Path | str, answer: list[str]) -> str:
    """A target that answers everything with these pieces of text, each a token of its own, one after the
    other: its layers add nothing, and its head knows what follows each piece. Its template takes tools."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in answer])
    model = tiny_model("llama", 1, len(tokenizer), tokenizer)
    chain = tokenizer.convert_tokens_to_ids(["<|assistant|>", *answer, "<|end|>"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.fill_(0.01)
        head.zero_()
        for axis, (token, following) in enumerate(pairwise(chain)):
            embedding[token, axis] = 1.0
            head[following, axis] = 5.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_model(
    arch: str, num_layers: int, vocab_size: int, tokenizer: PreTrainedTokenizerFast | None = None
) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """Width 32, grouped-query attention; sharp enough (scaled weights) that greedy text varies."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id if tokenizer else None,
        "pad_token_id": tokenizer.pad_token_id if tokenizer else None,
        "bos_token_id": None,
    }
    if arch == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    return Qwen3ForCausalLM(Qwen3Config(**shape))


def tiny_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `vocab_size` tokens (at least 261); any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )
    return wrapped
