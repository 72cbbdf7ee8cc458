"""`everdraft demo`: the product at work on the pair that ships with it, nothing else installed."""

import os
import time
from contextlib import closing
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.commands.console import DEFAULT_STATE_DIR, ConfigOption, errors, output, plain_faults

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
PAIR = Path(str(files("deploy"))) / "demo" / "pair"
SERVING = {
    "model_name": "everdraft-demo",
    "num_threads": 1,
    "max_seq_len": 512,
    "speculation": "model",
    "status_interval_s": 0.25,
    "prefix_cache_mib": 0,
    "max_route_drafts": 0,
}
"""The demo shows a draft learn: copying from the text would blur what it is worth. No prefix reuse either:
the measurement sends each prompt to three arms, and only the first would compute it."""
LEARNER = {
    "target_modules": LORA_MODULES,
    "passes_over_fresh": 2.0,
    "max_routes": 0,
}
"""Chosen on an early checkpoint of this pair, see LOG.md, where LoRA on the embeddings too learnt worse."""

RealOption = Annotated[
    bool,
    typer.Option(
        "--real", help="A pretrained chat model, fetched once, drafts for itself; a quarter of an hour."
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option(help="With --real: .jsonl rows with `prompt` to ask; default: the demo's corpus."),
]


def demo(
    port: Annotated[int | None, typer.Option(help="Port of the endpoint; default 8000.")] = None,
    leave: Annotated[bool, typer.Option("--exit", help="Stop after the summary.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this file (JSON).")] = None,
    plot: Annotated[Path, typer.Option(help="Write the picture to this file.")] = Path("demo.png"),
    config: ConfigOption = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="State folder; default: a new one in .everdraft.")
    ] = None,
    real: RealOption = False,
    data: DataOption = None,
) -> None:
    """Start everything on this machine, replay traffic while drafts learn, measure, and stay up."""
    began_s = time.monotonic()
    fresh = DEFAULT_STATE_DIR / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    if real:
        _real_demo(port, leave, report, data, config, state_dir or fresh, began_s)
        return
    from deploy.commands.invitation import invite
    from deploy.demo.figures import metrics_of, save_plot, series
    from deploy.demo.plan import DemoPlan, Timekeeper
    from deploy.demo.report import write_report
    from deploy.demo.screen import DemoScreen
    from deploy.demo.session import DemoSession
    from deploy.demo.summary import summarise
    from deploy.settings_source import load_settings
    from deploy.signals import wait_for_stop
    from deploy.wiring import open_feed, open_store, running_system

    overrides: dict[str, dict[str, Any]] = {
        "serving": {"target": str(PAIR / "target"), "draft": str(PAIR / "draft"), **SERVING},
        "learner": LEARNER,
        "cluster": {"port": port, "state_dir": state_dir or fresh},
    }
    console = output()
    with plain_faults():
        settings = load_settings(config, os.environ, overrides)
        with running_system(settings, errors().print) as system:
            with (
                closing(open_feed(system.redis_url, system.target_revision)) as feed,
                closing(open_store(system.redis_url, system.memory_url)) as store,
            ):
                with DemoScreen(console) as screen:
                    result = DemoSession(system, feed, screen, DemoPlan(), Timekeeper(), store).run()
                metrics = metrics_of(result, feed, wall_s=time.monotonic() - began_s)
            summarise(console, screen, result, metrics)
            save_plot(result, plot)
            console.print()
            console.print(f"acceptance over requests: {plot}")
            if report is not None:
                write_report(report, "demo", metrics, series(result))
                console.print(f"figures: {report}")
            if not leave:
                invite(console, system)
                wait_for_stop(system.note_learner)
            errors().print("stopping")


def _real_demo(
    port: int | None,
    leave: bool,
    report: Path | None,
    data: Path | None,
    config: Path | None,
    state_dir: Path,
    began_s: float,
) -> None:
    from deploy.commands.invitation import invite
    from deploy.demo.plot import moving_acceptance
    from deploy.demo.real import LEARNER, SERVING, asked_for, metrics_of, run_real, summary_lines
    from deploy.demo.real_model import fetch_model
    from deploy.demo.report import write_report
    from deploy.demo.screen import DemoScreen
    from deploy.settings_source import load_settings
    from deploy.signals import wait_for_stop
    from deploy.wiring import open_feed, running_system

    console = output()
    with plain_faults():
        asked = asked_for(data)
        overrides: dict[str, dict[str, Any]] = {
            "serving": {"target": str(fetch_model(errors().print)), **SERVING},
            "learner": LEARNER,
            "cluster": {"port": port, "state_dir": state_dir},
        }
        settings = load_settings(config, os.environ, overrides)
        with running_system(settings, errors().print) as system:
            with (
                closing(open_feed(system.redis_url, system.target_revision)) as feed,
                DemoScreen(console) as screen,
            ):
                result = run_real(system, feed, screen, asked)
            metrics = metrics_of(result, time.monotonic() - began_s)
            console.print(screen.traffic_table())
            for line in summary_lines(metrics):
                console.print(line)
            if report is not None:
                write_report(report, "demo_real", metrics, {"acceptance": moving_acceptance(result.outcomes)})
                console.print(f"figures: {report}")
            if not leave:
                invite(console, system)
                wait_for_stop(system.note_learner)
            errors().print("stopping")
