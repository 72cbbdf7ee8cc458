"""The training loop of both models: steps under a cosine, atomic checkpoints, progress shown.

Knows nothing of what is learned: the loss of a step is a function given to it. Invariant: a run that was
killed goes on from its last checkpoint with the optimizers, the step and the torch generator that it had.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch import nn

from buffer.file_lock import Holder, take_lock
from deploy.errors import DeployError
from deploy.terminal import Terminal

WARMUP_STEPS = 60
FINAL_RATE = 0.02


class TrainingInUseError(DeployError):
    """Another process trains from this checkpoint."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A run ends at whichever of its two limits comes first; the learning rate follows the nearer one."""

    num_steps: int
    minutes: float

    def progress(self, step: int, elapsed_s: float) -> float:
        """How much of the budget is spent, from 0 to 1."""
        return min(1.0, max(step / self.num_steps, elapsed_s / (60 * self.minutes)))


@dataclass(slots=True)
class Report:
    """What a run did: steps, seconds, and the smoothed loss at each hundredth step."""

    num_steps: int = 0
    elapsed_s: float = 0.0
    loss: float = math.nan
    losses: list[tuple[int, float]] = field(default_factory=list)

    def add(self, loss: float) -> None:
        """Count one step."""
        self.num_steps += 1
        self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
        if self.num_steps % 100 == 0:
            self.losses.append((self.num_steps, round(self.loss, 4)))


def optimizers_for(model: nn.Module, *, matrix_rate: float, other_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "layers" in name]
    inside = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    return [
        torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def fit(
    model: nn.Module,
    losses_at: Callable[[int], list[Callable[[], torch.Tensor]]],
    optimizers: list[torch.optim.Optimizer],
    budget: Budget,
    checkpoint: Path,
    *,
    save_every: int = 50,
) -> Report:
    """Train until the budget is spent, from the checkpoint if there is one.

    `losses_at` gives the losses of a step's shards, each of which is run in a thread of its own. Raises
    TrainingInUseError when another process trains from this checkpoint.
    """
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    model.train()
    with _sole_run(checkpoint), _progress() as bar:
        report = _resume(model, optimizers, checkpoint)
        task = bar.add_task(checkpoint.stem, total=1.0, loss=report.loss)
        while (spent := budget.progress(report.num_steps, report.elapsed_s)) < 1:
            started = time.monotonic()
            _set_rates(optimizers, rates, _rate(report.num_steps, spent))
            report.add(_step(model, losses_at(report.num_steps), optimizers))
            report.elapsed_s += time.monotonic() - started
            bar.update(task, completed=spent, loss=report.loss)
            if report.num_steps % save_every == 0:
                _save(model, optimizers, report, checkpoint)
                bar.console.print(f"step {report.num_steps} loss {report.loss:.3f} {report.elapsed_s:.0f} s")
        _save(model, optimizers, report, checkpoint)
    model.eval()
    return report


@contextmanager
def _sole_run(checkpoint: Path) -> Iterator[None]:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(checkpoint.with_suffix(".lock"))
    if isinstance(lock, Holder):
        raise TrainingInUseError(
            f"{checkpoint}: {lock} trains from it; nothing was trained: wait, or stop it"
        )
    try:
        yield
    finally:
        os.close(lock)


def _step(
    model: nn.Module, losses: list[Callable[[], torch.Tensor]], optimizers: list[torch.optim.Optimizer]
) -> float:
    weights = list(model.parameters())

    def shard(loss_of: Callable[[], torch.Tensor]) -> tuple[float, tuple[torch.Tensor, ...]]:
        torch.set_num_threads(1)
        loss = loss_of()
        return loss.item(), torch.autograd.grad(loss, weights)

    with ThreadPoolExecutor(len(losses)) as pool:
        values, gradients = zip(*pool.map(shard, losses), strict=True)
    for weight, *parts in zip(weights, *gradients, strict=True):
        weight.grad = torch.stack(parts).mean(0)
    nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return float(sum(values)) / len(values)


def _rate(step: int, spent: float) -> float:
    decay = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * spent))
    return min(1.0, (step + 1) / WARMUP_STEPS) * decay


def _set_rates(optimizers: list[torch.optim.Optimizer], rates: list[list[float]], scale: float) -> None:
    for optimizer, own in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate * scale


def _save(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], report: Report, checkpoint: Path
) -> None:
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "generator": torch.get_rng_state(),
        "report": [report.num_steps, report.elapsed_s, report.loss, report.losses],
    }
    aside = checkpoint.with_suffix(".new")
    torch.save(state, aside)
    os.replace(aside, checkpoint)


def _resume(model: nn.Module, optimizers: list[torch.optim.Optimizer], checkpoint: Path) -> Report:
    if not checkpoint.exists():
        return Report()
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["generator"])
    return Report(*state["report"])


def _progress() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f}", markup=False),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Terminal())
