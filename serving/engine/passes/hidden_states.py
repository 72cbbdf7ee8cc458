"""Returns a target's last hidden states in place of logits, so that a Runner can compute them unchanged.

The runner made here shares the target's weights and its cache; a pass of either leaves the same keys and
values. Knows no prompts and no routes.
"""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from serving.engine.passes.runner import Runner


class HiddenStates(nn.Module):
    """A causal language model without its head."""

    def __init__(self, decoder: nn.Module, config: Any) -> None:
        super().__init__()
        self.decoder, self.config = decoder, config

    def forward(self, *, logits_to_keep: int | Tensor = 0, **inputs: Any) -> SimpleNamespace:
        """`logits`: the last hidden states [B, E, H] at the kept positions."""
        states_BTH: Tensor = self.decoder(**inputs).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SimpleNamespace(logits=states_BTH[:, kept])


def hidden_states_of(model: nn.Module) -> HiddenStates | None:
    """None if a model has no decoder of its own, as transformers' causal language models have."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    if not isinstance(decoder, nn.Module) or decoder is model:
        return None
    return HiddenStates(decoder, model.config)


def embedder_of(target: Runner) -> Runner | None:
    """A runner that fills the target's slots as the target would, but returns hidden states [B, E, H]."""
    states = hidden_states_of(target.model)
    if states is None:
        return None
    config = states.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return Runner(
        states,
        num_slots=target.num_slots,
        max_seq_len=target.max_seq_len,
        vocab_size=int(config.hidden_size),
        cache=target.cache,
    )
