"""Checks before serving that a model gives the same logits through the slot cache as by itself."""

import torch

from serving.engine.passes.grouped_attention import use_grouped_attention, use_sdpa
from serving.engine.passes.runner import Runner
from serving.models.errors import UnsupportedModelError, refusing

_CHECK_TOKENS = 12
_LEAST_LOGIT = -1e9
"""Stands for -inf at padded vocabulary entries, so that differences stay numbers."""


@torch.inference_mode()
def prepare_runner(runner: Runner, name: str) -> None:
    """Compare slot-cache logits with the model's own on a short text, in two ragged chunks, and choose the
    attention: grouped heads without repeating them where the model allows it, else torch's sdpa.

    Finds faults that no config shows: attention that ignores the mask, positions or cache, layers that cache
    other shapes, and finite weights whose logits are NaN. Raises UnsupportedModelError.
    """
    with refusing(name, "cannot run through the slot cache, so nothing of it can be served"):
        _prepare_runner(runner.twin(num_slots=1), name)  # the runner's own cache may be in use


def _prepare_runner(runner: Runner, name: str) -> None:
    num_tokens = min(_CHECK_TOKENS, runner.max_seq_len)
    tokens_1T = torch.arange(num_tokens, device=runner.device)[None] % runner.num_embedded
    expected_TV = runner.fit_vocabulary(runner.model(input_ids=tokens_1T, use_cache=False).logits[0].float())
    expected_TV = expected_TV.clamp(min=_LEAST_LOGIT)
    if not torch.isfinite(expected_TV).all():
        raise UnsupportedModelError(
            f"model {name!r} answers a plain text with logits that are not finite in {runner.dtype}, though "
            "its weights are finite; nothing that it says could be used. Try another dtype"
        )
    tolerance = 1e-3 if runner.dtype == torch.float32 else 0.05
    if use_grouped_attention(runner.model):
        if _slot_cache_error(runner, tokens_1T, expected_TV) <= tolerance:
            return
        use_sdpa(runner.model)
    error = _slot_cache_error(runner, tokens_1T, expected_TV)
    if error > tolerance:
        raise UnsupportedModelError(
            f"model {name!r} answers differently through the slot cache (relative error {error:.2g}); its "
            "attention ignores the engine's mask, positions or cache, so its text would be wrong"
        )


def _slot_cache_error(runner: Runner, tokens_1T: torch.Tensor, expected_TV: torch.Tensor) -> float:
    """Largest difference from the expected logits, relative to the largest of them."""
    num_tokens = tokens_1T.shape[1]
    split = num_tokens // 2
    positions_1T = torch.arange(num_tokens, device=runner.device)[None]
    first = runner.forward(tokens_1T[:, :split], positions_1T[:, :split], kv_len=split)
    second = runner.forward(tokens_1T[:, split:], positions_1T[:, split:], kv_len=num_tokens)
    got_TV = torch.cat([first, second], dim=1)[0].clamp(min=_LEAST_LOGIT)
    scale = expected_TV[expected_TV > _LEAST_LOGIT].abs().max().clamp(min=1.0)
    return float((got_TV - expected_TV).abs().max() / scale)
