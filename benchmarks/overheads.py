"""What the engine costs beside the models: a round's own time, capture, and a draft that never pays.

Everything is compared in turn (A B B A ...) on the same prompts in one process; a ratio is of neighbours, a
bound is of the pairs' mean ratio (bootstrap over pairs, 95 %, one-sided).
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from benchmarks.engine_modes import random_like
from benchmarks.forwards import pass_runners
from buffer.exporter import RecordExporter
from buffer.redis_server import EmbeddedRedis
from buffer.redis_store import RedisRecordStore
from serving.compiling import CompileChoice, Compiling
from serving.drafters.model_drafter import ModelDrafter
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.core import EngineCore
from serving.engine.cost_measurement import measure_costs
from serving.engine.draft_length import DraftLengthController
from serving.engine.engine import Engine
from serving.engine.passes.runner import Runner
from serving.engine.request import TokenEvent
from serving.local import build_engine
from serving.models.loading import ModelPair
from serving.options import EngineOptions
from serving.recorder import Recorder, RecordPlace
from serving.runner_check import prepare_runner
from serving.serving_engine import ServingEngine

BATCHES = (1, 8)
MAX_SEQ_LEN = 512
FIXED_DRAFT_TOKENS = 4
NUM_TOKENS = 64
WARM_UP_TOKENS = 2000
NUM_RESAMPLES = 2000

Report = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """A pair whose draft is adapted, and prompts that never end."""

    pair: ModelPair
    prompts: Iterator[list[int]]
    num_pairs: int
    compile: CompileChoice
    report: Report

    def take(self, count: int) -> list[list[int]]:
        return list(itertools.islice(self.prompts, count))

    def options(self, batch: int) -> EngineOptions:
        return EngineOptions(
            num_slots=batch,
            max_seq_len=MAX_SEQ_LEN,
            compile=self.compile,
            speculation="model",
            prefix_cache_mib=0,
        )


def measure(work: Work) -> dict[str, Any]:
    """All three, by batch size."""
    passes = pass_runners(
        work.pair, num_slots=max(BATCHES), max_seq_len=MAX_SEQ_LEN, compile=work.compile
    ).passes
    return {
        "passes": passes,
        "outside_forwards": _outside_forwards(work),
        "capture": {f"batch_{batch}": _capture(work, batch) for batch in BATCHES},
        "random_draft": {f"batch_{batch}": _random_draft(work, batch) for batch in BATCHES},
    }


class TimedRunner(Runner):
    """Adds up how long its forwards take."""

    forwards_s = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        began_s = time.perf_counter()
        logits = super().forward(*args, **kwargs)
        self.forwards_s += time.perf_counter() - began_s
        return logits


def _outside_forwards(work: Work) -> dict[str, dict[str, float]]:
    """Milliseconds a round spends outside both models' forwards, all the engine's thread does included:
    rounds, choices of length, commands, events. Median of the turns."""
    target, draft = (
        TimedRunner(model, num_slots=max(BATCHES), max_seq_len=MAX_SEQ_LEN)
        for model in (work.pair.target, _required(work.pair.draft))
    )
    for runner, name in ((target, work.pair.target_id), (draft, work.pair.draft_id)):
        prepare_runner(runner, name)
    Compiling(target, draft, work.compile)
    costs = measure_costs(target, draft)
    controller = DraftLengthController(costs, fixed=FIXED_DRAFT_TOKENS)
    kinds = {
        "no_speculation": SamplingParams(temperature=0.0, num_draft_tokens=0, max_tokens=NUM_TOKENS),
        "greedy": SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS),
        "temperature_1": SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS),
    }
    found: dict[str, dict[str, float]] = {}
    with Engine(EngineCore(target, ModelDrafter(draft), controller=controller, costs=costs)) as engine:
        for batch in BATCHES:
            each: dict[str, list[float]] = {kind: [] for kind in kinds}
            for turn in range(work.num_pairs):
                work.report(f"a round's own time, {batch} at once, turn {turn + 1}")
                for kind, params in kinds.items():
                    each[kind].append(_own_ms(engine, target, draft, work.take(batch), params))
            found[f"batch_{batch}"] = {kind: statistics.median(values) for kind, values in each.items()}
    return found


def _own_ms(
    engine: Engine,
    target: TimedRunner,
    draft: TimedRunner,
    prompts: list[list[int]],
    params: SamplingParams,
) -> float:
    """Between the events by which all sequences run and the first one ends."""
    clocks: list[tuple[float, float, bool]] = []
    first: set[str] = set()

    def on_event(event: TokenEvent) -> None:
        forwards_s = target.forwards_s + draft.forwards_s
        first.add(event.request_id)
        if len(first) == len(prompts):
            clocks.append((time.perf_counter(), forwards_s, event.generation is not None))

    params = replace(params, ignore_eos=True)
    requests = [GenerationRequest(str(row), tuple(prompt), params) for row, prompt in enumerate(prompts)]
    for handle in [engine.submit(request, on_event) for request in requests]:
        handle.result()
    num_running = next(index for index, (_, _, ended) in enumerate(clocks) if ended)
    rounds = clocks[: num_running - num_running % len(prompts)][:: len(prompts)]
    wall_s = rounds[-1][0] - rounds[0][0]
    return 1e3 * (wall_s - (rounds[-1][1] - rounds[0][1])) / (len(rounds) - 1)


def _capture(work: Work, batch: int) -> dict[str, Any]:
    with build_engine(work.pair, work.options(batch)) as engine:
        return capture_cost(work, engine, batch)


def capture_cost(work: Work, engine: ServingEngine, batch: int) -> dict[str, Any]:
    """Tokens a second with every request captured, recorded and exported to a real Redis, over without."""
    with EmbeddedRedis() as redis:
        store = RedisRecordStore(redis.url)
        exporter = RecordExporter(store)
        recorder = Recorder(
            {"replay": RecordPlace(exporter, ttl_s=3600.0)},
            target_revision=engine.target_revision,
            replica_id="bench",
            capture_rate=1.0,
        )

        def run(captured: bool, prompts: list[list[int]]) -> float:
            return _tokens_per_s(engine, prompts, recorder if captured else None)

        name = f"capture, {batch} at once"
        figures = _pairs(work, name, batch, lambda each: run(True, each), lambda each: run(False, each))
        dropped = exporter.num_dropped_records
        exporter.close()
        store.close()
    return figures | {"num_dropped_records": dropped}


def _random_draft(work: Work, batch: int) -> dict[str, Any]:
    """Adaptive with a draft that knows nothing, over the same engine with speculation off."""
    pair = replace(work.pair, draft=random_like(work.pair.draft))
    with build_engine(pair, work.options(batch)) as engine:
        num_tokens = 0
        while num_tokens < WARM_UP_TOKENS:
            _tokens_per_s(engine, work.take(batch), None)
            num_tokens += batch * NUM_TOKENS
        figures = _pairs(
            work,
            f"random draft, {batch} at once",
            batch,
            lambda prompts: _tokens_per_s(engine, prompts, None),
            lambda prompts: _tokens_per_s(engine, prompts, None, num_draft_tokens=0),
        )
        counts = engine.stats().counts.values()
        attempted = sum(each.num_attempted for each in counts)
        accepted = sum(each.num_accepted for each in counts)
    return figures | {"num_attempted": attempted, "num_accepted": accepted}


def _tokens_per_s(
    engine: ServingEngine,
    prompts: list[list[int]],
    recorder: Recorder | None,
    num_draft_tokens: int | None = None,
) -> float:
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, num_draft_tokens=num_draft_tokens
    )
    numbers = itertools.count()
    requests = [
        GenerationRequest(
            f"bench-{time.time_ns()}-{next(numbers)}", tuple(prompt), params, capture=recorder is not None
        )
        for prompt in prompts
    ]
    began_s = time.perf_counter()
    generations = [handle.result() for handle in [engine.submit(request) for request in requests]]
    if recorder is not None:
        for generation in generations:
            recorder.record(generation, "replay")
    wall_s = time.perf_counter() - began_s
    return sum(len(generation.output_token_ids) for generation in generations) / wall_s


def _pairs(
    work: Work,
    name: str,
    batch: int,
    with_it: Callable[[list[list[int]]], float],
    without: Callable[[list[list[int]]], float],
) -> dict[str, Any]:
    """Ratio of tokens a second, pair by pair, the order changing from pair to pair."""
    for run in (with_it, without):
        run(work.take(batch))
    ratios = []
    for number in range(work.num_pairs):
        work.report(f"{name}, pair {number + 1}")
        prompts = work.take(batch * max(1, 8 // batch))
        waves = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
        arms = [with_it, without] if number % 2 == 0 else [without, with_it]
        rates = {arm: statistics.harmonic_mean([arm(wave) for wave in waves]) for arm in arms}
        ratios.append(rates[with_it] / rates[without])
    return {
        "num_pairs": len(ratios),
        "ratio_median": statistics.median(ratios),
        "ratio_mean": statistics.fmean(ratios),
        "ratio_lower_95": lower_bound(ratios),
        "ratios": ratios,
    }


def lower_bound(values: list[float]) -> float:
    """The mean is above it with 95 % confidence."""
    generator = random.Random(0)
    means = [statistics.fmean(generator.choices(values, k=len(values))) for _ in range(NUM_RESAMPLES)]
    return sorted(means)[NUM_RESAMPLES // 20]


def _required(draft: nn.Module | None) -> nn.Module:
    assert draft is not None, "this measurement drafts"
    return draft
