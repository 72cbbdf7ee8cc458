"""Inspects a model or a pair without its weights: finds in seconds all faults that need no weights.

Read `inspect_model` for the order of the checks. Invariant: no weight is read and nothing is asked
interactively; a model that passes can still be refused at load, for values that are not finite.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from serving.models.errors import UnsupportedModelError, refusing
from serving.models.kept_head import num_rows, shrink_head
from serving.models.model_files import ModelFiles, find_model
from serving.models.refusals import (
    DTYPES,
    check_account,
    check_attention,
    check_code,
    check_config,
    check_dtype,
    quantization,
    text_part,
)
from serving.models.target_part import TargetPart


@dataclass(frozen=True)
class InspectedModel:
    """A model that transformers can load, as far as that is known without weights."""

    files: ModelFiles
    outline: nn.Module
    """The model's modules and shapes, on the meta device."""


@dataclass(frozen=True)
class InspectedPair:
    """Models whose token ids stand for the same tokens."""

    target: InspectedModel
    draft: InspectedModel | None
    part: TargetPart | None
    """The part of the target that is the draft; None if a model is, or nothing."""
    tokenizer: Any | None
    """The target's tokenizer; None if its folder has none (token ids only)."""

    @property
    def named(self) -> list[tuple[str, nn.Module]]:
        """(name, outline) of the models; a part of the target takes what the target takes."""
        return [(each.files.name, each.outline) for each in (self.target, self.draft) if each is not None]


def inspect_model(name: str, *, dtype: str = "float32") -> InspectedModel:
    """Check its files, its configuration, its class, and that the files hold every tensor of the class.
    Raises UnsupportedModelError."""
    check_dtype(dtype)
    files = find_model(name)
    check_code(name, files.config())
    with refusing(name, "has a config.json that transformers cannot read"):
        config = AutoConfig.from_pretrained(files.source, trust_remote_code=False)
        check_config(name, config)
    outline = _outline(name, config, dtype, files.outlined_tensors())
    check_attention(name, outline)
    return InspectedModel(files, outline)


def inspect_pair(target: str, draft: str | None = None, *, dtype: str = "float32") -> InspectedPair:
    """Check both models, and that they share a vocabulary; or that the target has the part that drafts.
    Raises UnsupportedModelError."""
    part = TargetPart.named(draft)
    its_target = inspect_model(target, dtype=dtype)
    its_draft = inspect_model(draft, dtype=dtype) if draft and part is None else None
    tokenizer = load_tokenizer(its_target.files)
    if its_draft is not None:
        _check_same_vocabulary(its_target, tokenizer, its_draft)
    if part is not None:
        part.build(its_target.outline)
    return InspectedPair(its_target, its_draft, part, tokenizer)


def load_tokenizer(files: ModelFiles) -> Any | None:
    """None for a folder without tokenizer files, which serves token ids only. Raises UnsupportedModelError
    for files that are broken, or that need code of their own."""
    if not files.has_tokenizer():
        return None
    with refusing(files.name, "has a tokenizer that cannot be loaded, so its text cannot be read or written"):
        return AutoTokenizer.from_pretrained(files.source, trust_remote_code=False)


def text_config(model: nn.Module) -> Any:
    """The part of a model's configuration that is about text."""
    return text_part(model.config)


def _outline(name: str, config: Any, dtype: str, tensors: dict[str, Tensor]) -> nn.Module:
    """The class by itself, or loaded from outlines of its tensors as transformers would load these: names
    are converted, experts stacked and weights tied as they will be."""
    how: dict[str, Any] = {"dtype": DTYPES[dtype], "attn_implementation": "sdpa"}
    with refusing(name, "does not fit its class in transformers"), _quiet_transformers():
        if not tensors or quantization(config) is not None:
            with torch.device("meta"):
                outline: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **how)
            return outline
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        outline, account = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **how,
        )
        check_account(name, outline, without_small_head(outline, account))
        shrink_head(outline, text_config(outline), {})
    return outline


def without_small_head(model: nn.Module, account: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' account of loading, without the head that it found too small where the configuration says
    so (`draft_vocab_size`)."""
    found = dict(account)
    if num_rows(text_config(model)) is not None:
        found["mismatched_keys"] = {each for each in account["mismatched_keys"] if each[0] != head_key(model)}
    return found


def head_key(model: nn.Module) -> str:
    """Under which a checkpoint has the head's weight."""
    model_: Any = model
    head = model_.get_output_embeddings()
    [name] = [name for name, module in model.named_modules() if module is head]
    return f"{name}.weight"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers' progress bar and table of missing tensors, which our error replaces."""
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


def _check_same_vocabulary(target: InspectedModel, tokenizer: Any | None, draft: InspectedModel) -> None:
    """Require equal tokenizers, or equal sizes if there are none. Embedding rows may be padded
    differently."""
    target_name, draft_name = target.files.name, draft.files.name
    draft_tokenizer = load_tokenizer(draft.files)
    target_size, draft_size = (text_config(model.outline).vocab_size for model in (target, draft))
    if tokenizer is not None and draft_tokenizer is not None:
        if tokenizer.get_vocab() != draft_tokenizer.get_vocab():
            raise UnsupportedModelError(
                f"draft {draft_name!r} and target {target_name!r} have different vocabularies "
                f"({len(draft_tokenizer)} and {len(tokenizer)} tokens, not the same words); "
                "a drafted id would mean another word. Use a draft of the same tokenizer"
            )
    elif target_size != draft_size:
        raise UnsupportedModelError(
            f"draft {draft_name!r} has vocab_size={draft_size}, target {target_name!r} has {target_size}, "
            "and no tokenizers to compare; a drafted id would mean another word"
        )
