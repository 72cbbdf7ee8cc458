"""The metrics: every family of the registry, with its labels and its definition."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client.parser import text_string_to_metric_families

from buffer.exporter import DROP_REASONS, RecordExporter
from buffer.names import DEFAULT_ROUTE, MODEL_DRAFTER
from docs.tables import table
from serving.engine.counters import RoundCounters
from serving.engine.passes.prefix_cache import PrefixCacheStats
from serving.engine.proposal import DrafterVersion
from serving.engine.stats import EngineStats
from serving.metrics import ServingMetrics


def metrics_lines() -> Iterator[str]:
    """Every family that a replica serves, in the order of its own answer."""
    text = _example_metrics().render().decode()
    rows = (
        (
            f"`{family.name}{'_total' if family.type == 'counter' else ''}`",
            family.type,
            _labels(family),
            family.documentation,
        )
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    )
    return table(("metric", "type", "labels", "definition"), rows)


def _labels(family: Any) -> str:
    names = dict.fromkeys(name for sample in family.samples for name in sample.labels if name != "le")
    return ", ".join(f"`{name}`" for name in names)


def _example_metrics() -> ServingMetrics:
    """Of a replica that has served something, so that every family has a sample to show its labels."""
    counts = RoundCounters()
    counts.add_round(drafted=1, attempted=1, accepted=1, emitted=2)
    numbers: dict[str, Any] = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
    stats = EngineStats(
        **numbers
        | {
            "draft_versions": {DEFAULT_ROUTE: 0},
            "route_counts": {DEFAULT_ROUTE: {DrafterVersion(MODEL_DRAFTER, 0): counts}},
            "draft_disabled_reason": "",
            "prefix_cache": PrefixCacheStats(),
        }
    )
    exporter = SimpleNamespace(
        num_submitted=0,
        num_exported=0,
        num_rerouted_records=0,
        dropped_by_reason=dict.fromkeys(DROP_REASONS, 0),
    )
    metrics = ServingMetrics(
        lambda: stats, replica_id="0", num_rejected=lambda: 0, exporters=[cast(RecordExporter, exporter)]
    )
    metrics.clock(0.0).finished("stop", 0.0)
    return metrics
