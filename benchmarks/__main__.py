"""`python -m benchmarks`: one JSON for each measurement, in `benchmarks/results` unless told otherwise."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.engine import measure, table
from deploy.commands.demo import PAIR
from deploy.demo.report import write_report

RESULTS = Path(__file__).parent / "results"


def engine(
    target: Annotated[str, typer.Option(help="Path or hub id.")] = str(PAIR / "target"),
    draft: Annotated[str, typer.Option(help="Path or hub id.")] = str(PAIR / "draft"),
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option()] = "float32",
    threads: Annotated[int, typer.Option(help="Of one forward pass.")] = 1,
    repeats: Annotated[int, typer.Option(help="Turns of every arm.")] = 7,
    report: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS / "engine.json",
) -> None:
    """Passes and rounds of the engine, in this process: no Ray, Redis or HTTP."""
    torch.set_num_threads(threads)
    metrics = measure(target, draft, device=device, dtype=dtype, repeats=repeats)
    Console().print(table(metrics))
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "engine", {"threads": threads, **metrics}, {})


if __name__ == "__main__":
    typer.run(engine)
