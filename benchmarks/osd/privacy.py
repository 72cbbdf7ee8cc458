"""What capture mode `memory` costs: the same requests, learnt from with records that live for an hour, and
with records that stay.

Invariant: figures are medians over seeds, and both arms saw the same requests in the same order.
"""

import statistics

from benchmarks.osd.jobs import Job
from benchmarks.osd.plan import ExperimentPlan, Metrics, Series, label, moving_acceptance, with_seeds

REPLAY, MEMORY = "ours", "memory"


def privacy(plan: ExperimentPlan) -> tuple[Metrics, Series]:
    """Acceptance on held-out prompts by domain and arm, and how far `memory` is behind."""
    lives = {
        (domain, temperature, arm): with_seeds(
            Job(arm, (domain,), temperature, num_records=plan.num_records),  # type: ignore[arg-type]
            plan.num_seeds,
        )
        for domain in plan.domains
        for temperature in plan.temperatures
        for arm in plan.arms_of("privacy")
    }
    results = plan.work(job for jobs in lives.values() for job in jobs)
    rates: dict[str, dict[str, float]] = {}
    swaps: dict[str, dict[str, float]] = {}
    series: Series = {}
    for (domain, temperature, arm), jobs in lives.items():
        found, name = [results[job] for job in jobs], label(domain, temperature)
        final = [result.final[domain].acceptance for result in found]
        rates.setdefault(name, {})[arm] = statistics.median(final)
        swaps.setdefault(name, {})[arm] = statistics.median(len(result.swaps) for result in found)
        for seed, result in enumerate(found):
            series[f"{name}/{arm}/{seed}"] = moving_acceptance(result.accepted, result.attempted)
    behind = {name: arms[REPLAY] - arms[MEMORY] for name, arms in rates.items() if len(arms) == 2}
    return {"acceptance_rate": rates, "num_swaps": swaps, "memory_behind": behind}, series
