"""The outcome of a round, still on the device: everything that the host reads, fetched in one copy.

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
    """A proposal, the target's logits at its positions, and which draft tokens were accepted."""

    proposal: Proposal
    num_usable_B: Tensor
    """Draft tokens before the first whose distribution was not finite."""
    verification: Verification
    raw_logits_BEV: Tensor
    logits_BEV: Tensor
    """Logits after bias, penalties and held-back stops; the raw ones if no row has any."""
    logprobs_BEV: Tensor | None
    """Log-probabilities of the final distribution; None when every row is greedy."""
    choice_BE: Tensor | None
    """The target's own choice on greedy and coupled rows; None if there are no such rows."""


def outcome_tensors(batch: Batch, verified: VerifiedRound) -> dict[str, Tensor]:
    """All that `commit` and the recorder need, by name."""
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
    """Rows [B] with finite logits at every position and at least one token that may be drawn."""
    finite_B = torch.isfinite(logsumexp_BE).all(dim=-1)
    if batch.processing is not None:  # what is allowed may be what the target's own padding excludes
        finite_B &= torch.isfinite(verified.logits_BEV.amax(dim=-1)).all(dim=-1)
    return finite_B
