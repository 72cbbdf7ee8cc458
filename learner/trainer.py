"""The candidate: a draft, its optimizer and its randomness, trained on draws of records.

Knows no store, no feed, no gate. Invariant: under a fixed seed and the same records, a trainer restored from
a checkpoint continues bit for bit.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from buffer.records import GenerationRecord
from learner.batch import TrainingBatch, collate, pack
from learner.checkpoint import load_optimizer_state, optimizer_state
from learner.distill import Objective, StepMetrics, build_optimizer, distill_step
from learner.draft import AdapterState, TrainableDraft
from learner.draw import fresh_draws, num_steps
from learner.judging.evaluation import RecordScore, score_records
from learner.kept_tokens import KeptTokens
from learner.rows import TrainingRow, rejected_suffix_rows, trajectory_row
from learner.settings import LearnerSettings

MEAN = "mean"
"""Name of the running mean among AdamW's moments, so that a checkpoint keeps it and a reset clears it."""


@dataclass
class TrainingReport:
    """Metrics of one cycle's steps."""

    steps: list[StepMetrics] = field(default_factory=list)
    compute_s: float = 0.0

    @property
    def num_skipped(self) -> int:
        return sum(step.skipped for step in self.steps)

    @property
    def mean_loss(self) -> float:
        losses = [step.loss for step in self.steps if not step.skipped]
        return float(np.mean(losses)) if losses else float("nan")


class Trainer:
    """Owns everything that training changes. Several trainers may share one draft, which each loads with its
    own weights.

    `trained` is what the optimizer updates; `candidate`, which is judged and may serve, is a running mean of
    it: at a constant learning rate the weights fluctuate around an optimum, and their mean lies nearer to
    it."""

    def __init__(self, draft: TrainableDraft, settings: LearnerSettings) -> None:
        self.draft = draft
        self.trained: AdapterState = draft.state()
        self.candidate: AdapterState = self.trained
        self.num_steps = 0
        self.busy_s = 0.0
        """Seconds of computing since the start, for training and scoring."""
        self.rng = np.random.default_rng(settings.seed)
        self._settings = settings
        self._optimizer = build_optimizer(draft)
        self._objective = objective_of(settings)
        self._tokens = KeptTokens(draft)

    def plan(self, num_fresh: int, stretch: int = 1) -> tuple[int, int]:
        """(steps, replayed records wanted) for a cycle over so many fresh records; at most `stretch` times
        the usual steps."""
        settings = self._settings
        most = stretch * settings.max_steps_per_cycle
        steps = num_steps(num_fresh, self._fresh_per_step, settings.passes_over_fresh, most)
        return steps, steps * (settings.records_per_step - self._fresh_per_step)

    def train(
        self,
        fresh: Sequence[GenerationRecord],
        replayed: Sequence[GenerationRecord],
        rest: Callable[[float], bool],
        stretch: int = 1,
    ) -> TrainingReport:
        """One step for each draw; `rest(step_s)` sleeps between steps and says whether to continue."""
        report = TrainingReport()
        self.draft.load_unchecked(self.trained)
        self._tokens.count(fresh)
        steps, _ = self.plan(len(fresh), stretch)
        shares = np.array_split(np.arange(len(replayed)), max(1, steps))
        draws = fresh_draws(fresh, self._fresh_per_step, steps, self.rng)
        for drawn, share in zip(draws, shares, strict=False):
            began_s = time.perf_counter()
            report.steps.append(self.step([*drawn, *(replayed[index] for index in share)]))
            self._follow()
            step_s = time.perf_counter() - began_s
            report.compute_s += step_s
            if not rest(step_s):
                break
        self.trained, self.candidate = self.draft.state(), self._mean()
        return report

    def step(self, records: Sequence[GenerationRecord]) -> StepMetrics:
        """One optimizer step of the draft, with its present weights, on these records."""
        began_s = time.perf_counter()
        metrics = distill_step(self.draft, self._optimizer, self.batches(records), self._objective)
        self.num_steps += 1
        self.busy_s += time.perf_counter() - began_s
        return metrics

    def batches(self, records: Sequence[GenerationRecord]) -> list[TrainingBatch]:
        settings = self._settings
        rows: list[TrainingRow] = []
        for record in records:
            row = trajectory_row(record, settings.max_row_tokens)
            rows += [row] if row is not None else []
            rows += rejected_suffix_rows(
                record,
                settings.rejected_suffix_context_tokens,
                settings.rejected_suffix_rounds_per_record,
                settings.rejected_suffix_weight,
                self.rng,
            )
        groups = pack(rows, settings.max_tokens_per_pass, settings.positions_per_pass(self.draft.vocab_size))
        return [collate(group, self.draft.device) for group in groups]

    def score(
        self, state: AdapterState | None, records: Sequence[GenerationRecord]
    ) -> list[RecordScore | None]:
        """Scores of the draft with the weights `state`, one for each record; training state is not
        changed."""
        began_s = time.perf_counter()
        scores = score_records(
            self.draft,
            state,
            records,
            max_row_tokens=self._settings.max_row_tokens,
            max_tokens_per_pass=self._settings.max_tokens_per_pass,
            max_positions_per_pass=self._settings.positions_per_pass(self.draft.vocab_size),
        )
        self.busy_s += time.perf_counter() - began_s
        return scores

    def reset(self, state: AdapterState | None) -> None:
        """Start again from these weights (None: the floor) with fresh moments."""
        self.draft.load_unchecked(self.trained)
        self.draft.load(state)
        self.trained = self.candidate = self.draft.state()
        self._optimizer.state.clear()

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's moments, including the running mean, and the counts that choose kept tokens."""
        return optimizer_state(self._optimizer, self.draft.parameters) | self._tokens.state()

    def restore(
        self,
        adapter: AdapterState,
        optimizer: Mapping[str, Tensor],
        generator_state: Mapping[str, Any],
        num_steps: int,
    ) -> None:
        """Continue from a checkpoint. Raises ValueError for an adapter of another shape."""
        self.draft.load(adapter)
        load_optimizer_state(self._optimizer, self.draft.parameters, self._tokens.restored(optimizer))
        self.trained, self.candidate = self.draft.state(), self._mean()
        self.rng.bit_generator.state = dict(generator_state)
        self.num_steps = num_steps

    def _follow(self) -> None:
        """Update the running mean of each weight, which is kept as one more moment of the optimizer."""
        if self._settings.mean_over_steps == 0:
            return
        for parameter in self.draft.parameters.values():
            if moments := self._optimizer.state.get(parameter):
                mean = moments.setdefault(MEAN, parameter.detach().clone())
                share = max(1 / self._settings.mean_over_steps, 9 / (float(moments["step"]) + 9))
                mean.lerp_(parameter.detach(), share)

    def _mean(self) -> AdapterState:
        """The running mean of every weight, the weight itself before the first step, in the precision in
        which it is exported: what is judged is what would serve."""
        moments = {key: self._optimizer.state.get(each, {}) for key, each in self.draft.parameters.items()}
        return self.draft.settled(
            {
                key: moments[key].get(MEAN, parameter).detach().cpu().to(self.draft.export_dtype, copy=True)
                for key, parameter in self.draft.parameters.items()
            }
        )

    @property
    def _fresh_per_step(self) -> int:
        settings = self._settings
        return max(1, round(settings.records_per_step * (1 - settings.replay_share)))


def objective_of(settings: LearnerSettings) -> Objective:
    """What a step minimises under these settings."""
    return Objective(
        divergence=settings.divergence,
        jensen_shannon_beta=settings.jensen_shannon_beta,
        greedy_temperature=settings.greedy_temperature,
        max_grad_norm=settings.max_grad_norm,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
    )


def limit_threads(num_threads: int) -> None:
    """Limit torch's threads in the whole process, because the learner shares its machine with serving."""
    torch.set_num_threads(num_threads)
