"""`everdraft learn`: a learner in this process, beside replicas that run elsewhere; no Ray."""

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from deploy.commands.console import ConfigOption, fail, memory_url_of, narrator, output, plain_faults
from deploy.running import read_note, sole_learner, write_learner_snapshot
from deploy.settings import Settings

if TYPE_CHECKING:
    from learner.loop import Learner


def learn(
    target: Annotated[str | None, typer.Option(help="The model that the replicas serve.")] = None,
    draft: Annotated[str | None, typer.Option(help="Its draft, which is to learn, or self.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Where the replicas leave their records.")] = None,
    config: ConfigOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The replicas' dtype.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="State folder; default .everdraft.")] = None,
) -> None:
    """Learn from the records of running replicas, and publish better drafts to them, until Ctrl-C."""
    from deploy.settings_source import load_settings

    overrides: dict[str, dict[str, Any]] = {
        "serving": {"target": target, "draft": draft, "device": device, "dtype": dtype},
        "redis": {"url": redis_url},
        "cluster": {"state_dir": state_dir},
    }
    with plain_faults():
        settings = load_settings(config, os.environ, overrides)
        if settings.serving.draft is None:
            fail("serving.draft is missing (give --draft); there is nothing to teach")
        url = _redis_url(settings)
        memory_url = settings.redis.memory_url or memory_url_of(settings.state_dir, url)
        with sole_learner(settings.state_dir):
            _run(settings, url, memory_url)


def _redis_url(settings: Settings) -> str:
    if settings.redis.url is not None:
        return settings.redis.url
    note = read_note(settings.state_dir)
    if note is None:
        fail("redis.url is missing (give --redis-url), and no everdraft runs with this state folder")
    if note.learns:
        fail(f"the everdraft at {note.url} has a learner already; start it with --no-learner")
    return note.redis_url


def _run(settings: Settings, redis_url: str, memory_url: str | None) -> None:
    from deploy.learning import build_learner
    from deploy.private_memory import forbid_core_dumps
    from deploy.signals import wait_for_stop
    from deploy.wiring import check_memory_redis, check_models, check_redis_url, learner_settings
    from learner.trainer import limit_threads

    tell = narrator(settings.cluster.log_format)
    check_redis_url(redis_url)
    if memory_url is not None:
        check_memory_redis(memory_url, tell)
        forbid_core_dumps()
    check_models(settings)
    limit_threads(settings.learner.num_threads)
    tell("loading the models")
    learner = build_learner(settings.serving, learner_settings(settings), redis_url, memory_url)
    stop = threading.Event()
    thread = threading.Thread(target=learner.run, args=(stop,), name="learner", daemon=True)
    thread.start()
    output().print(Text.assemble("learning; ", ("Ctrl-C stops.", "dim")))
    wait_for_stop(lambda: _tick(settings, learner, thread))
    tell("stopping")
    stop.set()
    thread.join(timeout=30.0)


def _tick(settings: Settings, learner: "Learner", thread: threading.Thread) -> None:
    if not thread.is_alive():
        fail("the learner has ended by itself; its last checkpoint stands, start it again")
    write_learner_snapshot(settings.state_dir, learner.snapshot())
