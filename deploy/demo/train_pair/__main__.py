"""The command that trains the pair, stage by stage; a killed run goes on where it was.

Knows nothing of how a stage works. Invariant: a stage that is done is not done again.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from deploy.demo.train_pair.fit import Budget
from deploy.demo.train_pair.stages import STAGES, TrainingPlan

WORK = Path(".train_pair")
OUT = Path("deploy/demo/pair")


def main(
    out: Annotated[Path, typer.Option(help="Where the trained pair is written.")] = OUT,
    work: Annotated[Path, typer.Option(help="Where checkpoints are kept.")] = WORK,
    steps: Annotated[int, typer.Option(help="Most steps of the target.")] = 5000,
    minutes: Annotated[float, typer.Option(help="Most minutes for the target.")] = 60.0,
    recital_steps: Annotated[int, typer.Option(help="Most steps of the target's recital.")] = 400,
    recital_minutes: Annotated[float, typer.Option(help="Most minutes of the recital.")] = 6.0,
    draft_steps: Annotated[int, typer.Option(help="Most steps of the draft.")] = 2500,
    draft_minutes: Annotated[float, typer.Option(help="Most minutes for the draft.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Seed of tokenizer, weights and batches.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads, each with its shard of a batch.")] = 2,
    only: Annotated[str, typer.Option(help="One stage alone: target, recital, draft or card.")] = "",
) -> None:
    """Train the target on every domain, the draft on prose alone, and write both with a model card."""
    torch.set_num_threads(1)
    budgets = (steps, minutes), (recital_steps, recital_minutes), (draft_steps, draft_minutes)
    plan = TrainingPlan(out, work, seed, threads, *(Budget(*limits) for limits in budgets))
    for name, stage in STAGES.items():
        if only in ("", name):
            stage(plan)


if __name__ == "__main__":
    typer.run(main)
