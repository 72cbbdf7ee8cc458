"""Attention over grouped key-value heads without copying them for each query head.

With a mask, transformers' sdpa copies every key and value once for each query head of its group. Here the
heads of a group become further query positions of their key-value head: the same sums without the copy.
Invariant: a boolean or additive float mask is applied as torch's own sdpa applies it; calls with other
arguments go to transformers' sdpa.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "everdraft_grouped"
_WITHOUT_EFFECT = {"position_ids", "cache_position", "use_cache"}
"""Arguments that models pass on and that do not change the result if there is a mask."""


def grouped_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BNKD: Tensor,
    value_BNKD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """H query heads over N key-value heads, K columns; mask [B, 1, T, K]. Returns [B, T, H, D]."""
    asks_more = any(value is not None and name not in _WITHOUT_EFFECT for name, value in kwargs.items())
    if attention_mask is None or dropout or asks_more:
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query_BHTD,
            key_BNKD,
            value_BNKD,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
        return attended
    num_rows, num_heads, num_tokens, head_dim = query_BHTD.shape
    group = num_heads // key_BNKD.shape[1]
    mask_B1MK = attention_mask
    if group > 1:
        mask_B1MK = mask_B1MK.expand(-1, group, -1, -1).reshape(num_rows, 1, group * num_tokens, -1)
    attended_BNMD = nn.functional.scaled_dot_product_attention(
        query_BHTD.reshape(num_rows, -1, group * num_tokens, head_dim),
        key_BNKD,
        value_BNKD,
        attn_mask=mask_B1MK,
        scale=scaling,
    )
    attended_BHTD = attended_BNMD.reshape(num_rows, num_heads, num_tokens, -1)
    return attended_BHTD.transpose(1, 2), None


def use_grouped_attention(model: nn.Module) -> bool:
    """Make a model with sdpa attention use grouped attention. False, and nothing changed, for any other
    model."""
    switchable: Any = model
    if getattr(switchable.config, "_attn_implementation", None) != "sdpa":
        return False
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    switchable.set_attn_implementation(NAME)
    return True


def use_sdpa(model: nn.Module) -> None:
    """Make the model use transformers' sdpa again."""
    switchable: Any = model
    switchable.set_attn_implementation("sdpa")
