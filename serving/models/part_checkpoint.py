"""Writes a target's first layers, fitted, as an ordinary checkpoint that any engine loads as a draft model.

The map of the fit is folded into the head, which therefore is a weight of its own, whatever the target ties.
"""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serving.models.errors import UnsupportedModelError
from serving.models.inspection import head_key, load_tokenizer, text_config
from serving.models.kept_head import D2T, count_tokens, most_used
from serving.models.loading import load_model
from serving.models.model_files import find_model
from serving.models.part_fit import TEXT_TOKENS, fit_map, generic_texts
from serving.models.target_part import TargetPart, plain_config, plain_weights

_log = logging.getLogger(__name__)


def write_draft(
    target: str,
    out: Path,
    *,
    num_layers: int = 2,
    num_tokens: int | None = None,
    texts: Sequence[str] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> nn.Module:
    """Write the target's first `num_layers` layers to the folder `out`, which must not exist or be empty.
    `num_tokens`: rows of the head, for the tokens that the texts use most; None: for all. `texts` None:
    generic ones. Returns the draft. Raises UnsupportedModelError, FileExistsError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder; nothing was written")
    model, tokenizer = load_model(target, device=device, dtype=dtype), load_tokenizer(find_model(target))
    part = TargetPart(num_layers - 1).build(model)
    vocab_size = text_config(model).vocab_size
    if num_tokens is not None and num_tokens >= vocab_size:
        raise UnsupportedModelError(
            f"a head of {num_tokens} rows is no smaller than the target's of {vocab_size}; nothing was "
            "written: ask for fewer, or leave the number out"
        )
    ids = _token_ids(tokenizer, texts)
    draft: Any = _ordinary(model, part, ids)
    weights = dict(draft.state_dict())
    if num_tokens is not None:
        token_ids_M = most_used(count_tokens(ids, vocab_size), num_tokens)
        text_config(draft).draft_vocab_size, key = num_tokens, head_key(draft)
        weights |= {key: weights[key][token_ids_M], D2T: token_ids_M - torch.arange(num_tokens)}
    draft.save_pretrained(out, state_dict=weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    ordinary: nn.Module = draft
    return ordinary


def _token_ids(tokenizer: Any | None, texts: Sequence[str] | None) -> list[list[int]]:
    """Empty without a tokenizer: the map stays the identity."""
    if tokenizer is None:
        _log.warning("no tokenizer, so no text to fit the draft to: its head is the target's as it is")
        return []
    wanted = generic_texts() if texts is None else texts
    ids = [tokenizer.encode(text, add_special_tokens=False)[:TEXT_TOKENS] for text in wanted]
    return [one for one in ids if one]


@torch.no_grad()
def _ordinary(target: nn.Module, part: nn.Module, texts: Sequence[Sequence[int]]) -> Any:
    """A model of the target's class with the part's weights, the map folded into its head."""
    draft: Any = type(target)(plain_config(part)).to(next(target.parameters()).dtype)
    weights = plain_weights(part)
    head: Any = target.get_output_embeddings()  # type: ignore[operator]
    if texts:
        mapped = head.weight.float().cpu() @ fit_map(part, target, texts)
        own_head = draft.get_output_embeddings()
        [name] = [name for name, weight in draft.named_parameters() if weight is own_head.weight]
        weights[name] = mapped.to(head.weight.dtype)
    draft.load_state_dict({name: weight.cpu() for name, weight in weights.items()})
    draft.generation_config = copy.deepcopy(getattr(target, "generation_config", None))
    return draft.eval().requires_grad_(False)
