"""`everdraft`: the command line, as a table of contents. Each command lives in `deploy/commands`.

Further groups of commands come from other distributions, by entry points of the group `everdraft.commands`;
`bench` is one, and where it is absent the command says what to install. Imports no model, no Ray and no
Redis: `everdraft --version` is quick, and a command loads what it uses.
"""

import os
from collections.abc import Iterable
from importlib import metadata
from typing import Annotated

import typer

from deploy.commands import convert, demo, doctor, draft, drafts, key, learn, orders, serve, status
from deploy.commands.console import fail
from deploy.environment import quieten_libraries

COMMANDS = "everdraft.commands"
"""Entry points of this group are groups of commands, each a typer.Typer."""
HOW_TO_GET_BENCH = (
    "`everdraft bench` is a distribution of its own, everdraft-bench, which is not installed: "
    "`pip install everdraft-bench`, or `pip install ./benchmarks` in a checkout"
)
_WHATEVER_FOLLOWS = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="everdraft",
    help="Speculative decoding whose drafts learn from your own traffic, and change no output.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)
app.command()(demo.demo)
app.command()(serve.serve)
app.command()(learn.learn)
app.command()(status.status)
app.add_typer(drafts.app, name="drafts")
app.add_typer(draft.app, name="draft")
app.add_typer(key.app, name="key")
app.add_typer(orders.learning, name="learning")
app.command()(orders.capture)
app.command()(orders.drain)
app.add_typer(orders.records, name="records")
app.add_typer(orders.admin_log, name="admin")
app.command()(doctor.doctor)
app.command()(convert.convert)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"everdraft {metadata.version('everdraft')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def add_further_commands(app: typer.Typer, found: Iterable[metadata.EntryPoint]) -> None:
    """Those of other distributions. One that cannot be loaded costs its own commands only: they say why."""
    missing = {"bench": HOW_TO_GET_BENCH}
    for entry in found:
        try:
            app.add_typer(entry.load(), name=entry.name)
            missing.pop(entry.name, None)
        except Exception as error:  # whatever another distribution's module may raise
            missing[entry.name] = f"`everdraft {entry.name}` cannot be loaded from {entry.value}: {error}"
    for name, why in missing.items():
        _add_absent(app, name, why)


def _add_absent(app: typer.Typer, name: str, why: str) -> None:
    """A command that, whatever follows it, says why it is not here."""
    text = f"Not here; `everdraft {name}` says why, and what to install."

    @app.command(name, help=text, context_settings=_WHATEVER_FOLLOWS, add_help_option=False)
    def absent() -> None:
        fail(why)


def main() -> None:
    """The console script."""
    quieten_libraries(os.environ)
    add_further_commands(app, metadata.entry_points(group=COMMANDS))
    app()
