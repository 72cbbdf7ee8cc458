"""What everdraft costs a vLLM that it runs in: the gap that a swap leaves in streams, and capture's price.

Gaps are those that a client sees: between two events of one stream, many streams at once.
"""

import statistics
import threading
import time
from itertools import islice, pairwise
from typing import Any

import numpy as np

from benchmarks.engine_modes import ask_by_clients
from benchmarks.engines import PROMPT_TOKENS, ROOM, manifest_of
from benchmarks.modes import FIXED_DRAFT_TOKENS
from benchmarks.prompts import demo_prompts
from buffer.names import DEFAULT_ROUTE
from serving.engine.request import GenerationRequest, SamplingParams
from serving.options import EngineOptions

NUM_CLIENTS, NUM_SWAPS = 8, 10
LONG_TOKENS = 180


def measure_overheads(target: str, draft: str, adapter: Any, *, pairs: int, threads: int) -> dict[str, Any]:
    """`adapter`: swapped in and out. `pairs`: turns with and without capture."""
    from serving.engines.async_llm.engine import load_async_llm

    options = EngineOptions(
        num_slots=NUM_CLIENTS,
        max_seq_len=ROOM,
        num_draft_tokens=FIXED_DRAFT_TOKENS,
        speculation="model",
        compile="on",
        prefix_cache_mib=0,
    )
    with load_async_llm(target, draft, options, num_threads=threads) as engine:
        prompts = demo_prompts(engine.tokenizer, PROMPT_TOKENS)
        sampling = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
        ask_by_clients(engine, list(islice(prompts, 2 * NUM_CLIENTS)), sampling, NUM_CLIENTS)
        return {
            "swap": _gaps(engine, adapter, prompts),
            "capture": _capture(engine, prompts, sampling, pairs),
        }


def _gaps(engine: Any, adapter: Any, prompts: Any) -> dict[str, Any]:
    """The largest gap of any stream that a swap fell into, over the median gap of that run."""
    ratios, applied_s, medians_s = [], [], []
    for number in range(NUM_SWAPS):
        seen: list[list[float]] = [[] for _ in range(NUM_CLIENTS)]
        sampling = SamplingParams(temperature=0.0, max_tokens=LONG_TOKENS, ignore_eos=True)
        handles = [
            engine.submit(
                GenerationRequest(f"gap-{number}-{client}", tuple(prompt), sampling),
                lambda event, times=times: times.append(time.perf_counter()),
            )
            for client, (prompt, times) in enumerate(zip(islice(prompts, NUM_CLIENTS), seen, strict=True))
        ]
        while min(map(len, seen)) < 20:
            time.sleep(0.005)
        manifest = manifest_of(engine, adapter, number + 1) if number % 2 == 0 else None
        staged = engine.drafts.stage(DEFAULT_ROUTE, manifest, adapter.weights if manifest else b"")
        began_s = time.perf_counter()
        applied_s.append(engine.drafts.swap(DEFAULT_ROUTE, staged).swap_s)
        ended_s = time.perf_counter()
        for handle in handles:
            handle.result(120)
        gaps = [(b - a, a, b) for times in seen for a, b in pairwise(times)]
        median_s = statistics.median(gap for gap, _, _ in gaps)
        largest_s = max(gap for gap, a, b in gaps if b > began_s and a < ended_s)
        medians_s.append(median_s)
        ratios.append(largest_s / median_s)
    return {
        "num_swaps": NUM_SWAPS,
        "largest_gap_over_median": max(ratios),
        "median_of_gaps_over_median": statistics.median(ratios),
        "median_gap_s": statistics.median(medians_s),
        "applied_s_max": max(applied_s),
    }


def _capture(engine: Any, prompts: Any, sampling: SamplingParams, pairs: int) -> dict[str, Any]:
    """Cost as a share of tokens a second: 1 - with / without, by pair, in turn."""
    costs = []
    for number in range(pairs):
        asked = list(islice(prompts, 2 * NUM_CLIENTS))
        rates = {}
        for capture in (False, True) if number % 2 else (True, False):
            rates[capture] = _rate(engine, asked, sampling, capture)
        costs.append(1.0 - rates[True] / rates[False])
    mean, error = statistics.fmean(costs), statistics.stdev(costs) / np.sqrt(len(costs))
    return {
        "num_pairs": pairs,
        "cost_mean": mean,
        "cost_median": statistics.median(costs),
        "cost_upper_95": mean + 1.645 * float(error),
    }


def _rate(engine: Any, prompts: list[list[int]], sampling: SamplingParams, capture: bool) -> float:
    """Tokens a second, NUM_CLIENTS at once."""
    room = threading.Semaphore(NUM_CLIENTS)
    began_s = time.perf_counter()
    handles = []
    for number, prompt in enumerate(prompts):
        room.acquire()
        handles.append(
            engine.submit(
                GenerationRequest(f"c-{number}", tuple(prompt), sampling, capture=capture),
                lambda event: room.release() if event.generation is not None else None,
            )
        )
    num_tokens = sum(len(handle.result(120).output_token_ids) for handle in handles)
    return num_tokens / (time.perf_counter() - began_s)
