"""The library entry: an engine in this process, without Ray, Redis or HTTP."""

import logging
from functools import partial
from typing import Any

import torch
from torch import nn

from serving.compiling import Compiling
from serving.drafters.model_drafter import ModelDrafter
from serving.drafters.ngram_drafter import NgramDrafter
from serving.drafters.stopping import stopping_rule
from serving.engine.core import EngineCore
from serving.engine.cost_measurement import measure_costs
from serving.engine.draft_length import MAX_DRAFT_TOKENS, DraftLengthController
from serving.engine.engine import Engine
from serving.engine.passes.hidden_states import embedder_of
from serving.engine.passes.packed_linear import pack_linears
from serving.engine.passes.prefix_cache import PrefixCache
from serving.engine.passes.runner import Runner
from serving.engine.passes.shared_slot_cache import SharedSlotCache
from serving.engine.prefill import Router
from serving.free_memory import FreeMemory, free_memory
from serving.memory_plan import MemoryPlan
from serving.models.draft_weights import DraftWeights
from serving.models.loading import ModelPair, load_pair
from serving.models.target_part import TargetPart
from serving.options import EngineOptions
from serving.router import PromptRouter
from serving.runner_check import prepare_runner
from serving.served_drafts import ServedDrafts

_log = logging.getLogger(__name__)

DEFAULT_OPTIONS = EngineOptions()


class LocalEngine(Engine):
    """An Engine with the model pair that it serves."""

    pair: ModelPair
    drafts: ServedDrafts | None
    """None if no draft model is used."""
    router: PromptRouter | None
    """Routes prompts without a route; None if no route can have a draft of its own."""
    memory_plan: MemoryPlan
    compiling: Compiling

    @property
    def tokenizer(self) -> Any | None:
        """The target's, of transformers; None where it has none."""
        return self.pair.tokenizer

    @property
    def target_revision(self) -> str:
        return self.pair.target_revision

    @property
    def passes(self) -> str:
        """What runs the models' passes."""
        return self.compiling.state

    def close(self, timeout_s: float = 10.0) -> None:
        """See Engine.close; also ends a compilation under way."""
        self.compiling.close()
        super().close(timeout_s)


def load_engine(
    target: str,
    draft: str | None = None,
    options: EngineOptions = DEFAULT_OPTIONS,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    untie_draft: bool = False,
) -> LocalEngine:
    """Load a pair (paths or hub ids) and start an engine on it. Raises UnsupportedModelError for models that
    cannot be served, and MemoryPlanError for sizes that do not fit."""
    pair = load_pair(target, draft, device=device, dtype=dtype, untie_draft=untie_draft)
    return build_engine(pair, options)


def build_engine(
    pair: ModelPair,
    options: EngineOptions = DEFAULT_OPTIONS,
    *,
    free: FreeMemory | None = None,
    router: Router | None = None,
) -> LocalEngine:
    """Start an engine on a loaded pair. A draft that is not used takes no memory, and no adapter is swapped
    in. `free` None: queries the device. `router` routes prompts in place of the one that follows the feed.
    Raises MemoryPlanError before anything is allocated."""
    device = next(pair.target.parameters()).device
    plan = _fitting(pair, options, free or free_memory(device))
    options = plan.options
    target = Runner(pair.target, num_slots=options.num_slots, max_seq_len=options.max_seq_len)
    prepare_runner(target, pair.target_id)

    def new_draft() -> tuple[ModelDrafter, DraftWeights]:
        return _new_draft(pair, target, plan)

    def new_route_draft() -> tuple[ModelDrafter, DraftWeights]:
        drafter, weights = new_draft()
        compiling.join(drafter.runner)
        drafter.runner.cache.clear_all()
        return drafter, weights

    drafter, weights = new_draft() if pair.draft is not None and options.uses_model else (None, None)
    draft_runner = None if drafter is None else drafter.runner
    follower = PromptRouter(pair.target_revision) if options.max_route_drafts else None
    router = router or follower
    embedder = None if router is None else embedder_of(target)
    compiling = Compiling(target, draft_runner, options.compile, embedder)
    drafts = options.speculation != "off" and options.num_draft_tokens != 0
    costs = measure_costs(target, draft_runner, max_draft_tokens=MAX_DRAFT_TOKENS if drafts else 0)
    for runner in filter(None, (target, draft_runner)):
        runner.cache.clear_all()
    engine = LocalEngine(
        EngineCore(
            target,
            drafter,
            controller=DraftLengthController(costs, fixed=options.num_draft_tokens),
            costs=costs,
            floor=None if weights is None else weights.stage_floor,
            ngram=NgramDrafter(options.num_slots) if options.speculation in ("auto", "ngram") else None,
            prefix_cache=new_prefix_cache(target, plan),
            router=router,
            embedder=embedder,
        ),
        eos_token_ids=pair.eos_token_ids,
    )
    engine.pair, engine.router, engine.memory_plan, engine.compiling = pair, follower, plan, compiling
    engine.drafts = None
    if weights is not None:
        engine.drafts = ServedDrafts(
            engine, weights, new_route_draft, options.max_route_drafts, partial(_has_room, plan, device)
        )
    compiling.start(engine)
    return engine


def _fitting(pair: ModelPair, options: EngineOptions, free: FreeMemory) -> MemoryPlan:
    """The plan, if it fits; the target's large layers are packed, too, where there is memory for it."""
    plan = MemoryPlan.of(pair, options)
    plan.require_fit(free)
    if plan.fits(free, with_optional=True):
        pack_linears(pair.target)
    if plan.note:
        _log.warning("%s", plan.note)
    _log.info("%s", "\n".join(plan.lines()))
    return plan


def _has_room(plan: MemoryPlan, device: torch.device) -> bool:
    """Whether the draft of one more route fits now; one that was planned does."""
    return plan.options.plans_route_drafts or plan.route_draft_bytes < free_memory(device).device_bytes


def new_prefix_cache(target: Runner, plan: MemoryPlan) -> PrefixCache | None:
    max_bytes = plan.prefix_cache_bytes
    return PrefixCache(target.cache, max_bytes=max_bytes) if max_bytes else None


def _new_draft(pair: ModelPair, target: Runner, plan: MemoryPlan) -> tuple[ModelDrafter, DraftWeights]:
    """The pair's draft as loaded, in memory of its own, with as many slots as the target. Raises
    UnsupportedModelError."""
    assert pair.draft is not None
    weights = DraftWeights(
        pair.draft, draft_revision=pair.draft_revision, target_revision=pair.target_revision
    )
    runner = draft_runner(weights.module, target)
    prepare_runner(runner, pair.draft_id)
    stopping = stopping_rule(plan.options.stopping, plan.options.stopping_threshold)
    max_bytes = plan.draft_prefix_cache_bytes
    prefix_cache = PrefixCache(runner.cache, max_bytes=max_bytes) if max_bytes else None
    return ModelDrafter(runner, stopping=stopping, prefix_cache=prefix_cache), weights


def draft_runner(draft: nn.Module, target: Runner) -> Runner:
    """A draft over as many slots as the target; a part of the target over the target's first layers."""
    part = TargetPart.of(draft)
    return Runner(
        draft,
        num_slots=target.num_slots,
        max_seq_len=target.max_seq_len,
        vocab_size=target.vocab_size,
        cache=None if part is None else SharedSlotCache(target.cache, num_shared=part.exit_layer),
    )
