"""Time to the first token of prompts that share their beginning, with prefix reuse and without, in turn.

Two engines on one pair, one idle while the other answers; every turn asks a
question of its own after the same system prompt, so only the system prompt can be reused. Medians.
"""

import statistics
import time
from dataclasses import replace
from typing import Any

from rich.table import Table

from deploy.demo.corpus import DOMAINS, prompts
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.request import Generation, TokenEvent
from serving.local import LocalEngine, build_engine
from serving.models.loading import ModelPair
from serving.options import EngineOptions

QUESTION_TOKENS = 24
MAX_TOKENS = 4


def measure(
    pair: ModelPair, *, system_tokens: int, repeats: int, num_draft_tokens: int | None
) -> dict[str, Any]:
    """Seconds by arm, and their ratio: the median of the turns' own ratios."""
    texts = _Texts(pair, system_tokens)
    firsts: dict[str, list[float]] = {"off": [], "on": []}
    reused = 0
    options = EngineOptions(
        num_slots=1,
        max_seq_len=2 * (system_tokens + QUESTION_TOKENS),
        num_draft_tokens=num_draft_tokens,
    )
    without = replace(options, prefix_cache_mib=0)
    with build_engine(pair, without) as off, build_engine(pair, options) as on:
        for turn in range(repeats + 1):
            question = texts.next_prompt()
            for name, engine in (("off", off), ("on", on)):
                first_s, generation = _first_token_s(engine, question)
                if turn == 0:
                    continue  # warm-up, and the one that fills the cache
                firsts[name].append(first_s)
                reused = max(reused, generation.num_prompt_tokens_reused)
        held_bytes = on.stats().prefix_cache.num_bytes
    return {
        "prompt_tokens": system_tokens + QUESTION_TOKENS,
        "prompt_tokens_reused": reused,
        "prefix_cache_bytes": held_bytes,
        "first_token_s_off": statistics.median(firsts["off"]),
        "first_token_s_on": statistics.median(firsts["on"]),
        "off_over_on": statistics.median(
            without / having for without, having in zip(firsts["off"], firsts["on"], strict=True)
        ),
    }


class _Texts:
    """One system prompt of held-out text, and a new question behind it every time."""

    def __init__(self, pair: ModelPair, system_tokens: int) -> None:
        assert pair.tokenizer is not None, "this measurement needs text"
        streams = [prompts(domain, "heldout", seed=1) for domain in DOMAINS]
        self._encode = pair.tokenizer.encode
        self._contents = (
            message["content"] for turn in zip(*streams, strict=False) for p in turn for message in p.messages
        )
        self._system = self._tokens(system_tokens)

    def next_prompt(self) -> tuple[int, ...]:
        return (*self._system, *self._tokens(QUESTION_TOKENS))

    def _tokens(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            found += self._encode(next(self._contents))
        return found[:count]


def _first_token_s(engine: LocalEngine, prompt: tuple[int, ...]) -> tuple[float, Generation]:
    arrivals: list[float] = []

    def note(event: TokenEvent) -> None:
        if event.token_ids:
            arrivals.append(time.perf_counter())

    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    began_s = time.perf_counter()
    generation = engine.submit(GenerationRequest("first", prompt, sampling), note).result()
    return arrivals[0] - began_s, generation


MODES = {"no_speculation": 0, "adaptive": None}
"""Draft length of the requests' engine, by name."""


def measure_modes(pair: ModelPair, *, system_tokens: int, repeats: int) -> dict[str, dict[str, Any]]:
    return {
        mode: measure(pair, system_tokens=system_tokens, repeats=repeats, num_draft_tokens=length)
        for mode, length in MODES.items()
    }


def table(metrics: dict[str, dict[str, Any]]) -> Table:
    """The same figures for people."""
    shown = Table("figure", *metrics, box=None, padding=(0, 2, 0, 0))
    for name in metrics["adaptive"]:
        shown.add_row(name, *(f"{metrics[mode][name]:.4g}" for mode in metrics))
    return shown
