"""Traffic that changes, and traffic that is mixed: one draft against a draft for every route.

Invariant: figures are medians over seeds, and every arm saw the same requests in the same order.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.osd.jobs import Job, Result
from benchmarks.osd.plan import (
    SELF,
    WHOLE_STREAMS,
    ExperimentPlan,
    Metrics,
    Series,
    moving_acceptance,
    with_seeds,
)

PHASE_RECORDS = 600


def shift(plan: ExperimentPlan) -> tuple[Metrics, Series]:
    """The domains one after another: how fast it recovers, and what it forgets of the first."""
    count = min(plan.num_records, PHASE_RECORDS)
    replay = Job("ours", plan.domains, num_records=count)
    arms = {
        "replay": replay,
        "no_replay": replace(replay, settings=(("replay_share", 0.0),)),
        "routes": replace(replay, routing="tags"),
        SELF: replace(replay, draft=plan.part),
    }
    lives = {
        arm: with_seeds(arms[arm], plan.num_seeds if arm == "replay" else 1) for arm in plan.arms_of("shift")
    }
    drafts = {arms[arm].draft for arm in lives}
    single = {
        (draft, domain): with_seeds(
            Job("ours", (domain,), num_records=plan.num_records, draft=draft), plan.num_seeds
        )
        for draft in sorted(drafts)
        for domain in plan.domains
    }
    results = plan.work(job for jobs in [*lives.values(), *single.values()] for job in jobs)
    metrics: Metrics = {"records_per_domain": count}
    series: Series = {}
    for arm, jobs in lives.items():
        for seed, job in enumerate(jobs):
            result = results[job]
            series[f"{arm}/{seed}"] = moving_acceptance(result.accepted, result.attempted)
            for domain, curve in result.held_out.items():
                series[f"{arm}/{seed}/{domain}"] = [list(point) for point in curve]
        _add_shift(metrics, plan, arm, [results[job] for job in jobs], count)
    for (draft, domain), jobs in single.items():
        curves = [results[job].held_out[domain] for job in jobs]
        metrics.setdefault(f"single of {draft}" if draft else "single", {})[domain] = known = {
            "as_many_records": statistics.median(_at(curve, count) for curve in curves),
            "final": statistics.median(curve[-1][1] for curve in curves),
        }
        for arm in (arm for arm in lives if arms[arm].draft == draft):
            reached = metrics[arm]["at_end_of_phase"][domain]
            metrics[arm].setdefault("behind_single", {})[domain] = {
                name: value - reached for name, value in known.items()
            }
    return metrics, series


def _add_shift(metrics: Metrics, plan: ExperimentPlan, arm: str, found: Sequence[Result], count: int) -> None:
    at_end = {}
    for index, domain in enumerate(plan.domains):
        curves = [result.held_out[domain] for result in found]
        at_end[domain] = statistics.median(_at(curve, (index + 1) * count) for curve in curves)
    first = plan.domains[0]
    forgotten = statistics.median(
        _at(result.held_out[first], count) - result.held_out[first][-1][1] for result in found
    )
    metrics[arm] = {
        "at_end_of_phase": at_end,
        "forgotten_of_first": forgotten,
        "learner_s": statistics.median(result.learner_s for result in found),
    }


def _at(curve: Sequence[Sequence[float]], count: int) -> float:
    """The last look at or before so many records."""
    return [value for at, value in curve if at <= count][-1]


def mixture(plan: ExperimentPlan) -> tuple[Metrics, Series]:
    """The domains in turn: one draft, a draft for every tag, and the router's own routes without tags; and on
    whole streams, where capacity counts for more than steps, one draft for all against one for each."""
    count = plan.num_records // len(plan.domains)
    one = Job("ours", plan.domains, num_records=count, order="in turn", evaluate_every=400)
    tags = replace(one, routing="tags")
    arms = {
        "one": one,
        "tags": tags,
        "router": replace(one, routing="router"),
        SELF: replace(one, draft=plan.part),
        f"{SELF}, tags": replace(tags, draft=plan.part),
    }
    asked, several = plan.arms_of("mixture"), ("one", "router")
    lives = {
        arm: with_seeds(job, plan.num_seeds if arm in several else 1)
        for arm, job in arms.items()
        if arm in asked
    }
    metrics: Metrics = {"records_per_domain": count}
    if WHOLE_STREAMS in asked:
        metrics["whole_streams"] = _whole_streams(plan, one)
    results = plan.work(job for jobs in lives.values() for job in jobs)
    series: Series = {}
    for arm, jobs in lives.items():
        found = [results[job] for job in jobs]
        by_domain = {
            domain: statistics.median(result.held_out[domain][-1][1] for result in found)
            for domain in plan.domains
        }
        metrics[arm] = {"acceptance_rate": by_domain, "mean": statistics.fmean(by_domain.values())}
        metrics[arm]["learner_s"] = statistics.median(result.learner_s for result in found)
        metrics[arm]["purity"] = [purity(result.facts["held_out_routes"]) for result in found]
        metrics[arm]["routes_of"] = [result.facts["held_out_routes"] for result in found]
        for seed, result in enumerate(found):
            series[f"{arm}/{seed}"] = moving_acceptance(result.accepted, result.attempted)
    return metrics, series


def _whole_streams(plan: ExperimentPlan, one: Job) -> Metrics:
    """All records of every domain: by one draft, and by a draft for each."""
    whole = replace(one, num_records=plan.num_records, evaluate_every=1600)
    alone = {domain: Job("ours", (domain,), num_records=plan.num_records) for domain in plan.domains}
    results = plan.work([whole, *alone.values()])
    metrics: Metrics = {"records_per_domain": plan.num_records}
    for domain, job in alone.items():
        for_all, own = results[whole].final[domain].acceptance, results[job].final[domain].acceptance
        metrics[domain] = {"one": for_all, "own": own, "gain": own - for_all}
    return metrics


def purity(routes_of: Mapping[str, Mapping[str, int]]) -> float:
    """Of domain -> route -> requests: the share of requests whose route is mostly of their own domain."""
    routes = {route for counts in routes_of.values() for route in counts}
    in_common = [max(counts.get(route, 0) for counts in routes_of.values()) for route in routes]
    return sum(in_common) / sum(sum(counts.values()) for counts in routes_of.values())
