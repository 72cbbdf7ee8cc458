"""`everdraft serve`: your models behind one endpoint, with a learner beside them, until Ctrl-C."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.commands.console import ConfigOption, narrator, output, plain_faults


def serve(
    target: Annotated[str | None, typer.Option(help="Path or hub id of the model to serve.")] = None,
    draft: Annotated[str | None, typer.Option(help="Path or hub id of its draft, or self.")] = None,
    engine: Annotated[str | None, typer.Option(help="everdraft (default) or vllm.")] = None,
    host: Annotated[str | None, typer.Option(help="Where to listen; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the endpoint; default 8000.")] = None,
    config: ConfigOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis; default: one of our own.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="State folder; default .everdraft.")] = None,
    no_learner: Annotated[bool, typer.Option("--no-learner", help="Serve only; learn nothing.")] = False,
) -> None:
    """Serve TARGET with DRAFT at an OpenAI-compatible endpoint, and learn from the traffic."""
    from deploy.commands.invitation import invite
    from deploy.settings_source import load_settings
    from deploy.signals import wait_for_stop
    from deploy.wiring import running_system

    overrides: dict[str, dict[str, Any]] = {
        "serving": {"engine": engine, "target": target, "draft": draft, "device": device, "dtype": dtype},
        "redis": {"url": redis_url},
        "cluster": {
            "host": host,
            "port": port,
            "state_dir": state_dir,
            "learn": False if no_learner else None,
        },
    }
    with plain_faults():
        settings = load_settings(config, os.environ, overrides)
        tell = narrator(settings.cluster.log_format)
        with running_system(settings, tell) as system:
            invite(output(), system)
            again = wait_for_stop(system.note_learner)
            tell(
                f"draining: requests under way may go on for {settings.serving.drain_timeout_s:g} s; "
                "a second signal ends them at once"
            )
            if not system.drain(again):
                tell("requests under way were aborted")
            tell("stopping")
