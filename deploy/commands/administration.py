"""How a command reaches what it administers: its Redis, or with `--url` its Admin API."""

import getpass
import inspect
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import wraps
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from buffer.administration import Administration, DirectAdministration
from buffer.audit import Caller
from deploy.commands.console import (
    DEFAULT_STATE_DIR,
    RedisUrlOption,
    StateDirOption,
    fail,
    memory_url_of,
    plain_faults,
    redis_url_of,
)
from deploy.commands.targets import TargetOption, target_meant

P = ParamSpec("P")

UrlOption = Annotated[
    str | None,
    typer.Option("--url", help="Go over the Admin API of the endpoint at this address, not over Redis."),
]
AdminKeyOption = Annotated[
    str | None,
    typer.Option(
        "--admin-key",
        envvar="EVERDRAFT_ADMIN_KEY",
        help="For --url. Better given by the variable: others see a command line.",
    ),
]


def administers(command: Callable[Concatenate[Administration, P], None]) -> Callable[..., None]:
    """The command, to which the Administration that is meant is given first, with the options that say which
    one that is beside its own."""

    @wraps(command)
    def run(**given: Any) -> None:
        with opened_administration(**{name: given.pop(name) for name in which}) as admin:
            command(admin, **given)  # type: ignore[call-arg]

    which = inspect.signature(opened_administration).parameters
    _, *own = inspect.signature(command).parameters.values()
    setattr(run, "__signature__", inspect.Signature([*own, *which.values()]))  # noqa: B010 (unknown to mypy)
    return run


@contextmanager
def opened_administration(
    state_dir: StateDirOption = DEFAULT_STATE_DIR,
    redis_url: RedisUrlOption = None,
    target_revision: TargetOption = None,
    url: UrlOption = None,
    admin_key: AdminKeyOption = None,
) -> Iterator[Administration]:
    """Faults inside the block end the command with their message."""
    from deploy.http_administration import HttpAdministration
    from deploy.wiring import open_feed, open_store

    with plain_faults():
        if url is not None:
            if not admin_key:
                fail("--url needs the admin key (EVERDRAFT_ADMIN_KEY, or --admin-key); nothing was done")
            if target_revision is not None:
                fail(
                    "--target-revision is for a shared Redis; an endpoint (--url) has one target: drop either"
                )
            yield HttpAdministration(url, admin_key)
            return
        redis_url = redis_url_of(state_dir, redis_url)
        revision = target_meant(redis_url, state_dir, target_revision)
        opened_store = open_store(redis_url, memory_url_of(state_dir, redis_url))
        with closing(open_feed(redis_url, revision)) as feed, closing(opened_store) as store:
            yield DirectAdministration(feed, store, revision, Caller(_local_user(), socket.gethostname()))


def _local_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
