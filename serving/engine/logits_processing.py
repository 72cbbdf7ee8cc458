"""From raw logits to those of the final distribution: bias, penalties, held-back stop tokens, constraints.

What happens at output position i, in this order; each means what it means to OpenAI and vLLM:
1. `logit_bias` is added, -inf bans an id; with `allowed_token_ids` every other id is banned.
2. `repetition_penalty`, over ids in the prompt or output[:i]: divides positive logits, multiplies the others.
3. `frequency_penalty` times the id's count in output[:i] is subtracted; `presence_penalty` if it is there.
4. While i < `min_tokens` every stop id is banned.
5. Every id that the `constraint` does not allow after output[:i] is banned (`constrained_rows`).
6. Temperature, top-k, top-p, min-p: `sampling.processed_logprobs`.

Target and draft pass through the same `apply`. Invariant: what it does at a position depends on the tokens
before that position alone, committed or drafted in this round, so the distribution of a position is the same
however many tokens were drafted. Knows neither models nor rounds; reported log-probabilities are those of raw
logits. Legend: B rows of a batch, R those that ask for something, X positions, D drafted tokens before the
last of them, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.constrained_rows import ConstrainedRows
from serving.engine.request import ConstraintState, SamplingParams


@dataclass(frozen=True)
class RowContext:
    """The sampling parameters of a row of the batch, and its tokens so far (prompt and output)."""

    sampling: SamplingParams
    token_ids: Sequence[int]
    prompt_len: int
    stop_ids: frozenset[int]
    constraint: ConstraintState | None = None

    @property
    def num_held_back(self) -> int:
        """Number of coming output positions at which no stop token may be drawn."""
        return max(0, self.sampling.min_tokens - (len(self.token_ids) - self.prompt_len))


class LogitsProcessing:
    """The processing of one batch and the counts it needs, kept on the device from round to round."""

    def __init__(
        self,
        bias: "_Bias | None",
        penalties: "_Penalties | None",
        stops: "_HeldBackStops | None",
        constrained: ConstrainedRows | None,
    ) -> None:
        self._bias, self._penalties, self._stops = bias, penalties, stops
        self._constrained = constrained

    @classmethod
    def stack(
        cls, rows: Sequence[RowContext], vocab_size: int, device: torch.device | str = "cpu"
    ) -> "LogitsProcessing | None":
        """One row a sequence, in order. None if no row needs processing, so that it costs nothing."""
        bias = _Bias.stack(rows, vocab_size, device)
        penalties = _Penalties.stack(rows, vocab_size, device)
        stops = _HeldBackStops.stack(rows, vocab_size, device)
        constrained = ConstrainedRows.stack([row.constraint for row in rows], vocab_size, device)
        if bias is None and penalties is None and stops is None and constrained is None:
            return None
        return cls(bias, penalties, stops, constrained)

    def apply(self, logits_BXV: Tensor, drafted_BD: Tensor, first_position: int = 0) -> Tensor:
        """Processed logits of the output positions `first_position`, + 1, … of this round, in a copy (the
        logits themselves if no row needs processing from here on).

        `drafted_BD` holds the tokens drafted in this round from its position 0 on, at least all before the
        last of X. Position x sees the columns before it; columns past a row's drafts affect only positions
        that are not used, but must be token ids.
        """
        num_positions = logits_BXV.shape[1]
        assert drafted_BD.shape[1] >= first_position + num_positions - 1
        stops = self._stops if self._stops is not None and self._stops.reach(first_position) else None
        if self._bias is None and self._penalties is None and stops is None and self._constrained is None:
            return logits_BXV
        logits_BXV = logits_BXV.clone()
        if self._bias is not None:
            self._bias.apply_(logits_BXV)
        if self._penalties is not None:
            self._penalties.apply_(logits_BXV, drafted_BD, first_position)
        if stops is not None:
            stops.apply_(logits_BXV, first_position)
        if self._constrained is not None:
            self._constrained.apply_(logits_BXV, drafted_BD, first_position)
        return logits_BXV

    def commit(self, token_ids: Sequence[Sequence[int]]) -> None:
        """The tokens that each row of the batch has just emitted."""
        if self._penalties is not None:
            self._penalties.commit(token_ids)
        if self._stops is not None:
            self._stops.commit(token_ids)
        if self._constrained is not None:
            self._constrained.commit(token_ids)


def penalise(
    logits: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Tensor:
    """Steps 2 and 3 of the module's docstring, elementwise; `counts` in the output, `in_prompt` 0 or 1.

    Arithmetic instead of selection, which is ten times slower on a CPU; every operation rounds on its own, so
    the same numbers give the same bits in any shape.
    """
    in_output = counts.clamp(max=1.0)
    seen = torch.maximum(in_prompt, in_output)
    factor = repetition * seen + (1.0 - seen)
    repelled = logits.clamp(min=0.0).div_(factor).add_(logits.clamp(max=0.0).mul_(factor))
    return repelled.sub_(frequency * counts + presence * in_output)


class _Bias:
    """Step 1: the same at every position."""

    def __init__(self, rows_R: Tensor, bias_RV: Tensor) -> None:
        self._rows_R, self._bias_R1V = rows_R, bias_RV[:, None]

    @classmethod
    def stack(cls, rows: Sequence[RowContext], vocab_size: int, device: torch.device | str) -> "_Bias | None":
        asking = [index for index, row in enumerate(rows) if row.sampling.biases_logits]
        if not asking:
            return None
        bias_RV = torch.stack([_bias_of(rows[index].sampling, vocab_size) for index in asking])
        return cls(torch.tensor(asking, device=device), bias_RV.to(device))

    def apply_(self, logits_BXV: Tensor) -> None:
        logits_BXV[self._rows_R] += self._bias_R1V


def _bias_of(sampling: SamplingParams, vocab_size: int) -> Tensor:
    bias_V = torch.zeros(vocab_size)
    if sampling.allowed_token_ids is not None:
        bias_V.fill_(-torch.inf)[list(sampling.allowed_token_ids)] = 0.0
    if sampling.bias_pairs:
        ids, values = zip(*sampling.bias_pairs, strict=True)
        bias_V[list(ids)] += torch.tensor(values)
    return bias_V


class _Penalties:
    """Steps 2 and 3: counts of the committed tokens over the whole vocabulary, and what the drafted ones add
    at the few ids that they touch."""

    def __init__(
        self, asking: list[int], rows: list[RowContext], vocab_size: int, device: torch.device | str
    ) -> None:
        params = [row.sampling for row in rows]
        prompts = [row.token_ids[: row.prompt_len] for row in rows]
        outputs = [row.token_ids[row.prompt_len :] for row in rows]
        self._asking = asking
        self._rows_R = torch.tensor(asking, device=device)
        self._in_prompt_RV = _counts(prompts, vocab_size, device).clamp_(max=1.0)
        self._counts_RV = _counts(outputs, vocab_size, device)
        self._repetition_R11 = _column([param.repetition_penalty for param in params], device)
        self._frequency_R11 = _column([param.frequency_penalty for param in params], device)
        self._presence_R11 = _column([param.presence_penalty for param in params], device)

    @classmethod
    def stack(
        cls, rows: Sequence[RowContext], vocab_size: int, device: torch.device | str
    ) -> "_Penalties | None":
        asking = [index for index, row in enumerate(rows) if row.sampling.penalises]
        return cls(asking, [rows[index] for index in asking], vocab_size, device) if asking else None

    def apply_(self, logits_BXV: Tensor, drafted_BD: Tensor, first_position: int) -> None:
        logits_RXV = logits_BXV[self._rows_R]
        penalised_RXV = self._penalise(logits_RXV, self._counts_RV[:, None], self._in_prompt_RV[:, None])
        num_positions = logits_RXV.shape[1]
        num_before = first_position + num_positions - 1
        if num_before > 0:
            drafted_RD = drafted_BD[self._rows_R, :num_before]
            ids_RXD = drafted_RD[:, None].expand(-1, num_positions, -1)
            counts_RXD = self._counts_RV.gather(1, drafted_RD)[:, None] + _earlier_counts(
                drafted_RD, first_position, num_positions
            )
            in_prompt_R1D = self._in_prompt_RV.gather(1, drafted_RD)[:, None]
            redone_RXD = self._penalise(logits_RXV.gather(-1, ids_RXD), counts_RXD, in_prompt_R1D)
            penalised_RXV.scatter_(-1, ids_RXD, redone_RXD)
        logits_BXV[self._rows_R] = penalised_RXV

    def commit(self, token_ids: Sequence[Sequence[int]]) -> None:
        emitted = [token_ids[row] for row in self._asking]
        self._counts_RV += _counts(emitted, self._counts_RV.shape[1], self._counts_RV.device)

    def _penalise(self, logits: Tensor, counts: Tensor, in_prompt: Tensor) -> Tensor:
        return penalise(
            logits, counts, in_prompt, self._repetition_R11, self._frequency_R11, self._presence_R11
        )


def _earlier_counts(drafted_RD: Tensor, first_position: int, num_positions: int) -> Tensor:
    """[R, X, D]: how often the id of draft d occurs among the drafts before position x."""
    same_RDD = (drafted_RD[:, :, None] == drafted_RD[:, None, :]).to(torch.float32)
    drafts_D = torch.arange(drafted_RD.shape[1], device=drafted_RD.device)
    ends_X = first_position + torch.arange(num_positions, device=drafted_RD.device)
    before_XD = (drafts_D < ends_X[:, None]).to(torch.float32)
    return before_XD @ same_RDD


def _counts(token_ids: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str) -> Tensor:
    """[R, V]: how often each id occurs in each row; whole numbers in float32."""
    flat = [row * vocab_size + token for row, tokens in enumerate(token_ids) for token in tokens]
    counts_N = torch.zeros(len(token_ids) * vocab_size, device=device)
    index_N = torch.tensor(flat, dtype=torch.int64, device=device)
    counts_N.scatter_add_(0, index_N, torch.ones(len(flat), device=device))
    return counts_N.view(len(token_ids), vocab_size)


def _column(values: list[float], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


class _HeldBackStops:
    """Step 4, for the rows that have fewer than min_tokens output tokens."""

    def __init__(self, asking: list[int], left: list[int], stops_RV: Tensor) -> None:
        self._asking, self._left = asking, left
        self._rows_R = torch.tensor(asking, device=stops_RV.device)
        self._stops_R1V = stops_RV[:, None]

    @classmethod
    def stack(
        cls, rows: Sequence[RowContext], vocab_size: int, device: torch.device | str
    ) -> "_HeldBackStops | None":
        asking = [index for index, row in enumerate(rows) if row.num_held_back and row.stop_ids]
        if not asking:
            return None
        stops_RV = _counts([list(rows[index].stop_ids) for index in asking], vocab_size, device) > 0
        return cls(asking, [rows[index].num_held_back for index in asking], stops_RV)

    def reach(self, first_position: int) -> bool:
        """Whether a stop is held back anywhere from `first_position` of this round on."""
        return max(self._left) > first_position

    def apply_(self, logits_BXV: Tensor, first_position: int) -> None:
        device = logits_BXV.device
        positions_X = first_position + torch.arange(logits_BXV.shape[1], device=device)
        holds_RX1 = positions_X[None, :, None] < torch.tensor(self._left, device=device)[:, None, None]
        held_RXV = logits_BXV[self._rows_R].masked_fill_(holds_RX1 & self._stops_R1V, -torch.inf)
        logits_BXV[self._rows_R] = held_RXV

    def commit(self, token_ids: Sequence[Sequence[int]]) -> None:
        emitted = [len(token_ids[row]) for row in self._asking]
        self._left = [left - count for left, count in zip(self._left, emitted, strict=True)]


def check_processing(sampling: SamplingParams, stop_ids: frozenset[int], vocab_size: int) -> None:
    """Raises ValueError for ids outside the vocabulary, and where a position would have no token to draw."""
    named = {
        "logit_bias": [token for token, _ in sampling.bias_pairs],
        "allowed_token_ids": list(sampling.allowed_token_ids or ()),
    }
    for name, ids in named.items():
        outside = next((token for token in ids if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise ValueError(f"{name} holds token id {outside}, outside the vocabulary 0..{vocab_size - 1}")
    banned = frozenset(token for token, bias in sampling.bias_pairs if math.isinf(bias))
    if not _num_left(sampling, banned, vocab_size):
        name = "logit_bias" if sampling.allowed_token_ids is None else "allowed_token_ids"
        raise ValueError(f"{name} with the ids that a logit_bias of -inf bans leaves no token to draw")
    if sampling.min_tokens and not _num_left(sampling, banned | stop_ids, vocab_size):
        raise ValueError(
            f"min_tokens={sampling.min_tokens} with stop_token_ids that cover every token that may be drawn "
            "leaves no token to draw"
        )


def _num_left(sampling: SamplingParams, excluded: frozenset[int], vocab_size: int) -> int:
    """How many ids may be drawn; `excluded` lies within the vocabulary."""
    if sampling.allowed_token_ids is None:
        return vocab_size - len(excluded)
    return len(set(sampling.allowed_token_ids) - excluded)
