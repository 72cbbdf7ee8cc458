"""Grouped heads attend as if their keys and values had been repeated."""

import pytest
import torch
from torch import nn

from serving.engine.passes.grouped_attention import grouped_attention, use_grouped_attention
from tests.support.tiny_models import tiny_model


def tensors(num_heads: int, num_kv_heads: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_heads)
    query = torch.randn(3, num_heads, 4, 8, generator=generator)
    key, value = torch.randn(2, 3, num_kv_heads, 11, 8, generator=generator)
    visible = torch.arange(11) <= torch.tensor([4, 5, 6, 7])[:, None]
    return query, key, value, visible.expand(3, 1, 4, 11)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("additive", [False, True])
def test_it_equals_attention_over_repeated_heads(num_heads: int, num_kv_heads: int, additive: bool) -> None:
    query, key, value, mask = tensors(num_heads, num_kv_heads)
    repeated = [kv.repeat_interleave(num_heads // num_kv_heads, dim=1) for kv in (key, value)]
    expected = nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask)
    given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if additive else mask
    got, _ = grouped_attention(nn.Identity(), query, key, value, given)
    assert torch.allclose(got, expected.transpose(1, 2), atol=1e-6)
    wrong, _ = grouped_attention(nn.Identity(), query, key, value, torch.zeros(mask.shape))
    assert not torch.allclose(wrong, expected.transpose(1, 2), atol=1e-3), "the mask matters"


def test_a_model_without_sdpa_keeps_its_attention() -> None:
    model = tiny_model("llama", 1, 320)
    model.set_attn_implementation("eager")
    assert not use_grouped_attention(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_model_answers_the_same_without_a_mask_of_ours(arch: str) -> None:
    model = tiny_model(arch, 2, 320).eval()
    tokens = torch.arange(20)[None] * 7 % 320
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits
        assert use_grouped_attention(model)
        assert torch.allclose(model(input_ids=tokens, use_cache=False).logits, expected, atol=1e-4)
