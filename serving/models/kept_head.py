"""A draft's head over the tokens that traffic uses: logits of M tokens, and -inf for every other.

With a large vocabulary the head is most of a small draft's pass, and few tokens are most of any traffic (as
FR-Spec, arXiv 2502.14856, has it). A token outside has probability zero, which verification allows: the
output's distribution is the target's as ever. Which tokens are kept is part of a draft's version and travels
in its adapter; their rows are copies of the target's. Legend: M kept tokens, V vocabulary, H width.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from serving.models.adapter_tensors import IDS_END, AdapterRejectedError

IDS = "token_ids"
D2T = "d2t"
_ROWS = ("weight", "bias")


class KeptHead(nn.Module):
    """Stands where the model has its head, and gives logits of the same shape [..., V]."""

    token_ids: Tensor
    """[M] int64, strictly increasing; a buffer, as the rows are."""
    weight: Tensor
    bias: Tensor | None

    def __init__(self, whole: nn.Linear, token_ids_M: Tensor) -> None:
        """`whole`: the head of the target, which stays the target's; its rows are copied."""
        super().__init__()
        self.whole: nn.Linear | None = whole
        self.vocab_size = whole.out_features
        self.register_buffer(IDS, token_ids_M.to(whole.weight.device), persistent=False)
        for name, rows in self.rows(self.token_ids).items():
            self.register_buffer(name, rows, persistent=False)
        if whole.bias is None:
            self.bias = None

    @classmethod
    def alone(cls, weight_MH: Tensor, token_ids_M: Tensor, vocab_size: int) -> Self:
        """Of a draft model whose checkpoint has but these rows: its tokens are what they are."""
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.whole, head.bias, head.vocab_size = None, None, vocab_size
        head.register_buffer(IDS, token_ids_M)
        head.register_buffer("weight", weight_MH)
        return head

    def forward(self, states_BTH: Tensor) -> Tensor:
        """[..., H] to [..., V]."""
        kept_BTM = nn.functional.linear(states_BTH, self.weight, self.bias)
        nothing_BTV = kept_BTM.new_full((*kept_BTM.shape[:-1], self.vocab_size), -torch.inf)
        return nothing_BTV.index_copy(-1, self.token_ids, kept_BTM)

    def rows(self, token_ids_M: Tensor) -> dict[str, Tensor]:
        """What belongs to these tokens, by the name of its buffer: copies of rows of the target's head."""
        assert self.whole is not None, "a head without the target's has no other rows"
        found = {name: getattr(self.whole, name) for name in _ROWS}
        return {name: rows.detach()[token_ids_M] for name, rows in found.items() if rows is not None}

    @torch.no_grad()
    def keep(self, token_ids_M: Tensor) -> None:
        """Keep these tokens from now on, as many as before, in place."""
        self.token_ids.copy_(token_ids_M)
        for name, rows in self.rows(self.token_ids).items():
            getattr(self, name).copy_(rows)

    def fault(self, token_ids_M: Tensor) -> str:
        """Why these tokens cannot be kept; empty if they can."""
        if token_ids_M.shape != self.token_ids.shape or token_ids_M.dtype != torch.int64:
            return (
                f"{tuple(token_ids_M.shape)} ids of {token_ids_M.dtype}, not "
                f"{tuple(self.token_ids.shape)} of torch.int64"
            )
        size = self.vocab_size
        in_order = bool((token_ids_M[1:] > token_ids_M[:-1]).all())
        if not (in_order and token_ids_M[0] >= 0 and token_ids_M[-1] < size):
            return f"ids that are not different ones in order within 0..{size - 1}"
        return ""


def kept_head(model: nn.Module) -> tuple[str, KeptHead] | None:
    """Name and module of a model's head over kept tokens, if others may be kept in their place; None if it
    has no such head."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, KeptHead)]
    return found[0] if found and found[0][1].whole is not None else None


def num_rows(config: Any) -> int | None:
    """Of the head of a draft model's checkpoint, where that is less than the vocabulary."""
    rows = getattr(config, "draft_vocab_size", None)
    return None if rows is None or rows >= config.vocab_size else int(rows)


def shrink_head(model: Any, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a model the head that its checkpoint has: `weight` [M, H] and `d2t` [M], by which a row's token is
    its number plus what stands there (as drafts of EAGLE-3, arXiv 2503.01840, are written). Without tensors,
    as on the meta device, only their shapes. Raises ValueError for others."""
    if (rows := num_rows(config)) is None:
        return
    whole: nn.Linear = model.get_output_embeddings()
    device, dtype = whole.weight.device, whole.weight.dtype
    numbers_M = torch.arange(rows)
    weight_MH = tensors.get("weight", torch.empty(rows, whole.in_features, device=device))
    offsets_M = tensors.get(D2T, torch.zeros_like(numbers_M))
    if weight_MH.shape != (rows, whole.in_features) or offsets_M.shape != (rows,):
        raise ValueError(
            f"its head is {list(weight_MH.shape)} and its {D2T} {list(offsets_M.shape)}, where "
            f"draft_vocab_size={rows} needs {[rows, whole.in_features]} and {[rows]}"
        )
    ids_M = offsets_M + numbers_M
    head = KeptHead.alone(weight_MH.to(device, dtype), ids_M.to(device), whole.out_features)
    if fault := head.fault(ids_M):
        raise ValueError(f"its {D2T} gives {fault}")
    model.set_output_embeddings(head)


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """By name: the ids, and what belongs to them; empty for a model with another head."""
    if (found := kept_head(model)) is None:
        return {}
    name, head = found
    return {f"{name}.{key}": buffer for key, buffer in head.named_buffers(recurse=False)}


def read_kept(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the ids out of an adapter's tensors; returns them with what belongs to them, as `kept_buffers`
    names it. Empty for a model with another head. Raises AdapterRejectedError."""
    if (found := kept_head(model)) is None:
        return {}
    name, head = found
    ids_M = tensors.pop(f"{name}.{IDS}", None)
    if ids_M is None or (fault := head.fault(ids_M)):
        said = "no ids" if ids_M is None else fault
        raise AdapterRejectedError(
            f"adapter's kept tokens {f'{name}.{IDS}'!r} are {said}; drafted tokens would be other words"
        )
    ids_M = ids_M.to(head.token_ids.device)
    return {f"{name}.{key}": rows for key, rows in ({IDS: ids_M} | head.rows(ids_M)).items()}


def without_rows(model: nn.Module, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter holds, of tensors that `read_kept` completed."""
    rows = {name for name in kept_buffers(model) if not name.endswith(IDS_END)}
    return {name: tensor for name, tensor in merged.items() if name not in rows}


def count_tokens(texts: Iterable[Sequence[int]], vocab_size: int) -> Tensor:
    """[V] float64: how often each id occurs."""
    ids = torch.tensor([token_id for text in texts for token_id in text], dtype=torch.int64)
    return torch.bincount(ids, minlength=vocab_size).double()


def most_used(counts_V: Tensor, count: int) -> Tensor:
    """The ids [count], in order, of the largest counts; of equal ones the lowest."""
    return counts_V.sort(descending=True, stable=True).indices[:count].sort().values


def first_tokens(head: Any, count: int) -> KeptHead:
    """A head over the first `count` ids, until others are kept."""
    return KeptHead(head, torch.arange(count))
