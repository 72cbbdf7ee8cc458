"""Ours with one setting changed at a time, and what a record loses of the target's rows.

Invariant: every value of a setting met the same requests in the same order.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, get_args

from benchmarks.adapted import Adapter
from benchmarks.osd.arms import NUM_DRAFT_TOKENS, settings_of, trainable
from benchmarks.osd.jobs import Job
from benchmarks.osd.kept_rows import acceptance_from, bytes_per_token
from benchmarks.osd.plan import SELF, Changes, ExperimentPlan, Metrics, Series, label
from benchmarks.osd.recorded_answers import Asking, RecordedAnswer
from benchmarks.osd.speed import adapted
from learner.draft import import_weights
from learner.settings import DivergenceName
from serving.engine.counters import acceptance_rate
from serving.engine.request import GenerationRequest, SamplingParams
from serving.local import build_engine
from serving.options import EngineOptions

NUM_RECORDS = 600
WHOLE_ROWS = 1 << 20
MOST_SAMPLED = 1024
"""Whole rows of sampled records do not fit into 24 GB beside their replay; so many hold nearly all."""
_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ABLATIONS: Mapping[str, Mapping[str, Changes]] = {
    "divergence": {name: (("divergence", name),) for name in get_args(DivergenceName)},
    "learning_rate": {f"{rate:g}": (("learning_rate", rate),) for rate in (3e-4, 1e-3, 3e-3, 1e-2)},
    "mean_over_steps": {str(count): (("mean_over_steps", count),) for count in (0, 60, 200)},
    "target_modules": {
        "layers": (("target_modules", _LAYERS),),
        "and head": (("target_modules", (*_LAYERS, "lm_head")),),
        "and head, embedding": (),
    },
    "replay_share": {f"{share:g}": (("replay_share", share),) for share in (0.0, 0.25, 0.5)},
    "passes_over_fresh": {f"{passes:g}": (("passes_over_fresh", passes),) for passes in (1.0, 2.0, 4.0)},
    "lora_rank": {
        **{str(rank): (("lora_rank", rank), ("lora_alpha", 2.0 * rank)) for rank in (4, 8, 16, 32, 64)},
        "full": (("trainable", "full"),),
    },
    "min_records_per_cycle": {
        str(count): (("min_records_per_cycle", count),) for count in (4, 8, 16, 32, 64)
    },
}
PART_ABLATIONS = ("learning_rate", "mean_over_steps", "passes_over_fresh")
"""Tried with the target's part too, which learns more weights from the start."""


def ablations(plan: ExperimentPlan) -> tuple[Metrics, Series]:
    """Ours with one setting changed at a time, on the first domain of the plan, and what records lose."""
    domain, count = plan.domains[0], min(plan.num_records, NUM_RECORDS)
    jobs = _ablation_jobs(domain, count, plan.part)
    if plan.ablations:
        jobs = {(what, value): job for (what, value), job in jobs.items() if what in plan.ablations}
    results = plan.work(jobs.values())
    metrics: Metrics = {"domain": domain, "num_records": count}
    for (what, value), job in jobs.items():
        result = results[job]
        row = {
            "acceptance_rate": result.final[domain].acceptance,
            "interval": [result.final[domain].low, result.final[domain].high],
            "mean_while_learning": sum(result.accepted) / max(1, sum(result.attempted)),
            "learner_s": result.learner_s,
        }
        if what.startswith("num_kept"):
            row["bytes_per_token"] = bytes_per_token(min(job.num_kept, plan.cache.pair().vocab_size))
        metrics.setdefault(what, {})[value] = row
    if plan.ablations:
        return metrics, {}
    folder = results[jobs["divergence", "forward_kl"]].adapter
    metrics["estimator"] = _estimator(plan, domain, folder)
    metrics["sampling"] = _sampling(plan, domain, folder)
    return metrics, {}


def ablation_names() -> list[str]:
    return sorted({what for what, _ in _ablation_jobs("", 1, "")})


def _ablation_jobs(domain: str, count: int, part: str) -> dict[tuple[str, str], Job]:
    jobs = {
        (what, value): Job("ours", (domain,), num_records=count, settings=changes)
        for what, values in ABLATIONS.items()
        for value, changes in values.items()
    }
    for temperature, most in ((0.0, WHOLE_ROWS), (1.0, MOST_SAMPLED)):
        for kept in (8, 32, 128, most):
            name = "whole rows" if kept == WHOLE_ROWS else str(kept)
            jobs[label("num_kept", temperature), name] = Job(
                "ours", (domain,), temperature, num_records=count, num_kept=kept
            )
    for weight in (0.0, 0.5, 1.0):
        changes: Changes = (("rejected_suffix_weight", weight),)
        jobs["rejected_suffix_weight", f"{weight:g}"] = Job(
            "through_engine", (domain,), num_records=count, settings=changes
        )
        jobs[f"{SELF}/rejected_suffix_weight", f"{weight:g}"] = Job(
            "through_engine", (domain,), num_records=count, settings=changes, draft=part
        )
    for what in PART_ABLATIONS:
        for value, changes in ABLATIONS[what].items():
            own = Job("ours", (domain,), num_records=count, settings=changes, draft=part)
            jobs[f"{SELF}/{what}", value] = own
    jobs["through", "engine"] = jobs["rejected_suffix_weight", "0"]
    jobs["through", "replay"] = Job("ours", (domain,), num_records=count)
    return jobs


def _estimator(plan: ExperimentPlan, domain: str, folder: str) -> Metrics:
    """Of the floor and of what ours learnt, on held-out prompts, at both temperatures."""
    cache, found = plan.cache, {}
    draft = trainable(cache.pair(), settings_of("ours", {}))
    states = {"floor": None, "ours": import_weights(Adapter.load(Path(folder)).weights) if folder else None}
    for temperature in plan.temperatures:
        recorded = cache.held_out(domain, temperature)
        for name, state in states.items():
            draft.load(state)
            found[label(name, temperature)] = acceptance_from(
                cache.pair(), draft, recorded, cache.replay(NUM_DRAFT_TOKENS)
            )
    return found


def _sampling(plan: ExperimentPlan, domain: str, folder: str) -> Metrics:
    """Coupled draws (a seed for each request) against standard ones, of what ours learnt, at temperature 1
    through the engine; twice each, so that the spread is seen."""
    recorded, pair = plan.cache.held_out(domain, 1.0), plan.cache.pair()
    room, found = plan.cache.asking.prompt_tokens + plan.cache.asking.max_tokens, dict[str, Any]()
    with build_engine(
        replace(pair, draft=adapted(pair, folder)),
        options=EngineOptions(
            num_slots=8, max_seq_len=room, num_draft_tokens=NUM_DRAFT_TOKENS, speculation="model"
        ),
    ) as engine:
        for turn in range(2):
            for mode in ("standard", "coupled"):
                seeds = (
                    range(turn * len(recorded), (turn + 1) * len(recorded))
                    if mode == "coupled"
                    else repeat(None)
                )
                handles = [
                    engine.submit(_sampled(f"{mode}-{turn}-{number}", one, seed, plan.cache.asking))
                    for number, (one, seed) in enumerate(zip(recorded, seeds, strict=False))
                ]
                answers = [handle.result() for handle in handles]
                accepted, attempted = (
                    sum(answer.num_accepted for answer in answers),
                    sum(answer.num_attempted for answer in answers),
                )
                found.setdefault(mode, []).append(acceptance_rate(accepted, attempted))
    return found


def _sampled(name: str, recorded: RecordedAnswer, seed: int | None, asking: Asking) -> GenerationRequest:
    sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=asking.max_tokens)
    return GenerationRequest(name, tuple(recorded.prompt_token_ids.tolist()), sampling)
