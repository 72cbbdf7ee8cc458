"""The demo's figures, as the report has them and as the picture shows them. What was not measured is null."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from buffer.names import DEFAULT_ROUTE
from buffer.records import ServingStatus
from buffer.store import AdapterFeed
from deploy.demo.comparison import ARMS, Comparison
from deploy.demo.corpus import DOMAINS
from deploy.demo.plot import moving_acceptance, plot_acceptance, swaps
from deploy.demo.self_draft import SelfDraft
from deploy.demo.session import DemoResult


def metrics_of(result: DemoResult, feed: AdapterFeed, *, wall_s: float) -> dict[str, Any]:
    """Those by domain are dictionaries. `wall_s`: since the demo began."""
    events = feed.history(DEFAULT_ROUTE, max_events=10_000)
    outcomes = result.outcomes
    metrics: dict[str, Any] = {
        "num_requests": len(outcomes),
        "num_failed_requests": sum(bool(outcome.error) for outcome in outcomes),
        "num_promotions": sum(event.kind == "promoted" for event in events),
        "num_refusals": sum(event.kind == "refused" for event in events),
        "num_rollbacks": sum(event.kind == "rolled_back" for event in events),
        **_replica_figures(feed.statuses()),
        "greedy_identical_fraction": result.identity.fraction,
        "num_greedy_compared": result.identity.num_compared,
        "num_greedy_near_ties": result.identity.num_near_ties,
        "num_greedy_unexplained": result.identity.num_unexplained,
        "phases": [asdict(phase) for phase in result.phases],
        "passes_while_measuring": result.passes,
        "loads": {name: asdict(load) for name, load in result.loads.items()},
        "caveats": result.caveats,
        "demo_wall_s": wall_s,
        "draft_model": None if result.draft_costs is None else asdict(result.draft_costs),
        "self_draft": _self_draft(result.self_draft),
    }
    for num_clients, comparison in result.comparisons.items():
        metrics |= _measured(comparison, "" if num_clients == 1 else f"_{num_clients}_clients")
    return metrics


def _self_draft(arm: SelfDraft | None) -> dict[str, Any] | None:
    """Without its curve, which is in the series."""
    if arm is None:
        return None
    figures = asdict(arm)
    del figures["acceptance"]
    return figures | {"num_records": len(arm.acceptance), "speed_up": arm.speed_up}


def _replica_figures(statuses: Sequence[ServingStatus]) -> dict[str, Any]:
    """Null where no replica has swapped under load, or had no round yet."""
    num_under_load = sum(status.num_swaps_under_load for status in statuses)
    return {
        "num_swaps_under_load": num_under_load,
        "swap_pause_s_max": max(status.swap_pause_s_max for status in statuses) if num_under_load else None,
        "round_s_median": max((status.round_s_median for status in statuses), default=0.0) or None,
        "num_dropped_records": sum(status.num_dropped_records for status in statuses),
    }


def _measured(comparison: Comparison, suffix: str) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        f"num_turns{suffix}": comparison.num_turns,
        f"shortage{suffix}": comparison.shortage,
        f"num_pairs{suffix}": {domain: comparison.num_pairs(domain) for domain in DOMAINS},
        f"speed_up{suffix}": {domain: comparison.speed_up(domain) for domain in DOMAINS},
    }
    for arm in ARMS:
        metrics[f"tokens_per_s_{arm}{suffix}"] = {d: comparison.tokens_per_s(d, arm) for d in DOMAINS}
    for arm in ARMS[1:]:
        rates = {d: comparison.acceptance_rate(d, arm) for d in DOMAINS}
        metrics[f"acceptance_rate_{arm}{suffix}"] = rates
        metrics[f"num_attempted_{arm}{suffix}"] = {d: comparison.num_attempted(d, arm) for d in DOMAINS}
    return metrics


def series(result: DemoResult) -> dict[str, list[Any]]:
    """What the plot shows, as numbers."""
    return {
        "acceptance_moving_average": [
            None if rate is None else round(rate, 4) for rate in moving_acceptance(result.traffic)
        ],
        "domain": [outcome.domain for outcome in result.traffic],
        "draft_version": [outcome.draft_version for outcome in result.traffic],
        "swaps": [list(swap) for swap in swaps(result.traffic)],
        "phases": [[phase.name, phase.num_requests] for phase in result.phases],
        "self_draft": [[number, round(rate, 4)] for number, rate in _curve(result)],
    }


def _curve(result: DemoResult) -> list[tuple[int, float]]:
    return [] if result.self_draft is None else result.self_draft.acceptance


def save_plot(result: DemoResult, file: Path) -> None:
    phases = [(phase.name, phase.num_requests) for phase in result.phases]
    plot_acceptance(result.traffic, phases, file, _curve(result))
