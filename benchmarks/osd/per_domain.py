"""One domain at a time: floor, the paper's setting, ours, the target's own part, and the ceiling. Read
`per_domain` first.

Invariant: figures are medians over seeds, and every arm saw the same requests in the same order.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from benchmarks.osd.jobs import Job, Result
from benchmarks.osd.plan import SELF, Changes, ExperimentPlan, Metrics, Series, label, moving_acceptance

PAPER_RATES = (3e-4, 1e-3, 3e-3)


def per_domain(plan: ExperimentPlan) -> tuple[Metrics, Series, dict[str, dict[str, str]]]:
    """Floor, the paper's setting at its best rate, ours with the draft and with a part of the target, and the
    ceiling, on every domain. The last value: by domain, temperature and arm, the folder of the first seed's
    adapter."""
    rates = paper_rates(plan) if "paper" in plan.arms_of("domain") else {}
    lives = {
        (domain, temperature, arm): [
            _life(plan, domain, temperature, arm, rates.get(domain, 0.0), seed)
            for seed in _seeds(plan, temperature)
        ]
        for temperature in plan.temperatures
        for arm in plan.arms_of("domain")
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
        if arm in ("floor", "ours", SELF) or not temperature:
            adapters.setdefault(name, {})[arm] = found[0].adapter
        for seed, result in enumerate(found):
            if arm in ("floor", "paper", "ours", SELF):
                series[f"{name}/{arm}/{seed}"] = moving_acceptance(result.accepted, result.attempted)
                curve = [value for _, value in result.held_out[domain]]
                series[f"{name}/{arm}/{seed}/held_out"] = [list(point) for point in result.held_out[domain]]
                series[f"{name}/{arm}/{seed}/learner_s"] = [
                    list(point) for point in zip(result.looks_s, curve, strict=True)
                ]
    _compare(metrics, series)
    return metrics, series, adapters


def paper_rates(plan: ExperimentPlan) -> dict[str, float]:
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


def _life(plan: ExperimentPlan, domain: str, temperature: float, arm: str, rate: float, seed: int) -> Job:
    count = plan.num_records
    if arm == "floor":
        return Job("floor", (domain,), temperature, 0, count)
    if arm == "paper":
        return Job("paper", (domain,), temperature, seed, count, settings=(("learning_rate", rate),))
    if arm in ("ours", SELF):
        return Job("ours", (domain,), temperature, seed, count, draft=plan.draft_of(arm))
    full: Changes = (("trainable", "full"),) if arm == "offline_full" else ()
    return Job("offline", (domain,), temperature, 0, count, settings=full)


def _seeds(plan: ExperimentPlan, temperature: float) -> range:
    """Sampled lives are recorded by the first seed alone."""
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
    """Lifts, the share of the ceiling's, and how many records an arm needs for the final value of the paper's
    setting, or of ours; as far as the arms for it were asked for."""
    for name, rates in metrics["acceptance_rate"].items():
        if "floor" in rates:
            lift = {arm: value - rates["floor"] for arm, value in rates.items()}
            metrics.setdefault("lift", {})[name] = lift
            ceiling = lift.get("offline", 0.0)
            metrics.setdefault("share_of_ceiling", {})[name] = lift["ours"] / ceiling if ceiling > 0 else None
        if "paper" in rates:
            reached = metrics.setdefault("records_to_reach", {}).setdefault(name, {})
            for arm in ("paper", "ours"):
                reached[arm] = _middle(series, f"{name}/{arm}/", "/held_out", rates["paper"])
        if SELF in rates:
            metrics.setdefault("to_reach_ours", {})[name] = {
                axis: {
                    arm: _middle(series, f"{name}/{arm}/", f"/{axis}", rates["ours"])
                    for arm in ("ours", SELF)
                }
                for axis in ("held_out", "learner_s")
            }


def _middle(series: Series, begin: str, end: str, value: float) -> float | None:
    """Median over seeds of where the curves named so reach `value`; None: most never do."""
    curves = [curve for key, curve in series.items() if key.startswith(begin) and key.endswith(end)]
    found = [first_at(curve, value) for curve in curves]
    middle = statistics.median(math.inf if one is None else one for one in found)
    return None if math.isinf(middle) else middle


def first_at(curve: Sequence[Sequence[float]], value: float) -> float | None:
    """Records, or learner seconds, until held-out acceptance is at `value`, between two looks on a straight
    line; None: never."""
    for (count, before), (later, after) in pairwise(curve):
        if after >= value:
            share = 0.0 if before >= value else (value - before) / (after - before)
            return count + share * (later - count)
    return None
