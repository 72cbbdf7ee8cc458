"""The library entry: an engine in this process, without Ray, Redis or HTTP."""

import logging
from typing import Literal

import torch

from serving.compiling import CompileChoice, Compiling
from serving.drafters.model_drafter import ModelDrafter
from serving.drafters.ngram_drafter import NgramDrafter
from serving.drafters.stopping import StoppingName, StoppingRule, stopping_rule
from serving.engine.cost_measurement import measure_costs
from serving.engine.draft_length import MAX_DRAFT_TOKENS, DraftLengthController
from serving.engine.engine import Engine
from serving.engine.grouped_attention import use_grouped_attention, use_sdpa
from serving.engine.hidden_states import embedder_of
from serving.engine.prefix_cache import PrefixCache
from serving.engine.runner import Runner
from serving.free_memory import FreeMemory, free_memory
from serving.memory_plan import MemoryPlan, ModelSize
from serving.models.draft_weights import DraftWeights
from serving.models.errors import UnsupportedModelError, refusing
from serving.models.loading import ModelPair, load_pair
from serving.route_drafts import RouteDrafts
from serving.router import PromptRouter

_log = logging.getLogger(__name__)

Speculation = Literal["auto", "model", "ngram", "off"]
"""Who drafts: whatever pays, by measurement; the draft model alone; n-gram lookup alone; nobody."""

_CHECK_TOKENS = 12
_LEAST_LOGIT = -1e9
"""Stands for -inf at padded vocabulary entries, so that differences stay numbers."""


class LocalEngine(Engine):
    """An Engine that knows the pair it serves."""

    pair: ModelPair
    draft_weights: DraftWeights | None
    router: PromptRouter | None
    """Of prompts that come without a route; None where no route can have a draft of its own."""
    route_drafts: RouteDrafts | None
    memory_plan: MemoryPlan
    compiling: Compiling

    def close(self, timeout_s: float = 10.0) -> None:
        """See Engine.close; also ends a compilation under way."""
        self.compiling.close()
        super().close(timeout_s)


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
    compile: CompileChoice = "off",
    prefix_cache_mib: float | None = None,
    export_queue_bytes: int = 0,
    max_route_drafts: int = 0,
) -> LocalEngine:
    """Load a pair (paths or hub ids) and start an engine on it.

    `num_draft_tokens`: None lets the controller choose, an int fixes the draft length. `compile`: "on" waits
    for compiled passes, "auto" starts without them and takes them when they are ready. `prefix_cache_mib`
    bounds the keys and values kept of earlier prompts (0: none; None: one slot's for every four).
    `export_queue_bytes`: what a recorder may hold, for the plan of memory. `max_route_drafts`: routes beyond
    `default` that may be given drafts of their own. Raises UnsupportedModelError for
    models that cannot work, and MemoryPlanError for sizes that do not fit, with the reason.
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
        compile=compile,
        prefix_cache_mib=prefix_cache_mib,
        export_queue_bytes=export_queue_bytes,
        max_route_drafts=max_route_drafts,
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
    compile: CompileChoice = "off",
    prefix_cache_mib: float | None = None,
    export_queue_bytes: int = 0,
    max_route_drafts: int = 0,
    free: FreeMemory | None = None,
) -> LocalEngine:
    """Start an engine on a loaded pair; see `load_engine`. `max_seq_len` is cut to what both models can hold.
    A draft that may not speak (`ngram`, `off`) takes no memory, and no adapter is swapped in. `free` None:
    asks the device. Raises MemoryPlanError before anything is allocated."""
    max_seq_len = min(max_seq_len, pair.max_positions)
    if num_slots < 1 or max_seq_len < 2:
        raise ValueError(
            f"num_slots={num_slots} and max_seq_len={max_seq_len} leave no room for a token to continue; "
            "at least 1 and 2 are needed"
        )
    if pair.draft is None or speculation not in ("auto", "model"):
        max_route_drafts = 0
    plan = plan_memory(pair, num_slots, max_seq_len, prefix_cache_mib, export_queue_bytes, max_route_drafts)
    plan.require_fit(free or free_memory(next(pair.target.parameters()).device))
    _log.info("%s", "\n".join(plan.lines()))
    target = Runner(pair.target, num_slots=num_slots, max_seq_len=max_seq_len)
    prepare_runner(target, pair.target_id)
    drafter = weights = draft_runner = None

    def new_draft() -> tuple[ModelDrafter, DraftWeights]:
        return _new_draft(pair, target, stopping_rule(stopping, stopping_threshold))

    def new_route_draft() -> tuple[ModelDrafter, DraftWeights]:
        further, its_weights = new_draft()
        compiling.join(further.runner)
        further.runner.cache.clear_all()
        return further, its_weights

    if pair.draft is not None and speculation in ("auto", "model"):
        drafter, weights = new_draft()
        draft_runner = drafter.runner
    router = PromptRouter(pair.target_revision) if max_route_drafts else None
    embedder = embedder_of(target) if router is not None else None
    compiling = Compiling(target, draft_runner, compile, embedder)
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
        prefix_cache=new_prefix_cache(target, plan),
        router=router,
        embedder=embedder,
    )
    engine.router, engine.route_drafts = router, None
    if max_route_drafts:
        engine.route_drafts = RouteDrafts(engine, new_route_draft, max_route_drafts)
    engine.pair, engine.draft_weights, engine.memory_plan = pair, weights, plan
    engine.compiling = compiling
    compiling.start(engine)
    return engine


def _new_draft(pair: ModelPair, target: Runner, stopping: StoppingRule) -> tuple[ModelDrafter, DraftWeights]:
    """The pair's draft as loaded, in memory of its own, with as many slots as the target. Raises
    UnsupportedModelError."""
    assert pair.draft is not None
    weights = DraftWeights(
        pair.draft, draft_revision=pair.draft_revision, target_revision=pair.target_revision
    )
    runner = Runner(
        weights.module,
        num_slots=target.num_slots,
        max_seq_len=target.max_seq_len,
        vocab_size=target.vocab_size,
    )
    prepare_runner(runner, pair.draft_id)
    return ModelDrafter(runner, stopping=stopping), weights


def new_prefix_cache(target: Runner, plan: MemoryPlan) -> PrefixCache | None:
    max_bytes = plan.prefix_cache_bytes
    return PrefixCache(target.cache, max_bytes=max_bytes) if max_bytes else None


def plan_memory(
    pair: ModelPair,
    num_slots: int,
    max_seq_len: int,
    prefix_cache_mib: float | None = None,
    export_queue_bytes: int = 0,
    max_route_drafts: int = 0,
) -> MemoryPlan:
    """What an engine on this pair, which is loaded, will hold."""
    return MemoryPlan(
        num_slots=num_slots,
        max_seq_len=min(max_seq_len, pair.max_positions),
        target=ModelSize.of(pair.target),
        draft=ModelSize.of(pair.draft) if pair.draft is not None else None,
        prefix_cache_mib=prefix_cache_mib,
        export_queue_bytes=export_queue_bytes,
        max_route_drafts=max_route_drafts,
        weights_loaded=True,
    )


@torch.inference_mode()
def prepare_runner(runner: Runner, name: str) -> None:
    """Compare slot-cache logits with the model's own on a short text, in two ragged chunks, and choose the
    attention: grouped heads without repeating them where the model allows it, else torch's sdpa.

    Catches what no config reveals: attention that ignores the mask, positions or cache, layers that cache
    other shapes, and finite weights that answer NaN. Raises UnsupportedModelError.
    """
    with refusing(name, "cannot run through the slot cache, so nothing of it can be served"):
        _prepare_runner(runner, name)


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
