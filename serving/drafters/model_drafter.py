"""A small language model as drafter: it catches up with the context, then draws one token a pass.

Its cache may lag behind the sequence: `cached[slot]` tokens are in it, at most n - 1. Missing tokens are fed
at the next proposal: usually one or two, at first the whole prompt. A row too far behind catches up by one
chunk, alone, and drafts nothing in that round. After a swap the columns of the old weights remain valid (the
distribution drawn from is the distribution verified) and are recomputed one slot a round. Beginnings of
prompts that these weights have read before are copied from a prefix cache of the draft's own.
"""

from dataclasses import replace

import torch
from torch import Tensor

from buffer.names import MODEL_DRAFTER
from serving.drafters.stopping import LimitOnly, StoppingRule
from serving.engine.passes.prefix_cache import PrefixCache
from serving.engine.passes.runner import Runner
from serving.engine.passes.transfer import to_device
from serving.engine.proposal import Proposal
from serving.engine.sampling import draw, draw_uniforms, processed_logprobs
from serving.engine.sequence import Batch

_MAX_SHARED_LAG = 8
"""Rows missing no more tokens than this catch up together, in the first drafting pass: it is equally wide for
all rows."""
_MAX_CHUNKS = 2
"""Rows that may catch up by a chunk of their own in one round; others that lag wait, so that no round takes
much longer than those around it."""


class ModelDrafter:
    """Drafts with a causal language model that shares the target's vocabulary."""

    drafter_id = MODEL_DRAFTER

    def __init__(
        self,
        runner: Runner,
        *,
        draft_version: int = 0,
        chunk_tokens: int = 256,
        stopping: StoppingRule | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """`stopping` None: always drafts the number of tokens asked for. `prefix_cache`: over the runner's
        cache; None: every prompt is computed."""
        self.runner = runner
        self.prefix_cache = prefix_cache
        self._stopping = stopping or LimitOnly()
        self.draft_version = draft_version
        self._chunk_tokens = chunk_tokens
        self._cached = [0] * runner.num_slots
        self._lengths: list[int] = []
        self._stale: set[int] = set()
        self._chunks_left = 0

    def propose(
        self,
        batch: Batch,
        num_draft_tokens_B: list[int],
        noise_BEV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Proposal:
        """See `Drafter.propose`. Tokens drawn from logits that are not finite have log-probability NaN."""
        self._lengths = batch.lengths()
        self._refresh_one(len(batch))
        self._chunks_left = _MAX_CHUNKS
        wanted = [
            count if count and self._catch_up(batch, row) else 0
            for row, count in enumerate(num_draft_tokens_B)
        ]
        num_drafts = max(wanted)
        num_chunks = _MAX_CHUNKS - self._chunks_left
        if num_drafts == 0:
            nothing = Proposal.empty(len(batch), self.draft_version, batch.device)
            return replace(nothing, num_chunks=num_chunks)
        logits_BV, columns_BD = self._first_pass(batch, wanted)
        tokens: list[Tensor] = []
        draft_logprobs, token_logprobs = [], []
        for position in range(num_drafts):
            _cut(wanted, position, self._stopping.before_draw(logits_BV))
            if position >= max(wanted):
                break
            token_B, logprobs_BV, logprob_B = _draw_one(batch, logits_BV, tokens, noise_BEV, generator)
            tokens.append(token_B)
            token_logprobs.append(logprob_B)
            if logprobs_BV is not None:
                draft_logprobs.append(logprobs_BV)
            _cut(wanted, position + 1, self._stopping.after_draw(logits_BV))
            if position + 1 >= max(wanted):
                break
            logits_BV = self._next_pass(token_B, columns_BD, wanted, position)
        if not tokens:
            nothing = Proposal.empty(len(batch), self.draft_version, batch.device)
            return replace(nothing, num_chunks=num_chunks)
        return Proposal(
            draft_version=self.draft_version,
            token_ids_BG=torch.stack(tokens, dim=1),
            num_drafted_B=tuple(wanted),
            logprobs_BGV=torch.stack(draft_logprobs, dim=1) if draft_logprobs else None,
            token_logprobs_BG=torch.stack(token_logprobs, dim=1),
            num_chunks=num_chunks,
        )

    def observe(self, num_drafted_B: list[int], num_accepted_B: list[int]) -> None:
        """Of g draft tokens g - 1 were fed back; the columns of accepted ones remain valid."""
        for slot, (drafted, accepted) in enumerate(zip(num_drafted_B, num_accepted_B, strict=True)):
            if drafted > 0:
                self._cached[slot] = self._lengths[slot] + min(accepted, drafted - 1)

    def clear(self, slot: int) -> None:
        self._cached[slot] = 0
        self._stale.discard(slot)
        self.runner.cache.clear(slot)

    def move(self, source: int, destination: int) -> None:
        self.runner.cache.move(source, destination, self._cached[source])
        self._cached[destination] = self._cached[source]
        self._stale.discard(destination)
        if source in self._stale:
            self._stale.add(destination)

    def reset(self) -> None:
        self._cached = [0] * self.runner.num_slots
        self._stale.clear()
        self.runner.cache.clear_all()
        if self.prefix_cache is not None:
            self.prefix_cache.clear()

    def refresh(self, draft_version: int) -> None:
        self.draft_version = draft_version
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        self._stale = {slot for slot, cached in enumerate(self._cached) if cached}

    def _refresh_one(self, num_rows: int) -> None:
        """Recompute one slot that old weights filled, if a single chunk is enough."""
        self._stale = {slot for slot in self._stale if slot < num_rows}
        short = (slot for slot in self._stale if self._cached[slot] <= self._chunk_tokens)
        if (slot := next(short, None)) is not None:
            self._stale.discard(slot)
            self._cached[slot] = 0
            self.runner.cache.clear(slot)

    def _catch_up(self, batch: Batch, row: int) -> bool:
        """Feed a row that lags far behind at most one chunk. Returns whether it can draft in this round."""
        target_len = self._lengths[row] - 1
        token_ids, salt = batch.sequences[row].token_ids, batch.sequences[row].request.cache_salt
        if self.prefix_cache is not None and self._cached[row] == 0:
            self._cached[row] = self.prefix_cache.load(row, token_ids[:target_len], salt)
        if target_len - self._cached[row] < _MAX_SHARED_LAG:
            return True
        if self._chunks_left == 0:
            return False
        self._chunks_left -= 1
        start = self._cached[row]
        end = min(target_len, start + self._chunk_tokens)
        self.runner.prefill(row, token_ids[start:end], start)
        self._cached[row] = end
        if self.prefix_cache is not None and row not in self._stale:
            self.prefix_cache.store(row, token_ids[:end], salt=salt)
        return end == target_len

    def _first_pass(self, batch: Batch, wanted: list[int]) -> tuple[Tensor, Tensor]:
        """Feed every drafting row its missing tokens. Returns logits [B, V] after its last token, which is
        the last column in every row (the vocabulary is most of a small draft's work), and the columns [B, D]
        to which the draft tokens will be fed back, sent to the device in the same copy."""
        trash = self.runner.cache.trash_column
        starts = [self._cached[row] if count else self._lengths[row] for row, count in enumerate(wanted)]
        lags = [length - start for length, start in zip(self._lengths, starts, strict=True)]
        width, num_fed_back = max(lags), max(wanted) - 1
        rows = []
        for sequence, start, lag, count in zip(batch.sequences, starts, lags, wanted, strict=True):
            padding, end = width - lag, start + lag
            tokens = [0] * padding + sequence.token_ids[start:end]
            positions = [*[trash] * padding, *range(start, end)]
            columns = [end + fed if count > fed + 1 else trash for fed in range(num_fed_back)]
            rows.append([*tokens, *positions, *columns])
        sent = to_device(rows, self.runner.device)
        token_ids_BT, positions_BT, columns_BD = sent.split([width, width, num_fed_back], dim=1)
        logits_B1V = self.runner.forward(
            token_ids_BT,
            positions_BT,
            kv_len=max(length for length, lag in zip(self._lengths, lags, strict=True) if lag),
            logits_to_keep=1,
        )
        for row, count in enumerate(wanted):
            if count:
                self._cached[row] = self._lengths[row]
        return logits_B1V[:, 0], columns_BD

    def _next_pass(self, token_B: Tensor, columns_BD: Tensor, wanted: list[int], position: int) -> Tensor:
        """Feed the draft token at `position` back; logits [B, V] for the next."""
        drafting = (
            length for length, count in zip(self._lengths, wanted, strict=True) if count > position + 1
        )
        return self.runner.forward(
            token_B[:, None], columns_BD[:, position : position + 1], kv_len=max(drafting) + position + 1
        )[:, 0]


def _cut(wanted: list[int], length: int, stops: list[bool] | None) -> None:
    """Rows that stop draft no more than `length` tokens."""
    if stops is not None:
        for row, stop in enumerate(stops):
            if stop:
                wanted[row] = min(wanted[row], length)


def _draw_one(
    batch: Batch,
    raw_logits_BV: Tensor,
    drafted: list[Tensor],
    noise_BEV: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens [B], the log-probabilities [B, V] they were drawn from (None: greedy), and the log-probabilities
    of the drawn tokens [B]: NaN where the draft is broken, -inf where it has no token that the request
    allows.

    `drafted`: the tokens [B] drawn before, in this round."""
    position = len(drafted)
    logits_BV = raw_logits_BV
    if batch.processing is not None:
        drafted_BD = torch.stack(drafted, dim=1) if drafted else logits_BV.new_zeros((len(batch), 0)).long()
        logits_BV = batch.processing.apply(logits_BV[:, None], drafted_BD, position)[:, 0]
    if batch.sampling.all_greedy:
        best = logits_BV.max(dim=-1)
        logprob_B = best.values - best.values  # 0, or NaN where the logit is not finite
        return best.indices, None, _none_allowed(batch, raw_logits_BV, best.values, logprob_B)

    best_B = logits_BV.amax(-1)
    logprobs_BV = processed_logprobs(logits_BV[:, None], batch.sampling)[:, 0]
    logprobs_BV = torch.where(torch.isfinite(best_B)[:, None], logprobs_BV, torch.nan)
    if batch.any_standard:
        token_B = draw(logprobs_BV.exp(), draw_uniforms(logprobs_BV, generator))
    else:
        token_B = logprobs_BV.argmax(dim=-1)
    if noise_BEV is not None:
        coupled_B = (logprobs_BV + noise_BEV[:, position]).argmax(dim=-1)
        token_B = torch.where(batch.coupled_B, coupled_B, token_B)
    logprob_B = logprobs_BV.gather(-1, token_B[:, None])[:, 0]
    return token_B, logprobs_BV, _none_allowed(batch, raw_logits_BV, best_B, logprob_B)


def _none_allowed(batch: Batch, raw_logits_BV: Tensor, best_B: Tensor, logprob_B: Tensor) -> Tensor:
    """Sets -inf in rows whose draft is finite but has no token that the request allows."""
    if batch.processing is None:
        return logprob_B
    sound_B = torch.isfinite(raw_logits_BV.amax(dim=-1))
    return logprob_B.masked_fill(sound_B & (best_B == -torch.inf), -torch.inf)
