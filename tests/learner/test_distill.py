"""The draft learns what it is shown, at the right positions, and survives poison."""

from dataclasses import replace

import pytest
import torch

from buffer.records import GenerationRecord, RecordSampling
from learner.batch import TrainingBatch
from learner.distill import Objective, build_optimizer, distill_step, weighted_loss
from learner.draft import TrainableDraft
from learner.judging.gate import acceptance
from learner.trainer import Trainer
from tests.support.record_factory import GREEDY, RecordFactory
from tests.support.tiny_learner import quick_settings, tiny_draft, tiny_pair

STEPS = 80
REQUIRED_GAIN = 0.4


def held_acceptance(trainer: Trainer, records: list[GenerationRecord]) -> float:
    scores = trainer.score(trainer.draft.state(), records)
    return acceptance([score for score in scores if score is not None])


def read_one_too_late(batch: TrainingBatch) -> TrainingBatch:
    """OSD's bug: the logits after the decided token instead of before it."""
    last_column = batch.token_ids_RT.shape[1] - 1
    return replace(batch, column_N=(batch.column_N + 1).clamp(max=last_column))


def gain_from_overfitting(sampling: RecordSampling, *, with_bug: bool) -> float:
    """Rise of expected acceptance on the very prefixes of 50 records, after training on them."""
    records = RecordFactory(*tiny_pair()).records(50, sampling, max_tokens=8)
    trainer = Trainer(tiny_draft(), quick_settings(rejected_suffix_weight=0.0))
    optimizer = build_optimizer(trainer.draft)
    before = held_acceptance(trainer, records)
    batches = trainer.batches(records)
    if with_bug:
        batches = [read_one_too_late(batch) for batch in batches]
    for _ in range(STEPS):
        distill_step(trainer.draft, optimizer, batches, Objective(learning_rate=1e-2))
    return held_acceptance(trainer, records) - before


@pytest.mark.parametrize("sampling", [GREEDY, RecordSampling(temperature=0.7)], ids=["greedy", "sampled"])
def test_overfitting_50_records_raises_acceptance_and_an_index_off_by_one_does_not(
    sampling: RecordSampling,
) -> None:
    """Deterministic: everything is seeded."""
    assert gain_from_overfitting(sampling, with_bug=False) > REQUIRED_GAIN
    assert gain_from_overfitting(sampling, with_bug=True) < REQUIRED_GAIN - 0.1


@pytest.fixture(scope="module")
def records() -> list[GenerationRecord]:
    return RecordFactory(*tiny_pair()).records(12, RecordSampling(temperature=0.9), max_tokens=6)


@pytest.mark.parametrize(
    "divergence", ["reverse_kl", "jensen_shannon", "total_variation", "negative_log_acceptance", "osd"]
)
def test_every_divergence_lowers_its_own_loss(records: list[GenerationRecord], divergence: str) -> None:
    draft = tiny_draft()
    trainer = Trainer(draft, quick_settings(divergence=divergence, rejected_suffix_weight=0.0))
    losses = [trainer.step(records).loss for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_step_in_small_passes_is_the_step_in_one(records: list[GenerationRecord]) -> None:
    whole, split = (
        Trainer(tiny_draft(), quick_settings(max_logits_mib_per_pass=bound, rejected_suffix_weight=0.0))
        for bound in (1.0, 0.01)
    )
    assert len(split.batches(records)) > len(whole.batches(records)) == 1
    first, second = whole.step(records), split.step(records)
    assert first.loss == pytest.approx(second.loss, rel=1e-4)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-3)


def test_a_step_that_is_not_finite_changes_nothing_and_says_so(records: list[GenerationRecord]) -> None:
    draft = tiny_draft()
    optimizer = build_optimizer(draft)
    batches = Trainer(draft, quick_settings()).batches(records)
    poisoned = replace(batches[0], topk_logprobs_NK=torch.full_like(batches[0].topk_logprobs_NK, torch.nan))
    before = draft.state()
    metrics = distill_step(draft, optimizer, [*batches, poisoned], Objective())
    assert metrics.skipped
    assert all(torch.equal(before[key], value) for key, value in draft.state().items())
    assert not distill_step(draft, optimizer, batches, Objective()).skipped


def test_the_learning_rate_warms_up_and_again_after_a_reset(records: list[GenerationRecord]) -> None:
    trainer = Trainer(tiny_draft(), quick_settings(warmup_steps=4, learning_rate=0.4))
    optimizer = trainer._optimizer
    rates = []
    for step in range(8):
        if step == 6:
            trainer.reset(None)
        trainer.step(records)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.1, 0.2])


def test_osd_looks_at_first_rejections_only(records: list[GenerationRecord]) -> None:
    draft = tiny_draft()
    batch = Trainer(draft, quick_settings(rejected_suffix_weight=0.0)).batches(records)[0]
    logits_NV = draft.logits(batch).detach().requires_grad_()
    weighted_loss(batch, logits_NV, Objective(divergence="osd")).backward()
    assert logits_NV.grad is not None
    touched_N = logits_NV.grad.abs().sum(-1) > 0
    assert torch.equal(touched_N, batch.first_rejected_N)
    assert 0 < int(touched_N.sum()) < batch.num_positions


def test_a_draft_without_an_adapter_is_the_base(records: list[GenerationRecord]) -> None:
    draft: TrainableDraft = tiny_draft()
    batch = Trainer(draft, quick_settings(rejected_suffix_weight=0.0)).batches(records[:1])[0]
    logits_TV = tiny_pair()[1](input_ids=batch.token_ids_RT).logits[0]
    torch.testing.assert_close(draft.logits(batch), logits_TV[batch.column_N], atol=1e-5, rtol=1e-5)
