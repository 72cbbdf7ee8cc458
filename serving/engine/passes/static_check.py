"""Builds static passes for a runner and checks that they agree with the model's own code.

A value that a capture freezes by mistake (an address, a number read on the host) shows in no config, so the
same random context is run both ways before a static pass serves. Knows nothing of rounds or drafts.
"""

import torch
from torch import Tensor

from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPass, SlotPassFunction
from serving.engine.passes.static_pass import MAX_GRAPHS, TOKEN_BUCKETS, StaticPass

_LEAST_LOGIT = -1e9
"""Stands for -inf at padded vocabulary entries, so that differences stay numbers; NaN stays NaN."""
_CONTEXT = 5
_TOKENS = (1, 2, 3, TOKEN_BUCKETS[-1])


def static_pass_of(
    runner: Runner, run: SlotPassFunction | None = None, *, max_graphs: int = MAX_GRAPHS
) -> StaticPass:
    """Static passes over this runner's cache; `run`: compiled code in place of the model's own."""
    if run is None:
        run = SlotPass(runner.model, runner.max_seq_len)
    return StaticPass(run, runner.cache, num_logits=runner.num_embedded, max_graphs=max_graphs)


@torch.inference_mode()
def static_error(runner: Runner, static: StaticPass) -> float:
    """Largest difference of logits, keys and values from the model's own code, relative to the largest of
    them. The cache must be idle; it is cleared. Each shape runs twice, to show that nothing of the first run
    remains in a graph."""
    errors = [torch.zeros(())]
    for num_rows in sorted({1, (runner.num_slots + 1) // 2, runner.num_slots}):
        for num_tokens in _TOKENS:
            if _CONTEXT + num_tokens <= runner.max_seq_len:
                for seed in range(2):
                    errors.append(_error(runner, static, num_rows, num_tokens, seed).cpu())
    return float(torch.stack(errors).max())


def _error(runner: Runner, static: StaticPass, num_rows: int, num_tokens: int, seed: int) -> Tensor:
    generator = torch.Generator(runner.device).manual_seed(seed)
    token_ids_BT = torch.randint(
        runner.num_embedded, (num_rows, num_tokens), generator=generator, device=runner.device
    )
    positions_BT = _CONTEXT - seed + torch.arange(num_tokens, device=runner.device).expand(num_rows, -1)
    kv_len = _CONTEXT - seed + num_tokens
    seen = runner.cache.kv_L2SHTD[:, :, :num_rows, :, :kv_len]
    context = 0.5 * torch.randn(seen.shape, generator=generator, device=runner.device)
    outcomes: list[tuple[Tensor, Tensor]] = []
    for static_pass in (None, static):
        runner.cache.clear_all()
        seen.copy_(context)
        if static_pass is None:
            logits_BTV = runner.forward(token_ids_BT, positions_BT, kv_len=kv_len)
        else:
            logits_BTV = runner.fit_vocabulary(static_pass(token_ids_BT, positions_BT, kv_len))
        outcomes.append((logits_BTV.clamp(min=_LEAST_LOGIT), seen.clone()))
    runner.cache.clear_all()
    pairs = zip(*outcomes, strict=True)
    return torch.stack([(one.float() - other).abs().max() / _scale(one) for one, other in pairs]).max()


def _scale(values: Tensor) -> Tensor:
    """The largest absolute value, without entries that pad the vocabulary."""
    return values.float().masked_fill(values <= _LEAST_LOGIT, 0.0).abs().max().clamp(min=1.0)
