"""`everdraft doctor`: what this machine has, and what follows."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from deploy.commands.console import DEFAULT_STATE_DIR, RedisUrlOption, StateDirOption, output
from deploy.terminal import lines

STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


def doctor(
    target: Annotated[str | None, typer.Option(help="Also load this target …")] = None,
    draft: Annotated[str | None, typer.Option(help="… and this draft, and see whether they fit.")] = None,
    device: Annotated[str, typer.Option(help="Where they would run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    num_slots: Annotated[int, typer.Option(help="Sequences that would run at once.")] = 8,
    max_seq_len: Annotated[int, typer.Option(help="Prompt and output together, tokens.")] = 1024,
    host: Annotated[str, typer.Option(help="Where the endpoint would listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.")] = 8000,
    state_dir: StateDirOption = DEFAULT_STATE_DIR,
    redis_url: RedisUrlOption = None,
) -> None:
    """Check this machine; exit code 1 if something would keep everdraft from starting."""
    from deploy.doctor import Subject, examine

    subject = Subject(
        host=host,
        port=port,
        state_dir=Path(state_dir).expanduser().resolve(),
        redis_url=redis_url,
        target=target,
        draft=draft,
        device=device,
        dtype=dtype,
        num_slots=num_slots,
        max_seq_len=max_seq_len,
    )
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    failed = False
    for check in examine(subject):
        failed = failed or check.verdict == "failure"
        finding = f"{check.finding}: {check.consequence}" if check.consequence else check.finding
        table.add_row(check.name, Text(check.verdict, STYLES[check.verdict]), lines(finding.split("\n")))
    output().print(table)
    raise typer.Exit(1 if failed else 0)
