"""A round's last step: append accepted and next tokens, cut at the end, count, and report what was added.

Tokens are cut after the first that ends the sequence (stop token, token limit) before any counter changes: a
draft position behind the cut was not attempted. Legend as in `round`.
"""

from serving.engine.capture import RoundCapture
from serving.engine.passes.transfer import HostArrays
from serving.engine.proposal import Proposal, ServingDraft
from serving.engine.request import TopLogprobs
from serving.engine.sequence import NO_ADVANCE, Advance, Batch, Sequence


def commit(
    batch: Batch,
    proposal: Proposal,
    drafts_B: tuple[ServingDraft, ...],
    outcome: HostArrays,
) -> list[Advance]:
    """Advance every sequence by what `outcome_tensors` holds. A row whose target logits are not finite
    commits nothing: if it had drafts, which may be the cause, its next round has none; without drafts the
    generation ends with an error."""
    accepted_B: list[int] = outcome["num_accepted_B"].tolist()
    drafted_B: list[int] = outcome["num_drafted_B"].tolist()
    is_finite: list[bool] = outcome["finite_B"].tolist()
    emitted_rows, raw_rows = outcome["emitted_BE"].tolist(), outcome["raw_BE"].tolist()
    top_BE = _top_logprobs(outcome)
    capture = RoundCapture.read(drafts_B, outcome) if batch.any_capture else None

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
            num_drafted=drafted_B[row],
            num_attempted=min(kept, accepted_B[row] + 1, drafted_B[row]),
            num_accepted=min(kept, accepted_B[row]),
            num_matched=proposal.num_matched(row),
        )
        sequence.count(advance, drafts_B[row].draft_version)
        if capture is not None and sequence.request.capture:
            sequence.captured_rounds.append(capture.of(row, start, advance))
        advances.append(advance)
    if batch.processing is not None:
        batch.processing.commit([advance.token_ids for advance in advances])
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


def _top_logprobs(outcome: HostArrays) -> list[list[TopLogprobs]] | None:
    """The most likely tokens at every position, as many as any row asked for; None if none did."""
    if "top_ids_BEK" not in outcome:
        return None
    return [
        [tuple(zip(ids, logprobs, strict=True)) for ids, logprobs in zip(*row, strict=True)]
        for row in zip(outcome["top_ids_BEK"].tolist(), outcome["top_BEK"].tolist(), strict=True)
    ]


def _asked_for(sequence: Sequence, top: list[TopLogprobs]) -> tuple[TopLogprobs, ...]:
    count = sequence.request.sampling.logprobs
    return () if count is None else tuple(entry[:count] for entry in top)
