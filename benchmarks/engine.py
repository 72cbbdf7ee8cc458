"""What a pass costs, and tokens a second with and without drafting, in this process.

Every figure is a median over turns in which all arms run once (A B A B ...), so drift hits them alike.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from rich.table import Table

from deploy.demo.corpus import DOMAINS, prompts
from serving.engine import SamplingParams
from serving.engine.cost_measurement import pass_s
from serving.engine.counters import acceptance_rate
from serving.engine.passes.runner import Runner
from serving.local import LocalEngine, load_engine
from serving.options import EngineOptions

BATCHES = (1, 8)
CONTEXT_TOKENS = 128
MAX_TOKENS = 64


def measure(target: str, draft: str, *, device: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Figures by batch size; seconds, tokens a second, and plain ratios."""
    metrics: dict[str, Any] = {"device": device, "dtype": dtype, "repeats": repeats}
    with load_engine(
        target,
        draft,
        options=EngineOptions(num_slots=max(BATCHES), speculation="model", prefix_cache_mib=0),
        device=device,
        dtype=dtype,
    ) as engine:
        for batch in BATCHES:
            metrics[f"batch_{batch}"] = _passes(engine, batch, repeats) | _generation(engine, batch, repeats)
    return metrics


def table(metrics: dict[str, Any]) -> Table:
    """The same figures for people."""
    shown = Table("figure", *(f"batch {batch}" for batch in BATCHES), box=None, padding=(0, 2, 0, 0))
    for name in metrics[f"batch_{BATCHES[0]}"]:
        shown.add_row(name, *(f"{metrics[f'batch_{batch}'][name]:.4g}" for batch in BATCHES))
    return shown


def _passes(engine: LocalEngine, batch: int, repeats: int) -> dict[str, float]:
    """One-token and five-token passes of both models over a context, by turns, the engine idle. The
    draft's first pass after the target's finds its weights out of the processor's cache, unlike the next."""
    assert engine.pair.draft is not None
    target = Runner(engine.pair.target, num_slots=batch, max_seq_len=2 * CONTEXT_TOKENS)
    draft = Runner(engine.pair.draft, num_slots=batch, max_seq_len=2 * CONTEXT_TOKENS)
    arms: dict[str, Callable[[], float]] = {
        "target_pass_1_s": lambda: pass_s(target, batch, 1, CONTEXT_TOKENS),
        "target_pass_5_s": lambda: pass_s(target, batch, 5, CONTEXT_TOKENS),
        "draft_pass_first_s": lambda: pass_s(draft, batch, 1, CONTEXT_TOKENS),
        "draft_pass_next_s": lambda: pass_s(draft, batch, 1, CONTEXT_TOKENS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(10 * repeats):
        for name, run in arms.items():
            seconds[name].append(run())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians | {
        f"target_over_draft_{which}": medians["target_pass_1_s"] / medians[f"draft_pass_{which}_s"]
        for which in ("first", "next")
    }


def _generation(engine: LocalEngine, batch: int, repeats: int) -> dict[str, float]:
    """Greedy tokens a second, speculation off and on (the controller chooses), on held-out prompts."""
    token_ids = _prompts(engine, batch)
    arms = {"no_speculation": 0, "floor": None}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    attempted = accepted = 0
    for turn in range(repeats + 1):
        for name, cap in arms.items():
            sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, num_draft_tokens=cap)
            began_s = time.perf_counter()
            generations = engine.generate(token_ids, sampling)
            wall_s = time.perf_counter() - began_s
            if turn == 0:
                continue  # warm-up
            rates[name].append(sum(len(g.output_token_ids) for g in generations) / wall_s)
            attempted += sum(g.num_attempted for g in generations)
            accepted += sum(g.num_accepted for g in generations)
    figures = {f"tokens_per_s_{name}": statistics.median(values) for name, values in rates.items()}
    ratios = [on / off for on, off in zip(rates["floor"], rates["no_speculation"], strict=True)]
    return figures | {
        "floor_over_no_speculation": statistics.median(ratios),
        "acceptance_rate_floor": acceptance_rate(accepted, attempted),
    }


def _prompts(engine: LocalEngine, count: int) -> list[list[int]]:
    """Held-out prompts, the domains in turn."""
    assert engine.pair.tokenizer is not None, "this measurement sends chat prompts"
    streams = [prompts(domain, "heldout", seed=1) for domain in DOMAINS]
    chosen = [next(streams[index % len(streams)]) for index in range(count)]
    return [
        list(
            engine.pair.tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, return_dict=False
            )
        )
        for prompt in chosen
    ]
