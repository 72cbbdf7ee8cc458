"""One optimizer step on the draft's trainable weights, towards the target's distributions.

Knows no store and no clock. Invariant: a step whose loss or gradient is not finite changes nothing and is
reported as skipped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learner.batch import TrainingBatch
from learner.distributions import training_logprobs
from learner.divergences import named_divergence
from learner.draft import TrainableDraft


@dataclass(frozen=True)
class Objective:
    """What a step minimises: a divergence's mean over weighted positions."""

    divergence: str = "forward_kl"
    jensen_shannon_beta: float = 0.5
    greedy_temperature: float = 0.5
    max_grad_norm: float = 1.0
    learning_rate: float = 1e-3
    warmup_steps: int = 0


@dataclass(frozen=True)
class StepMetrics:
    """`loss` is a mean over positions; `grad_norm` is before clipping; `skipped`: nothing changed."""

    loss: float
    grad_norm: float
    num_positions: int
    skipped: bool


def build_optimizer(draft: TrainableDraft) -> torch.optim.AdamW:
    """AdamW without decay: an adapter that learns nothing new stays where it is. Each step sets its own
    learning rate."""
    return torch.optim.AdamW(list(draft.parameters.values()), weight_decay=0.0)


def distill_step(
    draft: TrainableDraft,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[TrainingBatch],
    objective: Objective,
) -> StepMetrics:
    """One step over the batches together, their gradients accumulated."""
    optimizer.zero_grad(set_to_none=True)
    total_weight = sum(float(_weights(batch, objective).sum()) for batch in batches)
    num_positions = sum(batch.num_positions for batch in batches)
    if total_weight == 0.0:
        return StepMetrics(0.0, 0.0, num_positions, skipped=True)
    loss = 0.0
    for batch in batches:
        part = weighted_loss(batch, draft.logits(batch), objective) / total_weight
        part.backward()
        loss += float(part.detach())
    grad_norm = float(nn.utils.clip_grad_norm_(draft.parameters.values(), objective.max_grad_norm))
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:
        _set_learning_rate(optimizer, objective)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepMetrics(loss, grad_norm, num_positions, skipped=not finite)


def weighted_loss(batch: TrainingBatch, logits_NV: Tensor, objective: Objective) -> Tensor:
    """Sum over positions of weight times divergence, a scalar. Where the draft's head lacks tokens, a
    position counts by the probability of those that it has."""
    target_NP, draft_NP, coverage_N = training_logprobs(batch, logits_NV, objective.greedy_temperature)
    divergence = named_divergence(objective.divergence, objective.jensen_shannon_beta)
    return (_weights(batch, objective) * coverage_N * divergence(target_NP, draft_NP)).sum()


def _set_learning_rate(optimizer: torch.optim.Optimizer, objective: Objective) -> None:
    """Warm-up by the optimizer's own count of steps, which a checkpoint keeps and a reset clears: Adam's
    first steps are full-sized in every direction, and on the demo pair they undid the draft."""
    counts = [float(moments["step"]) for moments in optimizer.state.values()]
    share = (max(counts, default=0.0) + 1) / max(1, objective.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = objective.learning_rate * min(1.0, share)


def _weights(batch: TrainingBatch, objective: Objective) -> Tensor:
    """[N]; `osd` looks at first rejections only."""
    return batch.weight_N * batch.first_rejected_N if objective.divergence == "osd" else batch.weight_N
