"""One forward pass as a pure function of tensors, including the cache's; this is compiled or captured.

Knows no slots: it gets the rows of the cache that it runs. Writes each token's keys and values at its column
and attends to the first K columns, K being the mask's width. Legend: B rows, T tokens, K columns, E kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from serving.engine.passes.slot_cache import SlotLayer, cache_of, where_of

SlotPassFunction = Callable[[Tensor, Tensor, Tensor, Tensor, list[Tensor]], Tensor]
"""Signature of SlotPass.forward and of a compiled pass."""


class SlotPass(nn.Module):
    """`model` over rows of a slot cache with `max_seq_len` columns and one trash column."""

    def __init__(self, model: nn.Module, max_seq_len: int) -> None:
        super().__init__()
        self.model = model
        self.max_seq_len = max_seq_len

    def forward(
        self,
        token_ids_BT: Tensor,
        columns_BT: Tensor,
        mask_B1TK: Tensor,
        keep_E: Tensor,
        keys_and_values: list[Tensor],
    ) -> Tensor:
        """Logits [B, E, V] in float32 at the positions `keep_E`; `keys_and_values` in turn, by layer."""
        where = where_of(columns_BT, keys_and_values[0].shape[1])
        layers = []
        for keys_BHSD, values_BHSD in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
            layer = SlotLayer(keys_BHSD, values_BHSD)
            layer.aim(0, token_ids_BT.shape[0], where, None, mask_B1TK.shape[-1])
            layers.append(layer)
        output: Any = self.model(
            input_ids=token_ids_BT,
            position_ids=columns_BT.clamp(max=self.max_seq_len - 1),
            attention_mask=mask_B1TK,
            past_key_values=cache_of(layers),
            use_cache=True,
            logits_to_keep=keep_E,
        )
        logits_BEV: Tensor = output.logits.float()
        return logits_BEV


def additive_mask(positions_BT: Tensor, kv_len: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, kv_len]: 0 where the token at a position may attend (columns up to its own), else -inf."""
    columns_K = torch.arange(kv_len, device=positions_BT.device)
    hidden_B1TK = (columns_K > positions_BT[..., None])[:, None]
    mask_B1TK = torch.zeros(hidden_B1TK.shape, dtype=dtype, device=positions_BT.device)
    return mask_B1TK.masked_fill_(hidden_B1TK, -torch.inf)
