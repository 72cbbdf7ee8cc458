"""The experiments as lists of jobs, and what their results say. Read `per_domain` first.

Knows no learner: a job is told what to do by names and settings alone. Invariant: figures are medians over
seeds, and every arm of a comparison saw the same requests in the same order.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.adapted import Adapter
from benchmarks.osd.arms import NUM_DRAFT_TOKENS, settings_of, trainable
from benchmarks.osd.jobs import Job, Result, run_all, tell_all
from benchmarks.osd.kept_rows import acceptance_from, bytes_per_token
from benchmarks.osd.workshop import Tell, Workshop
from learner.draft import import_weights

PAPER_RATES = (3e-4, 1e-3, 3e-3)
WINDOW = 50
"""Records of the moving average, as in the paper."""
THINNING = 10
"""Every so many records a point of a series."""
ABLATION_RECORDS, SHORT_RECORDS = 1000, 600
WHOLE_ROWS = 1 << 20

Series = dict[str, list[Any]]
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    workshop: Workshop
    domains: tuple[str, ...]
    num_records: int
    num_seeds: int
    num_processes: int
    tell: Tell
    temperatures: tuple[float, ...] = (0.0, 1.0)

    def told(self) -> None:
        """Ask the target for everything at once, so that every process finds it."""
        wanted = [(domain, temperature) for temperature in self.temperatures for domain in self.domains]
        tell_all(wanted, self.workshop, self.num_processes, self.tell)

    def work(self, jobs: Iterable[Job]) -> dict[Job, Result]:
        wanted = list(dict.fromkeys(jobs))
        number = 0

        def on_done(job: Job, result: Result) -> None:
            nonlocal number
            number += 1
            final = ", ".join(f"{name} {measured.acceptance:.3f}" for name, measured in result.final.items())
            self.tell(f"{number} of {len(wanted)}: {job}: {final}")

        return run_all(wanted, self.workshop, self.num_processes, on_done)


def label(domain: str, temperature: float) -> str:
    return f"{domain}@{temperature:g}" if temperature else domain


# one domain at a time


def per_domain(plan: Plan) -> tuple[Metrics, Series, dict[str, dict[str, str]]]:
    """Floor, the paper's setting at its best rate, ours, and the ceiling, on every domain. The last value:
    by domain and arm, the folder of the first seed's greedy adapter."""
    rates = paper_rates(plan)
    lives = {
        (domain, temperature, arm): [
            _life(plan, domain, temperature, arm, rates[domain], seed) for seed in _seeds(plan, temperature)
        ]
        for temperature in plan.temperatures
        for arm in ("floor", "ours", "paper", "offline", "offline_full")
        for domain in plan.domains
        if arm != "offline_full" or not temperature
    }
    results = plan.work(job for jobs in lives.values() for job in jobs)
    metrics: Metrics = {"paper_rate": rates}
    series: Series = {}
    adapters: dict[str, dict[str, str]] = {}
    for (domain, temperature, arm), jobs in lives.items():
        found = [results[job] for job in dict.fromkeys(jobs)]
        name = label(domain, temperature)
        _add_final(metrics, name, arm, domain, found)
        if not temperature:
            adapters.setdefault(domain, {})[arm] = found[0].adapter
        for seed, result in enumerate(found):
            if arm in ("floor", "paper", "ours"):
                series[f"{name}/{arm}/{seed}"] = moving_acceptance(result)
                series[f"{name}/{arm}/{seed}/held_out"] = [list(point) for point in result.held_out[domain]]
    _compare(metrics, series)
    return metrics, series, adapters


def paper_rates(plan: Plan) -> dict[str, float]:
    """The learning rate at which the paper's setting ends best, by domain, on a shorter stream."""
    count = min(plan.num_records, 600)
    jobs = {
        (domain, rate): Job(
            "paper", (domain,), num_records=count, settings=(("learning_rate", rate),), evaluate_every=count
        )
        for domain in plan.domains
        for rate in PAPER_RATES
    }
    results = plan.work(jobs.values())

    def final(domain: str, rate: float) -> float:
        return results[jobs[domain, rate]].final[domain].acceptance

    return {domain: max(PAPER_RATES, key=lambda rate: final(domain, rate)) for domain in plan.domains}


def _life(plan: Plan, domain: str, temperature: float, arm: str, rate: float, seed: int) -> Job:
    count = plan.num_records // 2 if temperature else plan.num_records
    if arm == "floor":
        return Job("floor", (domain,), temperature, 0, count)
    if arm == "paper":
        return Job("paper", (domain,), temperature, seed, count, settings=(("learning_rate", rate),))
    if arm == "ours":
        return Job("ours", (domain,), temperature, seed, count)
    full: tuple[tuple[str, Any], ...] = (("trainable", "full"),) if arm == "offline_full" else ()
    return Job("offline", (domain,), temperature, 0, count, settings=full)


def _seeds(plan: Plan, temperature: float) -> range:
    """Sampled lives are told by the first seed alone."""
    return range(1 if temperature else plan.num_seeds)


def _add_final(metrics: Metrics, name: str, arm: str, domain: str, found: Sequence[Result]) -> None:
    finals = [result.final[domain] for result in found]
    middle = sorted(finals, key=lambda measured: measured.acceptance)[(len(finals) - 1) // 2]
    for key, value in (
        ("acceptance_rate", statistics.median(measured.acceptance for measured in finals)),
        ("interval", [middle.low, middle.high]),
        ("by_seed", [measured.acceptance for measured in finals]),
        ("learner_s", statistics.median(result.learner_s for result in found)),
        ("num_swaps", statistics.median(len(result.swaps) for result in found)),
    ):
        metrics.setdefault(key, {}).setdefault(name, {})[arm] = value


def _compare(metrics: Metrics, series: Series) -> None:
    """Lifts, the share of the ceiling's, and how many records an arm needs for the paper's final value."""
    for name, rates in metrics["acceptance_rate"].items():
        lift = {arm: value - rates["floor"] for arm, value in rates.items()}
        metrics.setdefault("lift", {})[name] = lift
        ceiling = lift["offline"]
        metrics.setdefault("share_of_ceiling", {})[name] = lift["ours"] / ceiling if ceiling > 0 else None
        reached = metrics.setdefault("records_to_reach", {}).setdefault(name, {})
        for arm in ("paper", "ours"):
            curves = [value for key, value in series.items() if _is_curve(key, name, arm)]
            counts = [records_to_reach(curve, rates["paper"]) for curve in curves]
            middle = statistics.median(math.inf if count is None else count for count in counts)
            reached[arm] = None if math.isinf(middle) else middle


def _is_curve(key: str, name: str, arm: str) -> bool:
    return key.startswith(f"{name}/{arm}/") and key.endswith("/held_out")


def records_to_reach(curve: Sequence[Sequence[float]], value: float) -> float | None:
    """Records until held-out acceptance is at `value`, between two looks on a straight line; None: never."""
    for (count, before), (later, after) in pairwise(curve):
        if after >= value:
            share = 0.0 if before >= value else (value - before) / (after - before)
            return count + share * (later - count)
    return None


def moving_acceptance(result: Result) -> list[list[float]]:
    """[records so far, accepted over attempted of the last WINDOW], thinned."""
    points = []
    for end in range(WINDOW, len(result.accepted) + 1, THINNING):
        attempted = sum(result.attempted[end - WINDOW : end])
        points.append([end, round(sum(result.accepted[end - WINDOW : end]) / max(1, attempted), 4)])
    return points


# traffic that changes, traffic that is mixed


def shift(plan: Plan) -> tuple[Metrics, Series]:
    """The domains one after another: how fast it recovers, and what it forgets of the first."""
    count = plan.num_records // 2
    arms: Mapping[str, Job] = {
        "replay": Job("ours", plan.domains, num_records=count),
        "no_replay": Job("ours", plan.domains, num_records=count, settings=(("replay_share", 0.0),)),
        "routes": Job("ours", plan.domains, num_records=count, routing="tags"),
    }
    seeds = {"replay": plan.num_seeds, "routes": plan.num_seeds, "no_replay": 1}
    lives = {arm: _with_seeds(job, seeds[arm]) for arm, job in arms.items()}
    single = {domain: _with_seeds(Job("ours", (domain,)), plan.num_seeds) for domain in plan.domains}
    results = plan.work(job for jobs in [*lives.values(), *single.values()] for job in jobs)
    metrics: Metrics = {"records_per_domain": count}
    series: Series = {}
    for arm, jobs in lives.items():
        for seed, job in enumerate(jobs):
            result = results[job]
            series[f"{arm}/{seed}"] = moving_acceptance(result)
            for domain, curve in result.held_out.items():
                series[f"{arm}/{seed}/{domain}"] = [list(point) for point in curve]
        _add_shift(metrics, plan, arm, [results[job] for job in jobs], count)
    for domain, jobs in single.items():
        curves = [results[job].held_out[domain] for job in jobs]
        metrics.setdefault("single", {})[domain] = {
            "as_many_records": statistics.median(_at(curve, count) for curve in curves),
            "final": statistics.median(curve[-1][1] for curve in curves),
        }
    for arm in lives:
        behind = metrics[arm]["behind_single"] = {}
        for domain in plan.domains:
            known = metrics["single"][domain]
            behind[domain] = {
                "as_many_records": known["as_many_records"] - metrics[arm]["at_end_of_phase"][domain],
                "final_after_600": known["final"] - metrics[arm]["after_600"][domain],
            }
    return metrics, series


def _add_shift(metrics: Metrics, plan: Plan, arm: str, found: Sequence[Result], count: int) -> None:
    at_end, after_600 = {}, {}
    for index, domain in enumerate(plan.domains):
        curves = [result.held_out[domain] for result in found]
        at_end[domain] = statistics.median(_at(curve, (index + 1) * count) for curve in curves)
        after_600[domain] = statistics.median(_at(curve, index * count + min(600, count)) for curve in curves)
    first = plan.domains[0]
    forgotten = statistics.median(
        _at(result.held_out[first], count) - result.held_out[first][-1][1] for result in found
    )
    metrics[arm] = {"at_end_of_phase": at_end, "after_600": after_600, "forgotten_of_first": forgotten}


def _at(curve: Sequence[Sequence[float]], count: int) -> float:
    """The last look at or before so many records."""
    return [value for at, value in curve if at <= count][-1]


def mixture(plan: Plan) -> tuple[Metrics, Series]:
    """The domains in turn: one draft, a draft for every tag, and the router's own routes without tags."""
    count = plan.num_records // 2
    arms = {
        "one": Job("ours", plan.domains, num_records=count, order="in turn", evaluate_every=400),
        "tags": Job(
            "ours", plan.domains, num_records=count, order="in turn", evaluate_every=400, routing="tags"
        ),
        "router": Job(
            "ours", plan.domains, num_records=count, order="in turn", evaluate_every=400, routing="router"
        ),
    }
    lives = {arm: _with_seeds(job, plan.num_seeds) for arm, job in arms.items()}
    results = plan.work(job for jobs in lives.values() for job in jobs)
    metrics: Metrics = {"records_per_domain": count}
    series: Series = {}
    for arm, jobs in lives.items():
        found = [results[job] for job in jobs]
        by_domain = {
            domain: statistics.median(result.held_out[domain][-1][1] for result in found)
            for domain in plan.domains
        }
        metrics[arm] = {"acceptance_rate": by_domain, "mean": statistics.fmean(by_domain.values())}
        metrics[arm]["routes_of"] = found[0].facts.get("routes_of", {})
        for seed, result in enumerate(found):
            series[f"{arm}/{seed}"] = moving_acceptance(result)
    return metrics, series


def _with_seeds(job: Job, count: int) -> list[Job]:
    return [replace(job, seed=seed) for seed in range(count)]


# one thing at a time

Changes = tuple[tuple[str, Any], ...]
_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ABLATIONS: Mapping[str, Mapping[str, Changes]] = {
    "divergence": {
        name: (("divergence", name),)
        for name in (
            "forward_kl",
            "reverse_kl",
            "jensen_shannon",
            "total_variation",
            "negative_log_acceptance",
            "tv_weighted_kl",
            "osd",
        )
    },
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


def ablations(plan: Plan) -> tuple[Metrics, Series]:
    """Ours with one setting changed at a time, on the first domain of the plan, and what records lose."""
    domain, count = plan.domains[0], min(plan.num_records, ABLATION_RECORDS)
    jobs = _ablation_jobs(domain, count)
    results = plan.work(jobs.values())
    metrics: Metrics = {"domain": domain, "num_records": count}
    for (what, value), job in jobs.items():
        result = results[job]
        row = {
            "acceptance_rate": result.final[domain].acceptance,
            "interval": [result.final[domain].low, result.final[domain].high],
            "mean_while_learning": sum(result.accepted) / max(1, sum(result.attempted)),
            "learner_s": result.learner_s,
            "num_swaps": len(result.swaps),
        }
        if what.startswith("num_kept"):
            row["bytes_per_token"] = bytes_per_token(job.num_kept)
        metrics.setdefault(what, {})[value] = row
    metrics["estimator"] = _estimator(plan, domain, results[jobs["divergence", "forward_kl"]].adapter)
    return metrics, {}


def _ablation_jobs(domain: str, count: int) -> dict[tuple[str, str], Job]:
    short = min(count, SHORT_RECORDS)
    jobs = {
        (what, value): Job("ours", (domain,), num_records=count, settings=changes)
        for what, values in ABLATIONS.items()
        for value, changes in values.items()
    }
    for temperature in (0.0, 1.0):
        for kept in (8, 32, 128, WHOLE_ROWS):
            name = "whole rows" if kept == WHOLE_ROWS else str(kept)
            jobs[label("num_kept", temperature), name] = Job(
                "ours", (domain,), temperature, num_records=short, num_kept=kept
            )
    for weight in (0.0, 0.5, 1.0):
        changes = (("rejected_suffix_weight", weight),)
        jobs["rejected_suffix_weight", f"{weight:g}"] = Job(
            "through_engine", (domain,), num_records=short, settings=changes
        )
    jobs["through", "engine"] = jobs["rejected_suffix_weight", "0"]
    jobs["through", "replay"] = Job("ours", (domain,), num_records=short)
    return jobs


def _estimator(plan: Plan, domain: str, folder: str) -> Metrics:
    """Of the floor and of what ours learnt, on held-out prompts, at both temperatures."""
    workshop, found = plan.workshop, {}
    draft = trainable(workshop.pair(), settings_of("ours", {}))
    states = {"floor": None, "ours": import_weights(Adapter.load(Path(folder)).weights) if folder else None}
    for temperature in plan.temperatures:
        told = workshop.held_out(domain, temperature)
        for name, state in states.items():
            draft.load(state)
            found[label(name, temperature)] = acceptance_from(
                workshop.pair(), draft, told, workshop.replay(NUM_DRAFT_TOKENS)
            )
    return found
