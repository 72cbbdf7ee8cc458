"""`everdraft learning`, `capture`, `drain`, `records` and `admin`: orders to all replicas and the learner.

An order lies in Redis until it is taken back: it outlasts restarts of whoever follows it.
"""

from typing import Annotated

import typer
from rich.table import Table

from buffer.administration import Administration
from buffer.controls import Controls
from deploy.commands.administration import administers
from deploy.commands.console import fail, output
from deploy.commands.words import orders_in_words

learning = typer.Typer(help="Pause and resume the learner.", no_args_is_help=True)
records = typer.Typer(help="Recorded requests.", no_args_is_help=True)
admin_log = typer.Typer(help="What operators did.", no_args_is_help=True)

OneRouteOption = Annotated[str | None, typer.Option("--route", help="This route's draft only; default: all.")]


@learning.command()
@administers
def pause(
    admin: Administration,
    route: OneRouteOption = None,
) -> None:
    """Train and promote no more; what serves is still watched, and rolled back if it is worse."""
    _say(admin.pause_learning(route))


@learning.command()
@administers
def resume(
    admin: Administration,
    route: OneRouteOption = None,
) -> None:
    """Learn again."""
    _say(admin.resume_learning(route))


@administers
def capture(
    admin: Administration,
    rate: Annotated[
        float | None, typer.Argument(min=0, max=1, help="Share of requests to record; none: show.")
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Back to serving.capture_rate.")] = False,
) -> None:
    """What share of requests all replicas record for learning: show it, order another, or go back."""
    if reset and rate is not None:
        fail(f"a rate ({rate:g}) and --reset contradict each other; nothing was changed")
    _say(admin.controls() if rate is None and not reset else admin.set_capture_rate(rate))


@administers
def drain(
    admin: Administration,
    replica: Annotated[
        str | None, typer.Option("--replica", help="One replica, by its id; default: all.")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take requests again.")] = False,
) -> None:
    """Refuse new requests with 503, and let those under way finish, until it is undone."""
    _say(admin.undrain(replica) if undo else admin.drain(replica))


@records.command()
@administers
def purge(
    admin: Administration,
    request_id: Annotated[str | None, typer.Option("--request-id", help="The id of an answer.")] = None,
    route: Annotated[str | None, typer.Option("--route", help="Records of this route.")] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", min=0, help="Stored more than so many seconds ago.")
    ] = None,
) -> None:
    """Delete, for good, the records that fit everything given; something must be. The learner lets go of
    them, too; what it has learnt stays learnt."""
    report = admin.purge(request_id=request_id, route=route, older_than_s=older_than)
    output().print(f"{report.num_records} records deleted")
    if report.caveat:
        output().print(report.caveat)


@admin_log.command("log")
@administers
def show_log(
    admin: Administration,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=1000, help="How many.")] = 20,
) -> None:
    """The last changes and refused calls: when, who, from where, what, and what came of it."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for line in admin.audit_log(lines):
        arguments = " ".join(f"{name}={value}" for name, value in line.arguments.items())
        table.add_row(line.time, line.who, line.address, line.operation, arguments, line.outcome)
    output().print(table)


def _say(controls: Controls) -> None:
    for sentence in orders_in_words(controls):
        output().print(sentence)
