"""One round of draft and verify, in reading order. Read this first.

A round proposes up to G tokens for every sequence of the batch, runs the target once over the last committed
token and the proposal, accepts draft tokens by the acceptance rule, and commits one more token: the recovered
or the bonus one. A draft length of 0 is allowed and means plain decoding. Results are by row; the engine
turns them into events. Legend: B rows (row = slot), G drafted, E = G + 1, V vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from buffer.names import NGRAM_DRAFTER
from serving.engine.commit import commit
from serving.engine.noise import gumbel_noise
from serving.engine.outcome import VerifiedRound, outcome_tensors
from serving.engine.passes.runner import Runner
from serving.engine.passes.transfer import HostArrays, RoundClock, to_device, to_host
from serving.engine.proposal import DraftAssignment, DraftPlan, Proposal, ServingDraft, combine
from serving.engine.sampling import draw_uniforms, processed_logprobs
from serving.engine.sequence import Advance, Batch
from serving.engine.verification import Verification, leading, match_choice, merge, ratio_test

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundReport:
    """What the round did, and the seconds that it took."""

    drafts_B: tuple[ServingDraft, ...]
    """The draft that is loaded for each row; its drafts are counted under that version."""
    num_draft_tokens: int
    draft_passes: tuple[int, ...]
    """Forward passes of each model that drafted, one for each draft token; copying makes none."""
    advances: list[Advance]
    propose_s: float
    """Seconds of drafting, including catching up with the context."""
    num_chunks: int
    """Draft passes that only caught up with the context."""
    target_pass_s: float
    broken_drafts: frozenset[ServingDraft]
    """Drafts that raised, or drew from a distribution that is NaN."""


@torch.inference_mode()
def run_round(
    batch: Batch,
    plan: DraftPlan,
    target: Runner,
    generator: torch.Generator | None = None,
) -> RoundReport:
    """Advance every sequence of the batch by one to G + 1 tokens."""
    clock = RoundClock(batch.device)
    clock.mark()
    noise_BEV = _coupled_noise(batch, plan.max_draft_tokens + 1, target)
    proposals = [_propose(batch, assignment, noise_BEV, generator) for assignment in plan.assignments]
    no_drafts = Proposal.empty(len(batch), plan.drafts_B[0].draft_version, batch.device)
    proposal = combine(proposals) if proposals else no_drafts
    clock.mark()
    raw_logits_BEV, num_drafted_B = _target_pass(batch, proposal, target)
    clock.mark()

    # A draft token whose distribution was not finite, and all after it, count as not drafted.
    num_usable_B = leading(torch.isfinite(proposal.token_logprobs_BG), num_drafted_B)
    logits_BEV = raw_logits_BEV
    if batch.processing is not None:
        logits_BEV = batch.processing.apply(raw_logits_BEV, proposal.token_ids_BG)
    logprobs_BEV, choice_BE = _target_choice(batch, logits_BEV, noise_BEV)
    verification = _verify(batch, proposal, num_usable_B, logprobs_BEV, choice_BE, generator)
    verified = VerifiedRound(
        proposal, num_usable_B, verification, raw_logits_BEV, logits_BEV, logprobs_BEV, choice_BE
    )
    host = to_host(outcome_tensors(batch, verified))

    _observe(plan.assignments, proposals, host)
    advances = commit(batch, proposal, plan.drafts_B, host)
    propose_s, target_pass_s = clock.seconds()
    return RoundReport(
        drafts_B=plan.drafts_B,
        num_draft_tokens=proposal.max_drafted,
        draft_passes=tuple(
            part.max_drafted for part in proposals if part.max_drafted and not part.num_matched_B
        ),
        advances=advances,
        propose_s=propose_s,
        num_chunks=proposal.num_chunks,
        target_pass_s=target_pass_s,
        broken_drafts=_broken_drafts(plan, proposals, proposal, host),
    )


def _coupled_noise(batch: Batch, num_positions: int, target: Runner) -> Tensor | None:
    """Shared noise of the coming output positions; zero on rows that are not coupled."""
    if not batch.any_coupled:
        return None
    noise_BEV = gumbel_noise(batch.noise_keys_B, batch.output_positions_BX(num_positions), target.vocab_size)
    return noise_BEV.masked_fill_(~batch.coupled_B[:, None, None], 0.0)


def _propose(
    batch: Batch, assignment: DraftAssignment, noise_BEV: Tensor | None, generator: torch.Generator | None
) -> Proposal:
    drafter = assignment.drafter
    if max(assignment.num_draft_tokens_B) == 0:
        return Proposal.empty(len(batch), drafter.draft_version, batch.device)
    try:
        return drafter.propose(batch, assignment.num_draft_tokens_B, noise_BEV, generator)
    except Exception:  # a failing draft must not fail the answer
        _log.exception("drafting failed; this round is decoded without its drafts")
        proposal = Proposal.empty(len(batch), drafter.draft_version, batch.device)
        num_broken = 0 if drafter.drafter_id == NGRAM_DRAFTER else len(batch)
        return replace(proposal, num_broken_rows=num_broken)


def _observe(assignments: Sequence[DraftAssignment], parts: Sequence[Proposal], host: HostArrays) -> None:
    """Tell each drafter how many of its own draft tokens were usable and accepted."""
    usable_B, accepted_B = host["num_drafted_B"].tolist(), host["num_accepted_B"].tolist()
    for assignment, part in zip(assignments, parts, strict=True):
        drafted_B = [min(own, usable) for own, usable in zip(part.num_drafted_B, usable_B, strict=True)]
        assignment.drafter.observe(drafted_B, accepted_B)


def _target_pass(batch: Batch, proposal: Proposal, target: Runner) -> tuple[Tensor, Tensor]:
    """Raw logits [B, E, V], whose position e decides the token that follows the last committed one and e
    drafts; and the number of draft tokens of each row, [B]."""
    lengths = batch.lengths()
    num_verified = proposal.max_drafted + 1
    trash = target.cache.trash_column
    sent = to_device(
        [
            [
                sequence.token_ids[-1],
                *[length - 1 + e if e <= num_drafted else trash for e in range(num_verified)],
                num_drafted,
            ]
            for sequence, length, num_drafted in zip(
                batch.sequences, lengths, proposal.num_drafted_B, strict=True
            )
        ],
        batch.device,
    )
    last_B1, positions_BE, num_drafted_B1 = sent.split([1, num_verified, 1], dim=1)
    token_ids_BE = torch.cat([last_B1, proposal.token_ids_BG], dim=1)
    kv_len = max(n + g for n, g in zip(lengths, proposal.num_drafted_B, strict=True))
    return target.forward(token_ids_BE, positions_BE, kv_len=kv_len), num_drafted_B1[:, 0]


def _target_choice(
    batch: Batch, logits_BEV: Tensor, noise_BEV: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Log-probabilities of the target's final distribution, and its own choice on greedy and coupled rows."""
    if batch.sampling.all_greedy:
        return None, logits_BEV.argmax(dim=-1)
    logprobs_BEV = processed_logprobs(logits_BEV, batch.sampling)
    if not batch.any_coupled and not batch.sampling.any_greedy:
        return logprobs_BEV, None
    if noise_BEV is None:
        return logprobs_BEV, logprobs_BEV.argmax(dim=-1)
    return logprobs_BEV, (logprobs_BEV + noise_BEV[:, : logprobs_BEV.shape[1]]).argmax(dim=-1)


def _verify(
    batch: Batch,
    proposal: Proposal,
    num_drafted_B: Tensor,
    logprobs_BEV: Tensor | None,
    choice_BE: Tensor | None,
    generator: torch.Generator | None,
) -> Verification:
    """Verify each row by its rule: match the target's choice (greedy, coupled), or the ratio test."""
    choice = ratio = None
    if choice_BE is not None:
        choice = match_choice(choice_BE, proposal.token_ids_BG, num_drafted_B)
    if batch.any_standard:
        assert logprobs_BEV is not None
        uniform_BG = torch.rand(proposal.token_ids_BG.shape, generator=generator, device=batch.device)
        uniform_B = draw_uniforms(logprobs_BEV[:, 0], generator)
        ratio = ratio_test(
            logprobs_BEV, proposal.logprobs_BGV, proposal.token_ids_BG, num_drafted_B, uniform_BG, uniform_B
        )
    if choice is not None and ratio is not None:
        return merge(batch.standard_B, ratio, choice)
    verification = choice if choice is not None else ratio
    assert verification is not None
    return verification


def _broken_drafts(
    plan: DraftPlan, parts: Sequence[Proposal], proposal: Proposal, host: HostArrays
) -> frozenset[ServingDraft]:
    """The drafts that broke in this round, in at least one row."""
    broken = set[ServingDraft]()
    for assignment, part in zip(plan.assignments, parts, strict=True):
        if part.num_broken_rows:
            requested = zip(plan.drafts_B, assignment.num_draft_tokens_B, strict=True)
            broken.update(draft for draft, count in requested if count)
    counts = zip(host["num_drafted_B"].tolist(), proposal.num_drafted_B, strict=True)
    for row, (usable, num_drafted) in enumerate(counts):
        if usable < num_drafted and np.isnan(host["token_logprobs_BG"][row, usable]):
            broken.add(plan.drafts_B[row])
    return frozenset(broken)
