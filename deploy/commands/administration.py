"""How a command reaches what it administers: its Redis, or with `--url` its Admin API."""

import getpass
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from buffer.administration import Administration, DirectAdministration
from buffer.audit import Caller
from deploy.commands.console import fail, memory_url_of, plain_faults, redis_url_of
from deploy.commands.targets import target_meant

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


@contextmanager
def opened_administration(
    state_dir: Path,
    redis_url: str | None,
    target_revision: str | None,
    url: str | None,
    admin_key: str | None,
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
