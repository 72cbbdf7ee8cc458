"""Our engine in every way it may draft, each with an engine of its own on the same weights."""

import copy
import queue
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.modes import FIXED_DRAFT_TOKENS, Mode, ModeOutcome, ModeUnavailableError, Rounds
from serving.compiling import CompileChoice
from serving.engine.proposal import COPIED
from serving.engine.request import Generation, GenerationRequest, SamplingParams, TokenEvent
from serving.local import build_engine
from serving.models.loading import ModelPair
from serving.options import EngineOptions, Speculation
from serving.serving_engine import ServingEngine

RANDOM_SEED = 0


def make_engines(
    pair: ModelPair,
    adapted: nn.Module | None,
    *,
    num_slots: int,
    max_seq_len: int,
    compile: CompileChoice = "off",
) -> dict[str, Callable[[], Mode]]:
    """By mode, makers of it. `adapted` is the pair's draft with the adapter in it, if there is one. No prefix
    is reused: whatever came before in a turn must not matter."""

    def engine(
        draft: nn.Module | None,
        speculation: Speculation,
        *,
        fixed: int | None = None,
        cap: int | None = None,
    ) -> Mode:
        if draft is None:
            raise ModeUnavailableError("there is no adapted draft")
        built = build_engine(
            replace(pair, draft=draft),
            options=EngineOptions(
                num_slots=num_slots,
                max_seq_len=max_seq_len,
                num_draft_tokens=fixed,
                speculation=speculation,
                compile=compile,
                prefix_cache_mib=0,
            ),
        )
        return EngineMode(built, cap=cap)

    fixed = FIXED_DRAFT_TOKENS
    return {
        "engine_off": lambda: engine(pair.draft, "model", cap=0),
        "engine_floor": lambda: engine(pair.draft, "model", fixed=fixed),
        "engine_adapted": lambda: engine(adapted, "model", fixed=fixed),
        "engine_ngram": lambda: engine(pair.draft, "ngram"),
        "engine_adaptive": lambda: engine(adapted, "auto"),
        "engine_adaptive_random_draft": lambda: engine(random_like(pair.draft), "model"),
    }


class EngineMode:
    """An engine, and a cap on the draft length of its requests. With `ignore_eos` off answers end where the
    target ends them, and `num_tokens` is the most."""

    def __init__(self, engine: ServingEngine, *, cap: int | None, ignore_eos: bool = True) -> None:
        self._engine, self._cap, self._ignore_eos = engine, cap, ignore_eos

    def generate(
        self, prompts: list[list[int]], *, concurrency: int, num_tokens: int, temperature: float
    ) -> ModeOutcome:
        sampling = SamplingParams(
            temperature=temperature,
            max_tokens=num_tokens,
            ignore_eos=self._ignore_eos,
            num_draft_tokens=self._cap,
        )
        copied_before = self._num_copied()
        began_s = time.perf_counter()
        generations = ask_by_clients(self._engine, prompts, sampling, concurrency)
        wall_s = time.perf_counter() - began_s
        rounds = Rounds(
            num_rounds=sum(generation.num_rounds for generation in generations),
            num_drafted=sum(generation.num_drafted for generation in generations),
            num_copied=self._num_copied() - copied_before,
            num_attempted=sum(generation.num_attempted for generation in generations),
            num_accepted=sum(generation.num_accepted for generation in generations),
        )
        return ModeOutcome(wall_s, [generation.output_token_ids for generation in generations], rounds)

    def close(self) -> None:
        self._engine.close()

    def _num_copied(self) -> int:
        counters = self._engine.stats().counts.get(COPIED)
        return 0 if counters is None else counters.num_drafted


def ask_by_clients(
    engine: ServingEngine, prompts: list[list[int]], sampling: SamplingParams, num_clients: int
) -> list[Generation]:
    """All prompts, `num_clients` under way at any time; in the order of the prompts."""
    requests = [
        GenerationRequest(f"client-{index}", tuple(prompt), sampling) for index, prompt in enumerate(prompts)
    ]
    waiting = iter(requests[num_clients:])
    answered: queue.SimpleQueue[Generation] = queue.SimpleQueue()

    def on_event(event: TokenEvent) -> None:
        if event.generation is not None:
            answered.put(event.generation)
            if following := next(waiting, None):
                engine.submit(following, on_event)

    for request in requests[:num_clients]:
        engine.submit(request, on_event)
    found = [answered.get() for _ in requests]
    by_id = {generation.request_id: generation for generation in found}
    return [by_id[request.request_id] for request in requests]


def random_like(draft: nn.Module | None) -> nn.Module | None:
    """A draft of the same shape that has learnt nothing."""
    if draft is None:
        return None
    like: Any = draft
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model: nn.Module = AutoModelForCausalLM.from_config(
            copy.deepcopy(like.config), dtype=like.dtype, attn_implementation="sdpa"
        )
    return model.to(like.device).eval().requires_grad_(False)
