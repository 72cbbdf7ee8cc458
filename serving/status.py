"""What a replica says about itself, from the engine's own counters. Pure; a snapshot at one time."""

from collections.abc import Mapping

from buffer.records import DEFAULT_ROUTE, PassCosts, ServingStatus, VersionCounts
from serving.engine.cost_table import CostTable
from serving.engine.counters import RoundCounters
from serving.engine.engine import Engine


def serving_status(
    engine: Engine,
    *,
    replica_id: str,
    at_s: float,
    num_dropped_records: int,
    num_rerouted_records: int = 0,
    passes: str = "",
    last_error: str = "",
) -> ServingStatus:
    """Counters are told by the route whose draft it was: a route without one counts under `default`."""
    stats = engine.stats()
    return ServingStatus(
        replica_id=replica_id,
        at_s=at_s,
        serving_versions=stats.draft_versions,
        counts={
            route: _version_counts(stats.route_counts.get(route, {}))
            for route in {DEFAULT_ROUTE, *stats.route_counts}
        },
        costs=None if engine.costs is None else _pass_costs(engine.costs),
        mean_batch_size=max(1.0, stats.mean_batch_size),
        num_draft_tokens=stats.num_draft_tokens,
        is_draft_length_fixed=stats.is_draft_length_fixed,
        num_dropped_records=num_dropped_records,
        num_rerouted_records=num_rerouted_records,
        num_swaps=stats.num_swaps,
        num_swaps_under_load=stats.num_swaps_under_load,
        swap_pause_s_max=stats.swap_pause_s_max,
        round_s_median=stats.round_s_median,
        passes=passes,
        last_error=last_error or stats.draft_disabled_reason,
    )


def _version_counts(counts: Mapping[int, RoundCounters]) -> dict[int, VersionCounts]:
    return {
        version: VersionCounts(
            num_rounds=counters.num_rounds,
            num_drafted=counters.num_drafted,
            num_attempted=counters.num_attempted,
            num_accepted=counters.num_accepted,
            num_output_tokens=counters.num_output_tokens,
        )
        for version, counters in counts.items()
    }


def _pass_costs(costs: CostTable) -> PassCosts:
    """The table as live rounds have corrected it."""
    return PassCosts(
        batch_sizes=costs.batch_sizes,
        token_counts=costs.token_counts,
        target_pass_s=tuple(tuple(s * costs.target_scale for s in row) for row in costs.target_pass_s),
        draft_pass_s=tuple(s * costs.draft_scale for s in costs.draft_pass_s),
        draft_start_s=tuple(s * costs.draft_scale for s in costs.draft_start_s),
    )
