"""How commands speak: results on standard output, progress and faults on standard error.

Exit codes: 0 all well, 1 something is wrong with the system looked at, 2 a fault in what was asked.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text

from buffer.errors import SeamError
from buffer.redaction import redacted
from deploy.errors import DeployError
from deploy.running import RunningNote, read_learner_snapshot, read_note
from deploy.terminal import Terminal, visible
from serving.log_lines import LogFormat, LogPlan
from serving.models.errors import UnsupportedModelError

FAULT = 2

_log = logging.getLogger(__name__)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", envvar="EVERDRAFT_CONFIG", help="Settings file, TOML or YAML."),
]
StateDirOption = Annotated[
    Path,
    typer.Option("--state-dir", envvar="EVERDRAFT__CLUSTER__STATE_DIR", help="State folder of the run."),
]
RedisUrlOption = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        envvar="EVERDRAFT__REDIS__URL",
        help="Redis; default: the running one's. A password is for the variable: others see a command line.",
    ),
]
RouteOption = Annotated[str, typer.Option("--route", help="The route whose drafts are meant.")]
DEFAULT_STATE_DIR = Path(".everdraft")


def output() -> Terminal:
    """Standard output as it is now; made anew so that a redirected one is honoured."""
    return Terminal()


def errors() -> Terminal:
    return Terminal(stderr=True)


def narrator(log_format: LogFormat) -> Callable[[str], None]:
    """Tells on standard error what a service does, in the form of this process's log, which begins here."""
    LogPlan(log_format).begin(process="driver")
    return errors().print if log_format == "text" else _log.info


@contextmanager
def plain_faults() -> Iterator[None]:
    """Faults with a message of ours end the command with that message and exit code 2."""
    try:
        yield
    except (DeployError, SeamError, UnsupportedModelError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Say what is wrong, a line for each fault and no password, and end the command."""
    for line in redacted(message).split("\n"):
        errors().print(Text.assemble(("error:", "bold red"), f" {visible(line)}"))
    raise typer.Exit(FAULT)


def running_note(state_dir: Path) -> RunningNote | None:
    return read_note(state_dir.expanduser().resolve())


def running_learner(state_dir: Path) -> dict[str, Any] | None:
    """What the learner that runs with this folder last said of itself."""
    return read_learner_snapshot(state_dir.expanduser().resolve())


def memory_url_of(state_dir: Path, redis_url: str) -> str | None:
    """Where records of capture mode `memory` lie; known only of the everdraft that runs with this folder."""
    note = running_note(state_dir)
    return (note.memory_url or None) if note is not None and note.redis_url == redis_url else None


def redis_url_of(state_dir: Path, redis_url: str | None) -> str:
    """The given address, else that of the everdraft that runs with this state folder."""
    if redis_url is not None:
        return redis_url
    note = running_note(state_dir)
    if note is None:
        fail(f"no everdraft runs with the state folder {state_dir}; start one, or give --redis-url")
    return note.redis_url
