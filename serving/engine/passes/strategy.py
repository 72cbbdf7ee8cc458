"""The ways to run a forward pass: one Protocol, and the two that need no fixed shapes.

A runner takes the first of its ways that can run a pass; the model's own code can run every one. Legend: B
rows (row = slot, from `first_slot` on), T tokens, E kept positions, V the model's own vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from serving.engine.passes.slot_cache import SlotCache
from serving.engine.passes.slot_pass import SlotPassFunction, additive_mask


class PassInput(NamedTuple):
    """Tokens at positions. A token at position p attends to columns 0..p of its slot; padding tokens sit at
    the cache's trash column."""

    token_ids_BT: Tensor
    positions_BT: Tensor
    kv_len: int
    """One more than the largest position that is not padding."""
    first_slot: int
    logits_to_keep: int
    """Of the last positions; 0: of all."""


class Pass(Protocol):
    """One way to run a forward pass over a slot cache."""

    def can_run(self, given: PassInput) -> bool: ...

    def run(self, given: PassInput) -> Tensor:
        """Logits [B, E, V] in float32; keys and values are in the cache afterwards."""
        ...


class ModelPass:
    """The model's own code."""

    def __init__(self, model: nn.Module, cache: SlotCache) -> None:
        self._model, self._cache = model, cache
        self._columns_K = torch.arange(cache.max_len + 1, device=cache.kv_L2SHTD.device)

    def can_run(self, given: PassInput) -> bool:
        return True

    def run(self, given: PassInput) -> Tensor:
        """See Pass."""
        self._cache.window(given.first_slot, given.positions_BT, given.kv_len)
        mask_B1TK = (self._columns_K[: given.kv_len] <= given.positions_BT[..., None])[:, None]
        output = self._model(
            input_ids=given.token_ids_BT,
            position_ids=given.positions_BT.clamp(max=self._cache.max_len - 1),
            attention_mask=mask_B1TK,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=given.logits_to_keep,
        )
        logits_BEV: Tensor = output.logits.float()
        return logits_BEV


class FunctionPass:
    """A SlotPass, or code compiled from one, over the rows of a cache; not for passes of `slower_rows`,
    sequences times tokens, for which the model's own code is faster."""

    def __init__(self, function: SlotPassFunction, cache: SlotCache, slower_rows: range = range(0)) -> None:
        self.function, self.slower_rows = function, slower_rows
        self._cache = cache
        self._dtype = cache.kv_L2SHTD.dtype
        self._columns_T = torch.arange(cache.max_len + 1, device=cache.kv_L2SHTD.device)

    def can_run(self, given: PassInput) -> bool:
        return given.token_ids_BT.numel() not in self.slower_rows

    def run(self, given: PassInput) -> Tensor:
        """See Pass."""
        num_rows, num_tokens = given.token_ids_BT.shape
        first_kept = num_tokens - given.logits_to_keep if given.logits_to_keep else 0
        return self.function(
            given.token_ids_BT,
            given.positions_BT,
            additive_mask(given.positions_BT, given.kv_len, self._dtype),
            self._columns_T[first_kept:num_tokens],
            self._cache.rows(given.first_slot, num_rows),
        )
