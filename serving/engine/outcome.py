"""What a round came to, still on the device: everything that the host wants to know, fetched in one wait.

A row whose target logits are not finite accepts nothing. Legend as in `round`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.capture import capture_tensors
from serving.engine.proposal import Proposal
from serving.engine.sequence import Batch
from serving.engine.verification import Verification


@dataclass(frozen=True, eq=False)
class VerifiedRound:
    """A proposal, what the target says of it, and what stands."""

    proposal: Proposal
    num_usable_B: Tensor
    """Draft tokens before the first whose distribution was not finite."""
    verification: Verification
    raw_logits_BEV: Tensor
    logits_BEV: Tensor
    """After bias, penalties and held-back stops; else the raw ones."""
    logprobs_BEV: Tensor | None
    """The final distribution's; None when every row is greedy."""
    choice_BE: Tensor | None
    """The target's own choice on greedy and coupled rows; None where there is none."""


def outcome_tensors(batch: Batch, verified: VerifiedRound) -> dict[str, Tensor]:
    """All that `commit` and the recorder want to know, by name."""
    proposal, raw_logits_BEV = verified.proposal, verified.raw_logits_BEV
    logsumexp_BE = raw_logits_BEV.logsumexp(dim=-1)
    finite_B = _finite_rows(batch, verified, logsumexp_BE)
    num_accepted_B = verified.verification.num_accepted_B * finite_B
    next_token_B = verified.verification.next_token_B
    emitted_BE = torch.cat([proposal.token_ids_BG, proposal.token_ids_BG.new_zeros((len(batch), 1))], dim=1)
    emitted_BE.scatter_(1, num_accepted_B[:, None], next_token_B[:, None])
    outcome = {
        "num_drafted_B": verified.num_usable_B,
        "num_accepted_B": num_accepted_B,
        "emitted_BE": emitted_BE,
        "raw_BE": raw_logits_BEV.gather(-1, emitted_BE[..., None])[..., 0] - logsumexp_BE,
        "finite_B": finite_B,
        "token_logprobs_BG": proposal.token_logprobs_BG,
    }
    if batch.any_logprobs:
        top = raw_logits_BEV.topk(min(batch.max_top_logprobs, raw_logits_BEV.shape[-1]), dim=-1)
        outcome |= {"top_ids_BEK": top.indices, "top_BEK": top.values - logsumexp_BE[..., None]}
    if batch.any_capture:
        outcome |= capture_tensors(
            batch,
            proposal,
            raw_logits_BEV,
            logsumexp_BE,
            verified.logprobs_BEV,
            verified.choice_BE,
            num_accepted_B,
            next_token_B,
        )
    return outcome


def _finite_rows(batch: Batch, verified: VerifiedRound, logsumexp_BE: Tensor) -> Tensor:
    """Rows [B] with something to say at every position."""
    finite_B = torch.isfinite(logsumexp_BE).all(dim=-1)
    if batch.processing is not None:  # what is allowed may be what the target's own padding excludes
        finite_B &= torch.isfinite(verified.logits_BEV.amax(dim=-1)).all(dim=-1)
    return finite_B
