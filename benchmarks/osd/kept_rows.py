"""What a record keeps of the target's rows: the same recorded requests with more or fewer entries, and what
the estimator of acceptance makes of them against whole rows.

Legend: N recorded tokens of a request, K kept entries, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.osd.recorded_answers import RecordedAnswer
from benchmarks.osd.replay import Replay
from learner.batch import collate
from learner.draft import TrainableDraft
from learner.judging.acceptance import position_acceptance
from learner.rows import trajectory_row
from serving.models.loading import ModelPair


@torch.inference_mode()
def target_rows(pair: ModelPair, recorded: RecordedAnswer) -> Tensor:
    """[N, V]: the target's log-probabilities at temperature 1 along what it recorded."""
    model: Any = pair.target
    ids_T = np.concatenate([recorded.prompt_token_ids, recorded.token_ids_N[:-1]]).astype(np.int64)
    logits_TV: Tensor = model(torch.from_numpy(ids_T)[None]).logits[0]
    return torch.log_softmax(logits_TV[len(recorded.prompt_token_ids) - 1 :].float(), -1)


def with_kept(pair: ModelPair, recorded: RecordedAnswer, num_kept: int) -> RecordedAnswer:
    """The same request as a record of so many entries a position would have it."""
    top = target_rows(pair, recorded).topk(min(num_kept, pair.vocab_size), -1)
    return replace(
        recorded,
        topk_token_ids_NK=top.indices.to(torch.int32).numpy(),
        topk_logprobs_NK=top.values.half().numpy(),
    )


def bytes_per_token(num_kept: int) -> int:
    """Of a recorded position in a record: kept entries, the scalar that re-tempers, the emitted token's."""
    return 6 * num_kept + 8


@torch.inference_mode()
def acceptance_from(
    pair: ModelPair, draft: TrainableDraft, recorded: Sequence[RecordedAnswer], replay: Replay
) -> dict[str, float]:
    """Of the ratio test: by whole rows (the truth), and by the estimator from what the records keep; and of
    shared noise, by the estimator. Means over recorded positions."""
    sums = {"whole_rows": 0.0, "kept_rows": 0.0, "kept_rows_coupled": 0.0}
    num_positions = 0
    for one in recorded:
        record = replay.bare_record(one)
        own_NV = torch.log_softmax(_draft_logits(draft, record), -1)
        truth_NV = target_rows(pair, one)
        if one.seed is None:
            hits_N = own_NV.argmax(-1) == truth_NV.argmax(-1)
            sums["whole_rows"] += float(hits_N.sum())
        else:
            sums["whole_rows"] += float(torch.minimum(own_NV, truth_NV).exp().sum())
        for name, mode in (("kept_rows", "standard"), ("kept_rows_coupled", "coupled")):
            sampling = replace(record.sampling, mode=mode if one.seed is not None else "greedy")
            row = trajectory_row(replace(record, sampling=sampling), 1 << 20)
            assert row is not None
            batch = collate([row], draft.device)
            sums[name] += float(position_acceptance(batch, draft.logits(batch)).expected_N.sum())
        num_positions += one.num_tokens
    return {name: total / num_positions for name, total in sums.items()}


def _draft_logits(draft: TrainableDraft, record: Any) -> Tensor:
    row = trajectory_row(record, 1 << 20)
    assert row is not None
    return draft.logits(collate([row], draft.device))
