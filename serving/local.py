"""The library entry: an engine in this process, without Ray, Redis or HTTP."""

from typing import Literal

import torch

from serving.drafters.model_drafter import ModelDrafter
from serving.drafters.ngram_drafter import NgramDrafter
from serving.drafters.stopping import StoppingName, stopping_rule
from serving.engine.cost_table import measure_costs
from serving.engine.draft_length import MAX_DRAFT_TOKENS, DraftLengthController
from serving.engine.engine import Engine
from serving.engine.runner import Runner
from serving.models.draft_weights import DraftWeights
from serving.models.loading import ModelPair, UnsupportedModelError, load_pair

Speculation = Literal["auto", "model", "ngram", "off"]
"""Who drafts: whatever pays, by measurement; the draft model alone; n-gram lookup alone; nobody."""

_CHECK_TOKENS = 12
_LEAST_LOGIT = -1e9
"""Stands for -inf at padded vocabulary entries, so that differences stay numbers."""


class LocalEngine(Engine):
    """An Engine that knows the pair it serves."""

    pair: ModelPair
    draft_weights: DraftWeights | None


def load_engine(
    target: str,
    draft: str | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    num_slots: int = 8,
    max_seq_len: int = 1024,
    num_draft_tokens: int | None = None,
    speculation: Speculation = "auto",
    stopping: StoppingName = "controller",
    stopping_threshold: float | None = None,
) -> LocalEngine:
    """Load a pair (paths or hub ids) and start an engine on it.

    `num_draft_tokens`: None lets the controller choose, an int fixes the draft length. Raises
    UnsupportedModelError for models that cannot work, with the reason.
    """
    pair = load_pair(target, draft, device=device, dtype=dtype)
    return build_engine(
        pair,
        num_slots=num_slots,
        max_seq_len=max_seq_len,
        num_draft_tokens=num_draft_tokens,
        speculation=speculation,
        stopping=stopping,
        stopping_threshold=stopping_threshold,
    )


def build_engine(
    pair: ModelPair,
    *,
    num_slots: int = 8,
    max_seq_len: int = 1024,
    num_draft_tokens: int | None = None,
    speculation: Speculation = "auto",
    stopping: StoppingName = "controller",
    stopping_threshold: float | None = None,
) -> LocalEngine:
    """Start an engine on a loaded pair. `max_seq_len` is cut to what both models can hold. A draft that may
    not speak (`ngram`, `off`) takes no memory, and no adapter is swapped in."""
    max_seq_len = min(max_seq_len, pair.max_positions)
    if num_slots < 1 or max_seq_len < 2:
        raise ValueError(
            f"num_slots={num_slots} and max_seq_len={max_seq_len} leave no room for a token to continue; "
            "at least 1 and 2 are needed"
        )
    target = Runner(pair.target, num_slots=num_slots, max_seq_len=max_seq_len)
    check_runner(target, pair.target_id)
    drafter = weights = None
    draft_runner = None
    if pair.draft is not None and speculation in ("auto", "model"):
        weights = DraftWeights(
            pair.draft, draft_revision=pair.draft_revision, target_revision=pair.target_revision
        )
        draft_runner = Runner(
            weights.module, num_slots=num_slots, max_seq_len=max_seq_len, vocab_size=target.vocab_size
        )
        check_runner(draft_runner, pair.draft_id)
        drafter = ModelDrafter(draft_runner, stopping=stopping_rule(stopping, stopping_threshold))
    costs = measure_costs(target, draft_runner, max_draft_tokens=MAX_DRAFT_TOKENS)
    for runner in (target, draft_runner):
        if runner is not None:
            runner.cache.clear_all()
    engine = LocalEngine(
        target,
        drafter,
        controller=DraftLengthController(costs, fixed=num_draft_tokens),
        costs=costs,
        eos_token_ids=pair.eos_token_ids,
        floor=weights.stage_floor if weights is not None else None,
        ngram=NgramDrafter(num_slots) if speculation in ("auto", "ngram") else None,
    )
    engine.pair, engine.draft_weights = pair, weights
    return engine


@torch.inference_mode()
def check_runner(runner: Runner, name: str) -> None:
    """Compare slot-cache logits with the model's own on a short text, in two ragged chunks.

    Catches what no config reveals: attention that ignores the mask, positions or cache.
    """
    num_tokens = min(_CHECK_TOKENS, runner.max_seq_len)
    tokens_1T = torch.arange(num_tokens, device=runner.device)[None] % runner.num_embedded
    expected_TV = runner.fit_vocabulary(runner.model(input_ids=tokens_1T, use_cache=False).logits[0].float())
    expected_TV = expected_TV.clamp(min=_LEAST_LOGIT)
    positions_1T = torch.arange(num_tokens, device=runner.device)[None]
    split = num_tokens // 2
    first = runner.forward(tokens_1T[:, :split], positions_1T[:, :split], kv_len=split)
    second = runner.forward(tokens_1T[:, split:], positions_1T[:, split:], kv_len=num_tokens)
    got_TV = torch.cat([first, second], dim=1)[0].clamp(min=_LEAST_LOGIT)
    tolerance = 1e-3 if runner.dtype == torch.float32 else 0.05
    if not torch.isfinite(expected_TV).all():
        return
    scale = expected_TV[expected_TV > _LEAST_LOGIT].abs().max().clamp(min=1.0)
    error = float((got_TV - expected_TV).abs().max() / scale)
    if error > tolerance:
        raise UnsupportedModelError(
            f"model {name!r} answers differently through the slot cache (relative error {error:.2g}); its "
            "attention ignores the engine's mask, positions or cache, so its text would be wrong"
        )
