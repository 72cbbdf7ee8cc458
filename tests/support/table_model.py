"""A causal language model whose distribution is known exactly, behind the interface of a transformers model.

The logits after a context are a row of a table; the row is a hash of the whole context, which the model reads
back from its KV cache. So a wrong mask, position, catch-up or slot move changes the distribution and is
caught.
"""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

NUM_ROWS = 13


class TableModel(nn.Module):
    """`table` [NUM_ROWS, vocab]; weights are a parameter, so that a swap can change them in place."""

    def __init__(self, vocab_size: int, seed: int, sharpness: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = sharpness * torch.randn(NUM_ROWS, vocab_size, generator=generator)
        self.table = nn.Parameter(table, requires_grad=False)
        self.config = SimpleNamespace(
            vocab_size=vocab_size,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=1,
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Any,
        use_cache: bool,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """A context's row is sum over its tokens of (token + 1) * (position + 1), modulo NUM_ROWS."""
        contribution_BT = ((input_ids + 1) * (position_ids + 1) % NUM_ROWS).float()
        keys_B1T1 = contribution_BT[:, None, :, None]
        cached_B1K1, _ = past_key_values.update(keys_B1T1, keys_B1T1, 0)
        seen_BTK = self.attend(attention_mask[:, 0], cached_B1K1[:, :, :, 0])
        sum_BT = seen_BTK.sum(-1)
        row_BT = sum_BT.nan_to_num().round().long() % NUM_ROWS
        logits_BTV = self.table[row_BT].masked_fill(sum_BT.isnan()[..., None], torch.nan)
        return SimpleNamespace(logits=logits_BTV[:, -logits_to_keep:] if logits_to_keep else logits_BTV)

    def attend(self, mask_BTK: Tensor, cached_B1K: Tensor) -> Tensor:
        """What each token sees of its slot: nothing where the mask is False."""
        return mask_BTK * cached_B1K

    def logits_after(self, context: Sequence[int]) -> Tensor:
        """[V], without any cache: the reference."""
        row = sum((token + 1) * (position + 1) % NUM_ROWS for position, token in enumerate(context))
        return self.table[row % NUM_ROWS]

    def output_distribution(
        self, prompt: Sequence[int], num_tokens: int, temperature: float = 1.0
    ) -> dict[tuple[int, ...], float]:
        """Exact probability of every output of `num_tokens` tokens, by enumeration."""
        distribution = {}
        for output in itertools.product(range(self.config.vocab_size), repeat=num_tokens):
            logprob = 0.0
            for index, token in enumerate(output):
                logits_V = self.logits_after([*prompt, *output[:index]])
                logprob += float(torch.log_softmax(logits_V / temperature, -1)[token])
            distribution[output] = float(torch.tensor(logprob).exp())
        return distribution
