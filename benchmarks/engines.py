"""Our engine beside vLLM's: the same models, prompts and lengths, with and without the draft, in turn.

Runs in vLLM's environment (`make setup-vllm`). Every engine is up all the time, one works at a time. The
draft is the pair's with what it learnt from the demo's traffic; vLLM gets it as a version, by a swap.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.adapted import Adapter, Cycle, adapter_for
from benchmarks.engine_modes import EngineMode
from benchmarks.lineup import Lineup
from benchmarks.modes import FIXED_DRAFT_TOKENS, Mode, ModeOutcome, Rounds
from benchmarks.prompts import demo_prompts
from buffer.names import DEFAULT_ROUTE
from buffer.records import AdapterManifest
from learner.settings import LearnerSettings
from serving.compiling import CompileChoice
from serving.engine.counters import acceptance_rate
from serving.local import load_engine
from serving.models.adapter import sha256_of
from serving.models.loading import load_pair
from serving.options import EngineOptions
from serving.serving_engine import DraftPort, ServingEngine

ARMS = ("everdraft_off", "everdraft_draft", "everdraft_adaptive", "vllm_off", "vllm_draft")
PROMPT_TOKENS, ROOM = 64, 256
PROMPTS_PER_TURN = 20


@dataclass(frozen=True)
class EnginesPlan:
    """What to measure."""

    target: str
    draft: str
    cache: Path
    clients: tuple[int, ...] = (1, 8, 16)
    turns: int = 3
    threads: int = 1
    num_output_tokens: int = 48
    compile: CompileChoice = "on"
    adapter: Path | None = None
    learner: LearnerSettings = field(default_factory=LearnerSettings)


def measure_engines(
    plan: EnginesPlan, on_cycle: Callable[[Cycle], None], report: Callable[[str], None]
) -> dict[str, Any]:
    """By number of clients and arm: tokens a second, over no speculation of the same engine, acceptance."""
    pair = load_pair(plan.target, plan.draft)
    adapter = adapter_for(pair, plan.adapter, plan.cache, plan.learner, on_cycle)
    lineup = Lineup({arm: _maker(plan, arm, adapter) for arm in ARMS})
    prompts = demo_prompts(pair.tokenizer, PROMPT_TOKENS)
    found: dict[str, Any] = {"arms": list(ARMS), "by_clients": {}, "identical": {}}
    try:
        for clients in plan.clients:
            outcomes: dict[str, list[ModeOutcome]] = {arm: [] for arm in ARMS}
            count = -(-PROMPTS_PER_TURN // clients) * clients
            for turn in range(plan.turns + 1):
                asked = list(islice(prompts, count))
                for arm in ARMS:
                    report(f"{clients} at once, turn {turn} of {plan.turns}: {arm}")
                    outcome = lineup.run(
                        arm,
                        asked,
                        concurrency=clients,
                        num_tokens=plan.num_output_tokens,
                        temperature=0.0,
                    )
                    if isinstance(outcome, str):
                        raise RuntimeError(f"{arm} could not run: {outcome}")
                    if turn:
                        outcomes[arm].append(outcome)
            found["by_clients"][str(clients)] = {
                arm: _figures(own, outcomes[f"{arm.split('_')[0]}_off"], outcomes["vllm_off"])
                for arm, own in outcomes.items()
            }
            found["identical"][str(clients)] = _identical(outcomes)
    finally:
        lineup.close()
    return found


def _figures(own: list[ModeOutcome], off: list[ModeOutcome], vllm_off: list[ModeOutcome]) -> dict[str, float]:
    rounds = sum((outcome.rounds or Rounds() for outcome in own), Rounds())
    return {
        "tokens_per_s": statistics.median(outcome.tokens_per_s for outcome in own),
        "over_own_off": _ratio(own, off),
        "over_vllm_off": _ratio(own, vllm_off),
        "acceptance_rate": acceptance_rate(rounds.num_accepted, rounds.num_attempted),
    }


def _ratio(own: list[ModeOutcome], other: list[ModeOutcome]) -> float:
    return statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in zip(own, other, strict=True))


def _identical(outcomes: dict[str, list[ModeOutcome]]) -> dict[str, float]:
    """By engine: share of answers that drafting left as they were; and of vLLM's that are ours."""
    pairs = {
        "everdraft": ("everdraft_draft", "everdraft_off"),
        "vllm": ("vllm_draft", "vllm_off"),
        "vllm_as_everdraft": ("vllm_off", "everdraft_off"),
    }
    return {
        name: statistics.fmean(
            left == right
            for one, other in zip(outcomes[a], outcomes[b], strict=True)
            for left, right in zip(one.output_token_ids, other.output_token_ids, strict=True)
        )
        for name, (a, b) in pairs.items()
    }


def _maker(plan: EnginesPlan, arm: str, adapter: Adapter | None) -> Callable[[], Mode]:
    engine_name, _, mode = arm.partition("_")

    def make() -> Mode:
        engine = load_one(plan, engine_name, mode)
        drafts: DraftPort[Any] | None = engine.drafts
        if adapter is not None and mode != "off" and drafts is not None:
            staged = drafts.stage(DEFAULT_ROUTE, manifest_of(engine, adapter), adapter.weights)
            drafts.swap(DEFAULT_ROUTE, staged)
        return EngineMode(engine, cap=None)

    return make


def load_one(plan: EnginesPlan, engine_name: str, mode: str) -> ServingEngine:
    """`everdraft` or `vllm`, which drafts as `mode` says: off, draft (a fixed length), adaptive."""
    options = EngineOptions(
        num_slots=max(plan.clients),
        max_seq_len=ROOM,
        num_draft_tokens={"off": 0, "draft": FIXED_DRAFT_TOKENS, "adaptive": None}[mode],
        speculation="model",
        compile=plan.compile,
        prefix_cache_mib=0,
    )
    if engine_name == "vllm":
        from serving.engines.async_llm.engine import load_async_llm

        return load_async_llm(plan.target, plan.draft, options, num_threads=plan.threads)
    return load_engine(plan.target, plan.draft, options)


def manifest_of(engine: Any, adapter: Adapter) -> AdapterManifest:
    """Version 1 of what was learnt."""
    config = json.loads(adapter.config_json)
    return AdapterManifest(
        route=DEFAULT_ROUTE,
        draft_version=1,
        parent_version=0,
        draft_id=engine.pair.draft_id,
        draft_revision=engine.pair.draft_revision,
        target_revision=engine.target_revision,
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        target_modules=tuple(config["target_modules"]),
        adapter_config_json=adapter.config_json,
        sha256=sha256_of(adapter.weights),
        num_bytes=len(adapter.weights),
        created_at_s=0.0,
    )
