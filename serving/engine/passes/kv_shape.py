"""The shape of a model's keys and values, read from its configuration; allocates nothing."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class KvShape:
    """Keys and values of one token are [num_layers, 2, num_kv_heads, head_dim]."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Number of rows of the embedding."""

    @classmethod
    def of(cls, model: nn.Module) -> "KvShape":
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        num_heads = int(config.num_attention_heads)
        return cls(
            num_layers=int(config.num_hidden_layers),
            num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
            vocab_size=int(config.vocab_size),
        )

    @property
    def num_values(self) -> int:
        """Number of key and value entries of one token, over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim
