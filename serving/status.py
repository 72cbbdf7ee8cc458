"""A replica's status, from the engine's own counters. Pure; a snapshot at one time."""

from collections.abc import Iterator
from typing import Protocol

from buffer.records import DrafterCounts, PassCosts, ServingStatus
from serving.engine.cost_table import CostTable
from serving.engine.stats import EngineStats


class Reporting(Protocol):
    """What a status is made of; every ServingEngine has it."""

    @property
    def costs(self) -> CostTable | None: ...

    @property
    def passes(self) -> str: ...

    def stats(self) -> EngineStats: ...


def serving_status(
    engine: Reporting,
    *,
    replica_id: str,
    at_s: float,
    num_dropped_records: int,
    num_rerouted_records: int = 0,
    last_error: str = "",
) -> ServingStatus:
    """Counters are by the route of the draft: those of a route without a draft are counted under
    `default`."""
    stats = engine.stats()
    return ServingStatus(
        replica_id=replica_id,
        at_s=at_s,
        serving_versions=stats.draft_versions,
        counts=tuple(_drafter_counts(stats)),
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
        passes=engine.passes,
        last_error=last_error or stats.draft_disabled_reason,
    )


def _drafter_counts(stats: EngineStats) -> Iterator[DrafterCounts]:
    for route, by_drafter in stats.route_counts.items():
        for by, counters in by_drafter.items():
            yield DrafterCounts(
                drafter_id=by.drafter_id,
                route=route,
                draft_version=by.draft_version,
                num_rounds=counters.num_rounds,
                num_drafted=counters.num_drafted,
                num_attempted=counters.num_attempted,
                num_accepted=counters.num_accepted,
                num_output_tokens=counters.num_output_tokens,
            )


def _pass_costs(costs: CostTable) -> PassCosts:
    """The cost table as corrected by live rounds."""
    draft_scale = costs.target_scale * costs.draft_scale
    return PassCosts(
        batch_sizes=costs.batch_sizes,
        token_counts=costs.token_counts,
        target_pass_s=tuple(tuple(s * costs.target_scale for s in row) for row in costs.target_pass_s),
        draft_pass_s=tuple(s * draft_scale for s in costs.draft_pass_s),
        draft_start_s=tuple(s * draft_scale for s in costs.draft_start_s),
    )
