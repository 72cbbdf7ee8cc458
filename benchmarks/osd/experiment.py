"""An experiment recorded from its jobs to its report, table and picture; speed and cost are measured last.

Invariant: a report is written as soon as its acceptance is known, and again with what is measured after.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.osd import cost as costs
from benchmarks.osd import views
from benchmarks.osd.ablations import ablations
from benchmarks.osd.changing_traffic import mixture, shift
from benchmarks.osd.deployed import measure_deployed
from benchmarks.osd.parts import parts
from benchmarks.osd.per_domain import per_domain
from benchmarks.osd.plan import ExperimentPlan, Metrics, Series
from benchmarks.osd.privacy import privacy
from benchmarks.osd.speed import measure_speed
from deploy.demo.report import write_report
from serving.compiling import CompileChoice

SPEED_PROMPTS = 24


def run_experiment(
    name: str,
    plan: ExperimentPlan,
    report: Path,
    console: Console,
    *,
    turns: int,
    compile: CompileChoice = "auto",
) -> None:
    """Work it out, write it down, show it. `compile`: of the passes that are timed."""
    plan = _needed(name, plan)
    report.parent.mkdir(parents=True, exist_ok=True)
    if name != "deployed":
        plan.record_answers()
    picture = report.with_suffix(".png")
    if name == "domain":
        metrics, series, adapters = per_domain(plan)
        _write(report, name, plan, metrics, series)
        console.print(views.domain_table(metrics))
        views.plot_domains(metrics, series, picture)
        for num_clients in (1, 8) if turns else ():
            suffix = "" if num_clients == 1 else f"_{num_clients}_clients"
            metrics[f"speed{suffix}"] = speeds = _speed(plan, adapters, turns, num_clients, compile)
            metrics[f"speedup{suffix}"] = {
                name: {arm: row["speedup"] for arm, row in rows.items() if "speedup" in row}
                for name, rows in speeds.items()
            }
            title = f"speed-up over no speculation, requests at once: {num_clients}"
            console.print(views.nested_table(title, metrics[f"speedup{suffix}"]))
            _write(report, name, plan, metrics, series)
    elif name == "shift":
        metrics, series = shift(plan)
        views.plot_phases(metrics, series, plan.domains, picture)
    elif name == "mixture":
        metrics, series = mixture(plan)
        views.plot_mixture(series, picture)
    elif name == "ablations":
        metrics, series = ablations(plan)
        views.plot_ablations(metrics, picture)
    elif name == "parts":
        metrics, series = parts(plan, compile)
        console.print(views.nested_table("parts of the target", metrics["parts"]))
    elif name == "privacy":
        metrics, series = privacy(plan)
        console.print(views.nested_table("acceptance by capture mode", metrics["acceptance_rate"]))
    elif name == "cost":
        metrics, series = costs.measure(plan), {}
    else:
        metrics, series = _deployed(plan)
    _write(report, name, plan, metrics, series)
    if name != "domain":
        console.print_json(data=metrics)
    console.print(f"figures: {report}")


def _deployed(plan: ExperimentPlan) -> tuple[Metrics, Series]:
    metrics: Metrics = {}
    series: Series = {}
    for arm in plan.arms_of("deployed"):
        found, points = measure_deployed(
            plan.cache,
            plan.domains[0],
            plan.num_records,
            plan.report,
            part=plan.draft_of(arm),
            engine=plan.engine,
        )
        metrics[arm] = found
        series |= {f"{arm}/{name}": values for name, values in points.items()}
    return metrics, series


def _needed(name: str, plan: ExperimentPlan) -> ExperimentPlan:
    """No more is asked of the target than the experiment looks at."""
    if name in ("shift", "mixture", "cost"):
        return replace(plan, temperatures=(0.0,))
    if name == "parts":
        return replace(plan, temperatures=(0.0,), domains=plan.domains[:1])
    return replace(plan, domains=plan.domains[:1]) if name == "ablations" else plan


def _speed(
    plan: ExperimentPlan,
    adapters: dict[str, dict[str, str]],
    turns: int,
    num_clients: int,
    compile: CompileChoice,
) -> dict[str, Any]:
    """By domain, temperature and arm, on held-out prompts."""
    found = {}
    for name, folders in adapters.items():
        domain, _, temperature = name.partition("@")
        found[name] = measure_speed(
            {arm: plan.pair_of(arm) for arm in folders},
            folders,
            plan.cache.held_out(domain, float(temperature or 0.0))[:SPEED_PROMPTS],
            turns=turns,
            compile=compile,
            report=plan.report,
            num_clients=num_clients,
            temperature=float(temperature or 0.0),
        )
    return found


def _write(report: Path, name: str, plan: ExperimentPlan, metrics: Metrics, series: Series) -> None:
    asked = {"num_records": plan.num_records, "num_seeds": plan.num_seeds, "domains": list(plan.domains)}
    write_report(report, f"osd_{name}", {"plan": asked, **metrics}, series)
