"""`everdraft bench load`: the whole service, Ray, Redis and all, under requests that come as they come."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.options import (
    DEMO_DRAFT,
    DEMO_TARGET,
    RESULTS,
    CompileOption,
    DraftOption,
    PromptsOption,
    TargetOption,
    ThreadsOption,
)
from deploy.commands.console import ConfigOption, errors, output, plain_faults

if TYPE_CHECKING:
    from benchmarks.load_client import LoadSpec


def load(
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    data: PromptsOption = None,
    config: ConfigOption = None,
    threads: ThreadsOption = 1,
    compile: CompileOption = "on",
    slots: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Of an answer at most.", min=2)] = 48,
    loads: Annotated[
        list[float] | None,
        typer.Option("--load", help="Share of capacity; again for more; default: 0.5, 0.9, 1.1, 2."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of each load, and of the capacity.", min=1.0)] = 60.0,
    requests: Annotated[
        int,
        typer.Option(help="A soak of so many at the first --load (default 0.9) in the loads' place.", min=0),
    ] = 0,
    every: Annotated[float, typer.Option(help="Seconds between two looks at the processes.", min=0.1)] = 5.0,
    learner: Annotated[
        bool | None, typer.Option("--learner/--no-learner", help="Default: beside a soak only.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    port: Annotated[int, typer.Option(help="Of the service.")] = 8123,
    report: Annotated[Path | None, typer.Option(help="Where the figures go (JSON).")] = None,
) -> None:
    """The whole service by load: latency, throughput, refusals; with --requests, what its processes hold."""
    from benchmarks import load as bench
    from benchmarks import load_views
    from benchmarks.load_client import LoadSpec
    from deploy.demo.report import write_report
    from deploy.settings_source import load_settings
    from deploy.wiring import running_system

    shares = loads or ([0.9] if requests else [0.5, 0.9, 1.1, 2.0])
    if min(shares) <= 0.0:
        raise typer.BadParameter(f"--load {min(shares):g} is no load; give a share of capacity above 0")
    say, learns = errors().print, bool(requests) if learner is None else learner
    with plain_faults(), TemporaryDirectory() as folder, bench.client_process() as clients:
        models = {"target": target, "draft": draft, "compile": compile, **_bounds(requests)}
        overrides = {
            "serving": {**models, "num_slots": slots, "num_threads": threads},
            "cluster": {"port": port, "state_dir": Path(folder), "learn": learns},
        }
        asked, settings = bench.questions(data), load_settings(config, {}, overrides)
        with running_system(settings, say) as system:
            bench.await_learner(system.learner)
            spec = LoadSpec(system.url, asked, tokens)
            run = _Run(clients, spec, bench.measure_capacity(clients, spec, slots, seconds, say), seed)
            if requests:
                metrics, series = run.soak(system.redis_url, shares[0], requests, every)
            else:
                metrics, series = run.loads(shares, seconds)
    name = "soak" if requests else "load"
    report = report or RESULTS / f"{name}.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, name, {"slots": slots, "threads": threads, "max_tokens": tokens, **metrics}, series)
    plot = load_views.plot_soak if requests else load_views.plot_load
    plot(metrics, series, report.with_suffix(".png"))
    output().print(f"figures: {report}, and beside it the picture")


Measured = tuple[dict[str, Any], dict[str, list[Any]]]
"""Metrics and series of a report."""


@dataclass(frozen=True)
class _Run:
    """On a service that runs, whose capacity was measured."""

    clients: ProcessPoolExecutor
    spec: "LoadSpec"
    capacity: dict[str, Any]
    seed: int

    def loads(self, shares: list[float], seconds: float) -> Measured:
        from benchmarks.load import bars, measure_loads

        by_load, series = measure_loads(
            self.clients, self.spec, self._rate_per_s, shares, seconds, self.seed, errors().print
        )
        return {"capacity": self.capacity, "by_load": by_load, "bars": bars(by_load)}, series

    def soak(self, redis_url: str, share: float, num_requests: int, every_s: float) -> Measured:
        from benchmarks.soak import measure_soak

        rate_per_s = share * self._rate_per_s
        found, series = measure_soak(
            self.clients, self.spec, redis_url, rate_per_s, num_requests, every_s, self.seed, errors().print
        )
        return {"capacity": self.capacity, "load": share, **found}, series

    @property
    def _rate_per_s(self) -> float:
        return float(self.capacity["requests_per_s"])


def _bounds(num_requests: int) -> dict[str, Any]:
    from benchmarks.soak import soak_bounds

    return soak_bounds(num_requests) if num_requests else {}
