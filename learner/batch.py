"""Packs rows into padded tensors, in groups that bound the size of one pass.

Knows no model and no loss. Invariant: masks come from lengths, never from token ids.
Legend: R rows, T columns, N positions flattened over rows in row order, K kept entries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.rows import Positions, TrainingRow
from serving.engine.sampling import SamplingRow


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Rows as tensors; see rows.py for what the fields of a position mean."""

    token_ids_RT: Tensor
    attention_mask_RT: Tensor
    position_ids_RT: Tensor
    row_N: Tensor
    column_N: Tensor
    """Column of the row at which the draft's logits for the position are."""
    topk_token_ids_NK: Tensor
    topk_logprobs_NK: Tensor
    retemper_N: Tensor
    emitted_token_id_N: Tensor
    emitted_logprob_N: Tensor
    first_rejected_N: Tensor
    weight_N: Tensor
    coupled_N: Tensor
    samplings: tuple[SamplingRow, ...]
    """One for each position."""

    @property
    def num_positions(self) -> int:
        return len(self.samplings)


def pack(rows: Iterable[TrainingRow], max_tokens: int, max_positions: int) -> list[list[TrainingRow]]:
    """Groups of rows of like length; padded tokens and positions of a group stay within the bounds
    unless a single row exceeds them."""
    groups: list[list[TrainingRow]] = []
    num_positions = 0
    for row in sorted(rows, key=lambda row: row.num_tokens):
        num_tokens = (len(groups[-1]) + 1) * row.num_tokens if groups else 0
        num_positions += len(row.positions)
        if groups and num_tokens <= max_tokens and num_positions <= max_positions:
            groups[-1].append(row)
        else:
            groups.append([row])
            num_positions = len(row.positions)
    return groups


def collate(rows: Sequence[TrainingRow], device: torch.device | str = "cpu") -> TrainingBatch:
    """Pad on the right; rows may hold different K."""
    assert rows, "a batch has at least one row"
    length_R = torch.tensor([row.num_tokens for row in rows])
    arange_T = torch.arange(int(length_R.max()))
    token_ids_RT = torch.zeros(len(rows), len(arange_T), dtype=torch.int64)
    for index, row in enumerate(rows):
        token_ids_RT[index, : row.num_tokens] = torch.from_numpy(row.token_ids_T)
    first_R = torch.tensor([row.first_position for row in rows])
    count_R = torch.tensor([len(row.positions) for row in rows])
    positions = Positions.join([row.positions for row in rows])
    tensors = {
        "token_ids_RT": token_ids_RT,
        "attention_mask_RT": (arange_T < length_R[:, None]).long(),
        "position_ids_RT": first_R[:, None] + arange_T,
        "row_N": torch.arange(len(rows)).repeat_interleave(count_R),
        "column_N": torch.from_numpy(np.concatenate([row.column_N for row in rows])),
        "topk_token_ids_NK": torch.from_numpy(positions.topk_token_ids_NK),
        "topk_logprobs_NK": torch.from_numpy(positions.topk_logprobs_NK),
        "retemper_N": torch.from_numpy(positions.retemper_N),
        "emitted_token_id_N": torch.from_numpy(positions.emitted_token_id_N),
        "emitted_logprob_N": torch.from_numpy(positions.emitted_logprob_N),
        "first_rejected_N": torch.from_numpy(positions.first_rejected_N),
        "weight_N": torch.tensor([row.weight for row in rows]).repeat_interleave(count_R),
        "coupled_N": torch.tensor([row.sampling.mode == "coupled" for row in rows]).repeat_interleave(
            count_R
        ),
    }
    samplings = tuple(sampling for row in rows for sampling in [_sampling_row(row)] * len(row.positions))
    return TrainingBatch(samplings=samplings, **{name: tensor.to(device) for name, tensor in tensors.items()})


def _sampling_row(row: TrainingRow) -> SamplingRow:
    sampling = row.sampling
    return (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
