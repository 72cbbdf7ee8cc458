"""A round's last step: append what stood to every sequence, cut, count, and say what was added.

Tokens are cut at the first that ends the sequence (stop token, token limit) before any counter moves: a draft
position behind the cut was not attempted. Legend as in `round`.
"""

import torch
from torch import Tensor

from serving.engine.capture import RoundCapture
from serving.engine.proposal import Proposal
from serving.engine.request import TopLogprobs
from serving.engine.sequence import NO_ADVANCE, Advance, Batch, Sequence
from serving.engine.verification import Verification


def commit(
    batch: Batch,
    proposal: Proposal,
    verification: Verification,
    finite_B: Tensor,
    raw_logits_BEV: Tensor,
    logsumexp_BE: Tensor,
    capture: RoundCapture | None,
) -> list[Advance]:
    """Advance every sequence. A row whose target logits are not finite commits nothing: after drafts, which
    may have caused it, the next round goes without; without drafts the generation ends with an error."""
    accepted_B: list[int] = verification.num_accepted_B.tolist()
    emitted_BE = torch.cat([proposal.token_ids_BG, proposal.token_ids_BG.new_zeros((len(batch), 1))], dim=1)
    emitted_BE.scatter_(1, verification.num_accepted_B[:, None], verification.next_token_B[:, None])
    raw_BE = raw_logits_BEV.gather(-1, emitted_BE[..., None])[..., 0] - logsumexp_BE
    is_finite = finite_B.tolist()
    top_BE = _top_logprobs(batch, raw_logits_BEV, logsumexp_BE)
    emitted_rows, raw_rows = emitted_BE.tolist(), raw_BE.tolist()

    advances = []
    for row, sequence in enumerate(batch.sequences):
        if not is_finite[row]:
            if proposal.num_drafted_B[row] == 0:
                sequence.finish_reason = "error"
                sequence.error = "the target's logits are not finite; the generation was ended"
            sequence.drafts_next = False
            advances.append(NO_ADVANCE)
            continue
        sequence.drafts_next = True
        start = len(sequence.token_ids)
        kept = _append(sequence, emitted_rows[row][: accepted_B[row] + 1])
        advance = Advance(
            token_ids=tuple(emitted_rows[row][:kept]),
            logprobs=tuple(raw_rows[row][:kept]),
            top_logprobs=_asked_for(sequence, top_BE[row][:kept]) if top_BE else (),
            num_drafted=proposal.num_drafted_B[row],
            num_attempted=min(kept, accepted_B[row] + 1, proposal.num_drafted_B[row]),
            num_accepted=min(kept, accepted_B[row]),
            num_matched=proposal.num_matched(row),
        )
        sequence.count(advance, proposal.draft_version)
        if capture is not None and sequence.request.capture:
            sequence.captured_rounds.append(capture.of(row, start, advance))
        advances.append(advance)
    return advances


def _append(sequence: Sequence, emitted: list[int]) -> int:
    """Append tokens up to and including the first that ends the sequence. Returns how many."""
    kept = 0
    for token in emitted:
        sequence.token_ids.append(token)
        kept += 1
        if token in sequence.stop_ids:
            sequence.finish_reason, sequence.stop_token_id = "stop", token
            break
        if sequence.num_remaining <= 0:
            sequence.finish_reason = "length"
            break
    sequence.num_cached = len(sequence.token_ids) - 1
    return kept


def _top_logprobs(
    batch: Batch, raw_logits_BEV: Tensor, logsumexp_BE: Tensor
) -> list[list[TopLogprobs]] | None:
    """The most likely tokens at every position, as many as any row asked for; None if none did."""
    if not batch.any_logprobs:
        return None
    count = min(batch.max_top_logprobs, raw_logits_BEV.shape[-1])
    top = raw_logits_BEV.topk(count, dim=-1)
    logprobs_BEK = (top.values - logsumexp_BE[..., None]).tolist()
    return [
        [tuple(zip(ids, logprobs, strict=True)) for ids, logprobs in zip(*row, strict=True)]
        for row in zip(top.indices.tolist(), logprobs_BEK, strict=True)
    ]


def _asked_for(sequence: Sequence, top: list[TopLogprobs]) -> tuple[TopLogprobs, ...]:
    count = sequence.request.sampling.logprobs
    return () if count is None else tuple(entry[:count] for entry in top)
