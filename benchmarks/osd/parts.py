"""Which part of a target should draft: acceptance after equal learner seconds, the cost of a pass, and the
speed that follows.

Every part learns from the same stream of one domain; the pair's draft with LoRA is the row to compare with.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.forwards import ForwardTimes, measure_forwards, pass_runners
from benchmarks.osd.jobs import Job, Result
from benchmarks.osd.per_domain import first_at
from benchmarks.osd.plan import ExperimentPlan, Metrics, Series
from serving.compiling import CompileChoice
from serving.engine.counters import expected_block_efficiency
from serving.engine.draft_length import MAX_DRAFT_TOKENS
from serving.engine.passes.kv_shape import KvShape
from serving.models.target_part import own_parameters
from serving.part_choice import smaller_head

EXIT_LAYERS = (0, 1, 2, 4, 7)
NUM_RECORDS = 600
LEARNER_S = (10.0, 30.0)
LORA = "draft model"
CONTEXT_TOKENS = 128


def parts(plan: ExperimentPlan, compile: CompileChoice = "auto") -> tuple[Metrics, Series]:
    """By part: acceptance at the start, after some learner seconds and at the end; milliseconds of a pass;
    the best draft length at the final acceptance, and the speed predicted for it."""
    domain, count = plan.domains[0], min(plan.num_records, NUM_RECORDS)
    shape = KvShape.of(plan.cache.pair().target)
    names = [
        f"self:{layer}{block}{head}"
        for head in ("", *(f":{kept}" for kept in (smaller_head(shape.vocab_size),) if kept))
        for layer in EXIT_LAYERS
        if layer < shape.num_layers
        for block in ("" if each == "whole" else f":{each}" for each in plan.blocks)
    ]
    jobs = {
        name: Job("ours", (domain,), num_records=count, evaluate_every=50, draft="" if name == LORA else name)
        for name in (LORA, *names)
    }
    results = plan.work(jobs.values())
    metrics: Metrics = {"domain": domain, "num_records": count, "parts": {}}
    series: Series = {}
    for name, job in jobs.items():
        plan.report(f"what a pass of {name} costs")
        metrics["parts"][name] = _row(plan, job, results[job], domain, compile)
        curve = [
            list(point) for point in zip(results[job].looks_s, _values(results[job], domain), strict=True)
        ]
        series[f"{name}/learner_s"] = curve
    final = metrics["parts"][LORA]["acceptance_rate"]
    metrics["learner_s_to_reach_the_draft_model"] = {
        name: first_at(curve, final)
        for name, curve in ((key.split("/")[0], value) for key, value in series.items())
    }
    return metrics, series


def _row(
    plan: ExperimentPlan, job: Job, result: Result, domain: str, compile: CompileChoice
) -> dict[str, Any]:
    pair = plan.pair_with(job.draft)
    runners = pass_runners(pair, num_slots=1, max_seq_len=2 * CONTEXT_TOKENS, compile=compile)
    times = measure_forwards(runners, batch_size=1, context_tokens=CONTEXT_TOKENS)
    values, final = _values(result, domain), result.final[domain].acceptance
    length, speed = best_length(times, final)
    assert pair.draft is not None
    return {
        "acceptance_at_start": values[0],
        **{f"acceptance_after_{at_s:g}_s": at(result.looks_s, values, at_s) for at_s in LEARNER_S},
        "acceptance_rate": final,
        "learner_s": result.learner_s,
        "own_weights": sum(weight.numel() for weight in own_parameters(pair.draft).values()),
        "draft_pass_ms": 1000 * times.draft_pass_s[1],
        "target_pass_ms": 1000 * times.target_pass_s[0],
        "passes": runners.passes,
        "num_draft_tokens": length,
        "predicted_speedup": speed,
    }


def _values(result: Result, domain: str) -> list[float]:
    return [value for _, value in result.held_out[domain]]


def at(looks_s: Sequence[float], values: Sequence[float], wanted_s: float) -> float | None:
    """Acceptance at the last look before so many learner seconds; None if learning ended earlier."""
    if looks_s[-1] < wanted_s:
        return None
    return [value for look_s, value in zip(looks_s, values, strict=True) if look_s <= wanted_s][-1]


def best_length(times: ForwardTimes, acceptance: float) -> tuple[int, float]:
    """The draft length of the greatest predicted speed-up, and that speed-up."""
    speeds = {
        length: times.predicted_speedup(expected_block_efficiency([acceptance] * length), length, length)
        for length in range(1, MAX_DRAFT_TOKENS + 1)
    }
    best = max(speeds, key=lambda length: speeds[length])
    return best, speeds[best]
