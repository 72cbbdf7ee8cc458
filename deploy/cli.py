"""`everdraft`: the command line, as a table of contents. Each command lives in `deploy/commands`.

Imports no model, no Ray and no Redis: `everdraft --version` is quick, and a command loads what it uses.
"""

import os
from importlib import metadata
from typing import Annotated

import typer

from deploy.commands import bench, demo, doctor, drafts, learn, serve, status
from deploy.environment import quieten_libraries

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
app.add_typer(bench.app, name="bench")
app.command()(doctor.doctor)


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


def main() -> None:
    """The console script."""
    quieten_libraries(os.environ)
    app()
