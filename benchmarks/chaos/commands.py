"""`everdraft bench chaos`: faults injected into a running service, and a table of what each cost."""

import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.options import DEMO_DRAFT, DEMO_TARGET, RESULTS, DraftOption, TargetOption
from deploy.commands.console import errors, fail, output
from deploy.commands.demo import LEARNER

if TYPE_CHECKING:
    from benchmarks.chaos.measure import Outcome

FaultOption = Annotated[
    list[str] | None, typer.Option("--fault", help="Only those whose names begin so; default: all.")
]


def chaos(
    fault: FaultOption = None,
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    replicas: Annotated[int, typer.Option(help="Behind the endpoint.", min=1)] = 2,
    hold: Annotated[float, typer.Option(help="Seconds that lasting faults last.", min=0)] = 10.0,
    port: Annotated[int, typer.Option(help="Of the endpoint; the next one is MLflow's.")] = 8000,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "chaos.json",
) -> None:
    """Kill, starve, fill up and mislead a service under load: failures, recovery, records, leftovers."""
    from benchmarks.chaos.faults import faults
    from benchmarks.chaos.measure import Chaos, as_metrics
    from benchmarks.chaos.service import running_service
    from benchmarks.chaos.traffic import Traffic
    from deploy.demo.report import write_report

    every = faults(hold)
    chosen = {name: one for name, one in every.items() if not fault or name.startswith(tuple(fault))}
    if not chosen:
        fail(f"--fault {' '.join(fault or [])}: none begins so; there are {', '.join(every)}")
    say = errors().print
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends, too
    report.parent.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with TemporaryDirectory(prefix="everdraft-chaos-") as folder:
        settings = chaos_settings(target, draft, replicas)
        with (
            running_service(settings, Path(folder), (port, port + 1), say) as service,
            Traffic(service.url, service.model) as traffic,
        ):
            for outcome in Chaos(service, traffic, say).run(chosen):
                outcomes.append(outcome)
                say(str(outcome))
                write_report(report, "chaos", {"replicas": replicas, **as_metrics(outcomes)}, {})
    output().print(table(outcomes))


def chaos_settings(target: str, draft: str, num_replicas: int) -> dict[str, dict[str, Any]]:
    """Sections of a settings file. The learner takes records in soon after they came, in short cycles that
    never slow down, so that it is seen within seconds whether it still does."""
    return {
        "serving": {
            "target": target,
            "draft": draft,
            "model_name": "demo",
            "num_replicas": num_replicas,
            "num_threads": 1,
            "max_seq_len": 512,
            "max_route_drafts": 0,
            "compile": "off",
            "status_interval_s": 0.5,
        },
        "learner": {
            **LEARNER,
            "min_records_per_cycle": 16,
            "max_records_per_cycle": 64,
            "max_record_age_s": 2.0,
            "max_rest_records": 0,
        },
    }


def table(outcomes: "list[Outcome]") -> Any:
    """Failed: besides those that were under way on the part that died, which come behind the plus. Acceptance
    before the fault and after it."""
    from rich.table import Table

    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("fault", no_wrap=True)
    for name in ("failed", "retried", "recovered", "lost", "acceptance"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("left over")
    for one in outcomes:
        if one.not_run:
            shown.add_row(one.fault, *[""] * 5, f"not run: {one.not_run}")
            continue
        failed = f"{one.num_failed} of {one.num_requests}"
        on_dead = f" + {one.num_failed_on_dead_part}" if one.num_failed_on_dead_part else ""
        shown.add_row(
            one.fault,
            failed + on_dead,
            str(one.num_retried),
            _seconds(one.recovered_after_s),
            "wiped" if one.num_lost is None else f"{one.num_lost} of {one.num_stored}",
            f"{one.acceptance_before:.2f}, {one.acceptance_after:.2f}",
            one.left or "nothing",
        )
    return shown


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"
