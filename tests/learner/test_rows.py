"""Rows, padding and truncation: every position is read where its token is decided."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from buffer.names import NGRAM_DRAFTER
from buffer.records import GenerationRecord, RecordSampling
from learner.batch import collate, pack
from learner.judging.evaluation import observed_acceptance
from learner.rows import NO_TOKEN, record_fault, rejected_suffix_rows, trajectory_row
from tests.support.record_factory import RecordFactory
from tests.support.tiny_learner import VOCAB_SIZE, tiny_draft, tiny_pair


@pytest.fixture(scope="module")
def factory() -> RecordFactory:
    return RecordFactory(*tiny_pair())


@pytest.fixture(scope="module")
def records(factory: RecordFactory) -> list[GenerationRecord]:
    return factory.records(8, RecordSampling(temperature=0.8), max_tokens=10)


def test_the_target_itself_agrees_with_what_rows_say_it_said(
    factory: RecordFactory, records: list[GenerationRecord]
) -> None:
    rng = np.random.default_rng(0)
    for record in records:
        row = trajectory_row(record, 1000)
        assert row is not None
        suffixes = rejected_suffix_rows(record, 1000, 99, 1.0, rng)
        for found in (row, *suffixes):
            logits_TV = factory.target(input_ids=torch.from_numpy(found.token_ids_T)[None]).logits[0]
            said_NV = torch.log_softmax(logits_TV, -1)[found.column_N]
            wanted_NK = torch.from_numpy(found.positions.topk_logprobs_NK)
            at_kept_NK = said_NV.gather(-1, torch.from_numpy(found.positions.topk_token_ids_NK))
            torch.testing.assert_close(at_kept_NK, wanted_NK, atol=0.02, rtol=0.01)


def test_a_trajectory_row_holds_every_emitted_token_once(records: list[GenerationRecord]) -> None:
    for record in records:
        row = trajectory_row(record, 1000)
        assert row is not None
        assert row.positions.emitted_token_id_N.tolist() == record.output_token_ids.tolist()
        assert row.positions.accepted_N.sum() == sum(trace.num_accepted for trace in record.rounds)
        assert row.positions.attempted_N.sum() == sum(trace.num_attempted for trace in record.rounds)
        rejected = [t for t in record.rounds if t.num_attempted > t.num_accepted]
        assert row.positions.first_rejected_N.sum() == len(rejected)


def test_suffix_rows_hold_only_what_follows_the_drafts_own_mistakes(records: list[GenerationRecord]) -> None:
    rows = list(rejected_suffix_rows(records[0], 4, 2, 0.5, np.random.default_rng(0)))
    assert 1 <= len(rows) <= 2
    for row in rows:
        assert row.weight == 0.5
        assert row.num_tokens <= 4 + 3
        assert set(row.positions.emitted_token_id_N) == {NO_TOKEN}
    assert not list(rejected_suffix_rows(records[0], 4, 2, 0.0, np.random.default_rng(0)))


def test_a_record_has_the_same_logits_alone_and_padded_among_longer_ones(
    factory: RecordFactory, records: list[GenerationRecord]
) -> None:
    draft = tiny_draft()
    # token 0, which pads, also stands inside the text: masks must come from lengths
    short = factory.record([0, 3, 0, 0], RecordSampling(), 5)
    rows = [row for record in [short, *records] if (row := trajectory_row(record, 1000))]
    alone = draft.logits(collate(rows[:1]))
    together = draft.logits(collate(rows))
    torch.testing.assert_close(together[: len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_a_long_context_is_cut_from_the_left_and_positions_stay_aligned(factory: RecordFactory) -> None:
    record = factory.record(list(range(20)), RecordSampling(), 10)
    whole, cut = trajectory_row(record, 1000), trajectory_row(record, 16)
    assert whole is not None and cut is not None
    assert cut.num_tokens == 16
    tokens_before = cut.token_ids_T[cut.column_N].tolist()
    assert tokens_before == whole.token_ids_T[whole.column_N].tolist()[-len(tokens_before) :]
    assert cut.column_N.min() >= 4
    assert cut.first_position == whole.num_tokens - 16


def test_groups_respect_their_bounds_and_lose_no_row(records: list[GenerationRecord]) -> None:
    rows = [row for record in records if (row := trajectory_row(record, 1000))]
    groups = pack(rows, max_tokens=30, max_positions=25)
    assert sorted(id(row) for group in groups for row in group) == sorted(id(row) for row in rows)
    for group in groups:
        assert len(group) * max(row.num_tokens for row in group) <= 30
        assert sum(len(row.positions) for row in group) <= 25


def test_poisoned_positions_are_left_out(records: list[GenerationRecord]) -> None:
    first, *others = records[0].rounds
    poisoned = first.topk_logprobs_EK.copy()
    poisoned[0, 0] = np.nan
    record = replace(records[0], rounds=(replace(first, topk_logprobs_EK=poisoned), *others))
    row = trajectory_row(record, 1000)
    assert row is not None
    assert len(row.positions) == len(record.output_token_ids) - 1
    assert np.isfinite(row.positions.topk_logprobs_NK[:, 0]).all()


def test_records_of_another_target_or_vocabulary_are_refused_with_the_reason(
    records: list[GenerationRecord],
) -> None:
    record = records[0]
    assert record_fault(record, "target-1", VOCAB_SIZE) == ""
    assert "target_revision" in record_fault(record, "target-2", VOCAB_SIZE)
    assert "token ids" in record_fault(record, "target-1", 3)
    assert "no rounds" in record_fault(replace(record, rounds=()), "target-1", VOCAB_SIZE)


def test_rows_of_different_kept_width_share_a_batch(factory: RecordFactory) -> None:
    wide = RecordFactory(factory.target, factory.draft, num_kept=12).records(1)
    rows = [row for record in [*wide, *factory.records(1)] if (row := trajectory_row(record, 1000))]
    batch = collate(rows)
    assert batch.topk_token_ids_NK.shape[1] == 12
    assert bool((batch.topk_logprobs_NK[batch.topk_token_ids_NK == NO_TOKEN] == -torch.inf).all())


def test_a_round_that_copied_teaches_what_the_target_said_and_speaks_of_no_draft(
    records: list[GenerationRecord],
) -> None:
    drawn = records[0]
    traces = tuple(replace(trace, drafter_id=NGRAM_DRAFTER, draft_version=None) for trace in drawn.rounds)
    copied = replace(drawn, rounds=traces)
    assert list(rejected_suffix_rows(drawn, 64, 8, 1.0, np.random.default_rng(0))) != []
    assert list(rejected_suffix_rows(copied, 64, 8, 1.0, np.random.default_rng(0))) == []
    before, after = trajectory_row(drawn, 64), trajectory_row(copied, 64)
    assert before is not None and after is not None
    assert before.positions.attempted_N.any() and before.positions.first_rejected_N.any()
    for of_the_draft in ("attempted_N", "accepted_N", "first_rejected_N"):
        assert not getattr(after.positions, of_the_draft).any()
    assert (after.positions.emitted_token_id_N == before.positions.emitted_token_id_N).all()
    assert observed_acceptance([copied]) == (0, 0) != observed_acceptance([drawn])
