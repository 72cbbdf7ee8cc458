"""The paper's own setting, by settings alone: what its learner looks at, how often, and with what step."""

import math
from pathlib import Path

import pytest
import torch

from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.records import GenerationRecord, RecordSampling
from buffer.store import StreamKey
from learner.distill import Objective, weighted_loss
from learner.draft import TrainableDraft, build_draft
from learner.loop import Learner
from learner.settings import LearnerSettings, paper_setting
from learner.trainer import Trainer
from tests.support.record_factory import RecordFactory
from tests.support.tiny_learner import tiny_pair

NOW_S = 2_000.0
KEY = StreamKey("target-1", "default")


class StoreWithoutReplay(MemoryRecordStore):
    """Refuses to give a record twice; a learner's start, which refills the held-out window, is over."""

    started = False

    def draw_replay(self, key: StreamKey, num_records: int, seed: int) -> list[GenerationRecord]:
        assert not self.started, "the paper's buffer is emptied at each update"
        return super().draw_replay(key, num_records, seed)


@pytest.fixture(scope="module")
def records() -> list[GenerationRecord]:
    factory = RecordFactory(*tiny_pair(), clock_s=NOW_S)
    return factory.records(40, RecordSampling(temperature=1.0), max_tokens=6)


def full_draft(settings: LearnerSettings) -> TrainableDraft:
    return build_draft(tiny_pair()[1], settings, draft_id="tiny", draft_revision="draft-1")


def test_one_step_on_the_whole_draft_every_eight_requests_and_none_seen_again(
    tmp_path: Path, records: list[GenerationRecord]
) -> None:
    settings = paper_setting().model_copy(update={"checkpoint_folder": str(tmp_path)})
    draft, store = full_draft(settings), StoreWithoutReplay(clock=lambda: NOW_S)
    feed = MemoryAdapterFeed(clock=lambda: NOW_S)
    learner = Learner(draft, store, feed, settings, target_revision="target-1", now_s=lambda: NOW_S)
    store.append(KEY, records[:7])
    assert not learner.run_cycle()
    store.started = True
    store.append(KEY, records[7:])
    cycles = 0
    while learner.run_cycle():
        cycles += 1
        assert learner.snapshot()["num_steps"] == cycles
        assert learner.snapshot()["num_records_seen"] == 8 * cycles
    assert cycles == 5
    assert learner.snapshot()["num_parameters"] == sum(w.numel() for w in tiny_pair()[1].parameters())


def test_the_loss_is_forward_kl_at_first_rejections_read_one_column_before_the_token(
    records: list[GenerationRecord],
) -> None:
    """Against a loss written out by hand, from the records alone and full passes."""
    settings = paper_setting()
    draft = full_draft(settings)
    (batch,) = Trainer(draft, settings).batches(records[:8])
    objective = Objective(divergence=settings.divergence, greedy_temperature=settings.greedy_temperature)
    found = weighted_loss(batch, draft.logits(batch), objective)
    expected, num_rejections = torch.tensor(0.0), 0
    for record in records[:8]:
        tokens = [*record.prompt_token_ids.tolist(), *record.output_token_ids.tolist()]
        draft_TV = torch.log_softmax(tiny_pair()[1](input_ids=torch.tensor([tokens])).logits[0].float(), -1)
        for trace in record.rounds:
            if trace.num_attempted == trace.num_accepted:
                continue
            position = trace.start + trace.num_accepted
            kept = torch.from_numpy(trace.topk_logprobs_EK[trace.num_accepted].astype("float32"))
            ids = torch.from_numpy(trace.topk_token_ids_EK[trace.num_accepted].astype("int64"))
            target_P, draft_P = with_tail(kept.exp()), with_tail(draft_TV[position - 1][ids].exp())
            expected += (target_P * (target_P.log() - draft_P.log())).sum()
            num_rejections += 1
    assert num_rejections == int(batch.first_rejected_N.sum()) > 0
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)


def with_tail(kept_probs_K: torch.Tensor) -> torch.Tensor:
    """Everything else as one more cell."""
    return torch.cat([kept_probs_K, (1 - kept_probs_K.sum()).clamp(min=1e-6)[None]])


def test_its_steps_are_adamws_own_at_a_constant_rate_without_clipping(
    records: list[GenerationRecord],
) -> None:
    """Written out beside: the same gradients through PyTorch's AdamW end in the same weights."""
    settings = paper_setting(learning_rate=1e-3)
    ours = Trainer(full_draft(settings), settings)
    by_hand = full_draft(settings)
    optimizer = torch.optim.AdamW(by_hand.parameters.values(), lr=1e-3, weight_decay=0.0)
    norms = []
    for first in range(0, 24, 8):
        batches = Trainer(by_hand, settings).batches(records[first : first + 8])
        norms.append(ours.step(records[first : first + 8]).grad_norm)
        assert ours._optimizer.param_groups[0]["lr"] == 1e-3
        optimizer.zero_grad()
        count = sum(float(batch.first_rejected_N.sum()) for batch in batches)
        objective = Objective(divergence="osd", greedy_temperature=1.0)
        for batch in batches:
            (weighted_loss(batch, by_hand.logits(batch), objective) / count).backward()
        optimizer.step()
    assert max(norms) > 1.0, "nothing would have been clipped, so nothing was shown"
    for name, weight in by_hand.state().items():
        torch.testing.assert_close(ours.draft.state()[name], weight, rtol=1e-4, atol=1e-6)


def test_no_clipping_is_a_number_that_a_settings_file_can_hold() -> None:
    settings = paper_setting()
    assert math.isinf(settings.max_grad_norm)
    assert LearnerSettings.model_validate(settings.model_dump()) == settings
