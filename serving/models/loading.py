"""Loads target and draft from a path or hub id, complete and finite, or refuses them with the reason.

Checks that need no weights come first (`inspection`, `refusals`). Invariant: every weight of a returned model
was in the checkpoint's files, and all its values are finite in the requested dtype.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from serving.models.context_limit import hold_frequencies
from serving.models.errors import UnsupportedModelError, first_few, refusing
from serving.models.inspection import (
    InspectedModel,
    head_key,
    inspect_model,
    inspect_pair,
    text_config,
    without_small_head,
)
from serving.models.kept_head import D2T, num_rows, shrink_head
from serving.models.part_fit import fitted
from serving.models.refusals import DTYPES, check_account, check_attention, check_config, check_device
from serving.models.target_part import TargetPart

__all__ = [
    "ModelPair",
    "UnsupportedModelError",
    "check_attention",
    "check_config",
    "load_draft",
    "load_model",
    "load_outline",
    "load_outlines",
    "load_pair",
    "untie",
    "weights_revision",
]


@dataclass(frozen=True)
class ModelPair:
    """A target, optionally a draft, and properties that must agree between them."""

    target: nn.Module
    draft: nn.Module | None
    """A model, or a part of the target (`TargetPart.of` tells), which shares modules with it."""
    tokenizer: Any | None
    """A transformers tokenizer; None where the target's folder has none (token ids only)."""
    target_id: str
    draft_id: str
    target_revision: str
    draft_revision: str
    eos_token_ids: tuple[int, ...]
    vocab_size: int

    @property
    def named(self) -> list[tuple[str, nn.Module]]:
        """(id, model) of both."""
        draft = [] if self.draft is None else [(self.draft_id, self.draft)]
        return [(self.target_id, self.target), *draft]


def load_pair(
    target: str,
    draft: str | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    untie_draft: bool = False,
) -> ModelPair:
    """Check and load both models; `draft` may name a part of the target, see TargetPart. `untie_draft`: see
    `untie`. Raises UnsupportedModelError."""
    check_device(device)
    inspected = inspect_pair(target, draft, dtype=dtype)
    target_model = _load(inspected.target, device=device, dtype=dtype)
    target_revision = weights_revision(target_model)
    draft_model, draft_revision = None, ""
    if inspected.part is not None:
        draft_model = inspected.part.build(target_model)
        draft_revision = inspected.part.revision(target_revision)
        fitted(draft_model, target_model, inspected.tokenizer, draft_revision)
    elif inspected.draft is not None:
        draft_model = _load(inspected.draft, device=device, dtype=dtype)
        draft_revision = weights_revision(draft_model)
        if untie_draft and untie(draft_model):
            draft_revision = hashlib.sha256(f"{draft_revision} untied".encode()).hexdigest()
    return ModelPair(
        target=target_model,
        draft=draft_model,
        tokenizer=inspected.tokenizer,
        target_id=target,
        draft_id=draft or "",
        target_revision=target_revision,
        draft_revision=draft_revision,
        eos_token_ids=_eos_token_ids(target_model, inspected.tokenizer),
        vocab_size=text_config(target_model).vocab_size,
    )


def load_draft(draft: str, *, device: str = "cpu", dtype: str = "float32") -> nn.Module:
    """The draft as shipped: the floor, and the base of every adapter."""
    return load_model(draft, device=device, dtype=dtype)


def load_model(name: str, *, device: str = "cpu", dtype: str = "float32") -> nn.Module:
    """A causal language model in eval mode without gradients. Raises UnsupportedModelError."""
    check_device(device)
    return _load(inspect_model(name, dtype=dtype), device=device, dtype=dtype)


def load_outline(name: str, *, dtype: str = "float32") -> nn.Module:
    """The model's shapes without its weights, on the meta device. Raises UnsupportedModelError."""
    return inspect_model(name, dtype=dtype).outline


def load_outlines(
    target: str, draft: str | None, *, dtype: str = "float32", untie_draft: bool = False
) -> tuple[nn.Module, nn.Module | None]:
    """Those of target and draft, which may name a part of the target; see load_pair."""
    outline = load_outline(target, dtype=dtype)
    if (part := TargetPart.named(draft)) is not None:
        return outline, part.build(outline)
    if draft is None:
        return outline, None
    other = load_outline(draft, dtype=dtype)
    if untie_draft:
        untie(other)
    return outline, other


def untie(model: nn.Module) -> bool:
    """Give a model whose head is its embedding a head of its own, a copy, so that each can learn: LoRA on
    what is tied would change both. False where they are two already."""
    model_: Any = model
    head, embedding = model_.get_output_embeddings(), model_.get_input_embeddings()
    if head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model_.config.tie_word_embeddings = text_config(model).tie_word_embeddings = False
    return True


def _load(inspected: InspectedModel, *, device: str, dtype: str) -> nn.Module:
    name = inspected.files.name
    with refusing(name, f"cannot be loaded on device={device!r} as dtype={dtype!r}"):
        found: Any = AutoModelForCausalLM.from_pretrained(
            inspected.files.source,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # `check_account` reports them
            output_loading_info=True,
        )
        model, account = found
        check_account(name, model, without_small_head(model, account))
        if num_rows(text_config(model)) is not None:
            key = head_key(model)
            tensors = inspected.files.tensors((key, D2T))
            if tensors.keys() != {key, D2T}:
                raise ValueError(f"draft_vocab_size is set, and {key} or {D2T} is not in its files here")
            shrink_head(model, text_config(model), {"weight": tensors[key], D2T: tensors[D2T]})
        loaded: nn.Module = model.to(device).eval().requires_grad_(False)
    hold_frequencies(loaded)
    check_attention(name, loaded)
    _check_finite(name, loaded, dtype)
    return loaded


def _check_finite(name: str, model: nn.Module, dtype: str) -> None:
    """Checks minimum and maximum, which are finite only if the whole tensor is; that reads it once and takes
    no memory."""
    weights = {key: weight for key, weight in model.state_dict().items() if weight.is_floating_point()}
    finite = torch.stack([_is_finite(weight) for weight in weights.values()]).tolist()
    if not (broken := {key for key, whole in zip(weights, finite, strict=True) if not whole}):
        return
    hint = ""
    if dtype == "float16":
        hint = ". float16 holds nothing over 65504: dtype='bfloat16' or 'float32' may hold them"
    raise UnsupportedModelError(
        f"model {name!r} has {len(broken)} tensors that are not finite as dtype={dtype!r}: "
        f"{first_few(broken)}; nothing that it says could be used{hint}"
    )


def _is_finite(weight: torch.Tensor) -> torch.Tensor:
    if weight.numel() == 0:
        return torch.tensor(True, device=weight.device)
    low, high = torch.aminmax(weight.float() if weight.itemsize == 1 else weight)
    return torch.isfinite(low) & torch.isfinite(high)


def weights_revision(model: nn.Module) -> str:
    """sha256 over names, shapes and float32 values of the weights; the same whatever dtype holds them
    exactly, so a bfloat16 file and its float32 load agree."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _eos_token_ids(model: nn.Module, tokenizer: Any | None) -> tuple[int, ...]:
    generation_config = getattr(model, "generation_config", None)
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(text_config(model), "eos_token_id", None)
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(sorted(set(ids)))
