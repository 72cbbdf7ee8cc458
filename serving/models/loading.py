"""Target and draft from a path or hub id, and a clear refusal of what cannot work.

The slot cache needs models whose whole state is keys and values at absolute positions, and an attention
that takes a boolean mask as it is (sdpa). Everything else is refused before the first request.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNSAFE_ROPE = ("dynamic", "longrope")


class UnsupportedModelError(ValueError):
    """The model cannot be served; the message says why and what would work."""


@dataclass(frozen=True)
class ModelPair:
    """A target, perhaps a draft, and what must agree between them."""

    target: nn.Module
    draft: nn.Module | None
    tokenizer: Any | None
    """A transformers tokenizer; None where the target's folder has none (token ids only)."""
    target_id: str
    draft_id: str
    target_revision: str
    draft_revision: str
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_positions: int
    """Longest context that both models take."""


def load_pair(
    target: str, draft: str | None = None, *, device: str = "cpu", dtype: str = "float32"
) -> ModelPair:
    """Load and check both models. Raises UnsupportedModelError, or OSError for a path that is none."""
    target_model = load_model(target, device=device, dtype=dtype)
    draft_model = load_draft(draft, device=device, dtype=dtype) if draft else None
    tokenizer = _load_tokenizer(target)
    longest = max_positions(target_model)
    if draft is not None and draft_model is not None:
        _check_same_vocabulary(target, target_model, tokenizer, draft, draft_model)
        longest = min(longest, max_positions(draft_model))
    return ModelPair(
        target=target_model,
        draft=draft_model,
        tokenizer=tokenizer,
        target_id=target,
        draft_id=draft or "",
        target_revision=weights_revision(target_model),
        draft_revision=weights_revision(draft_model) if draft_model is not None else "",
        eos_token_ids=_eos_token_ids(target_model, tokenizer),
        vocab_size=_config(target_model).vocab_size,
        max_positions=longest,
    )


def load_draft(draft: str, *, device: str = "cpu", dtype: str = "float32") -> nn.Module:
    """The draft as shipped: the floor, and the base of every adapter."""
    return load_model(draft, device=device, dtype=dtype)


def load_model(name: str, *, device: str = "cpu", dtype: str = "float32") -> nn.Module:
    """A causal language model in eval mode without gradients, refused if it cannot work."""
    if dtype not in _DTYPES:
        raise UnsupportedModelError(f"dtype={dtype!r} is none of {sorted(_DTYPES)}; nothing was loaded")
    check_config(name, AutoConfig.from_pretrained(name))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=_DTYPES[dtype], attn_implementation="sdpa"
        )
    except ValueError as error:
        raise UnsupportedModelError(
            f"model {name!r} has no sdpa attention, and eager attention adds a boolean mask "
            f"instead of applying it, which is silently wrong: {error}"
        ) from error
    check_attention(name, model)
    loaded: nn.Module = model.to(device).eval().requires_grad_(False)
    return loaded


def load_outline(name: str, *, dtype: str = "float32") -> nn.Module:
    """The model's shapes without its weights, on the meta device: reads its configuration alone."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(name), dtype=_DTYPES[dtype]
        )
    return model


def check_attention(name: str, model: nn.Module) -> None:
    """Refuse any attention but sdpa, e.g. eager, which would add the boolean mask."""
    implementation = getattr(_config(model), "_attn_implementation", None)
    if implementation != "sdpa":
        raise UnsupportedModelError(
            f"model {name!r} runs attn_implementation={implementation!r}; only 'sdpa' applies the engine's "
            "boolean mask as it is (eager adds it, silently wrong). Load it with sdpa."
        )


def check_config(name: str, config: Any) -> None:
    """Refuse what keys and values at absolute positions cannot represent."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"model {name!r} is an encoder-decoder; only decoder-only models work.")
    layer_types = set(getattr(text, "layer_types", None) or ())
    sliding = "sliding_attention" in layer_types or "chunked_attention" in layer_types
    if not layer_types and getattr(text, "sliding_window", None):
        sliding = getattr(text, "use_sliding_window", True)
    if sliding:
        raise UnsupportedModelError(
            f"model {name!r} uses sliding-window attention (sliding_window="
            f"{getattr(text, 'sliding_window', None)}); the engine's masks bypass the window, so its text "
            "would be wrong. Use a model with full attention."
        )
    recurrent = layer_types - {"full_attention"}
    if recurrent or not getattr(text, "num_attention_heads", None):
        raise UnsupportedModelError(
            f"model {name!r} ({config.model_type}) has recurrent or linear-attention layers "
            f"{sorted(recurrent)}; their state cannot be rolled back after a rejected draft."
        )
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    rope_type = str(rope.get("rope_type", rope.get("type", "default")))
    if rope_type in _UNSAFE_ROPE:
        raise UnsupportedModelError(
            f"model {name!r} uses rope_type={rope_type!r}, whose frequencies depend on the longest sequence "
            "of the batch: batch mates would change the text. Disable the scaling."
        )


def weights_revision(model: nn.Module) -> str:
    """sha256 over names, shapes and float32 values of the weights; the same whatever dtype holds them
    exactly, so a bfloat16 file and its float32 load agree."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def max_positions(model: nn.Module) -> int:
    """Longest context that the model takes."""
    return int(getattr(_config(model), "max_position_embeddings", 0) or 2**20)


def _load_tokenizer(name: str) -> Any | None:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError):
        # A folder without tokenizer files serves token ids only; a hub id always has them.
        if Path(name).is_dir():
            return None
        raise


def _eos_token_ids(model: nn.Module, tokenizer: Any | None) -> tuple[int, ...]:
    generation_config = getattr(model, "generation_config", None)
    found = getattr(generation_config, "eos_token_id", None)
    if found is None:
        found = getattr(_config(model), "eos_token_id", None)
    ids = [] if found is None else [found] if isinstance(found, int) else list(found)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(sorted(set(ids)))


def _check_same_vocabulary(
    target_name: str, target: nn.Module, tokenizer: Any | None, draft_name: str, draft: nn.Module
) -> None:
    """Equal tokenizers, or for lack of them equal sizes. Embedding rows may be padded differently."""
    draft_tokenizer = _load_tokenizer(draft_name)
    target_size, draft_size = _config(target).vocab_size, _config(draft).vocab_size
    if tokenizer is not None and draft_tokenizer is not None:
        if tokenizer.get_vocab() != draft_tokenizer.get_vocab():
            raise UnsupportedModelError(
                f"draft {draft_name!r} and target {target_name!r} have different vocabularies "
                f"({len(draft_tokenizer)} and {len(tokenizer)} tokens, not the same words); "
                "a drafted id would mean another word. Use a draft of the same tokenizer."
            )
    elif target_size != draft_size:
        raise UnsupportedModelError(
            f"draft {draft_name!r} has vocab_size={draft_size}, target {target_name!r} has {target_size}, "
            "and no tokenizers to compare; a drafted id would mean another word."
        )
