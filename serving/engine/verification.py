"""Which draft tokens are accepted, and which token follows. Pure functions; randomness is an argument.

Two lossless acceptance rules. `match_choice`: the target's own choice at every position is known (its argmax,
with shared Gumbel noise in coupled mode); a draft token is accepted iff it is that choice. `ratio_test`:
speculative sampling (arXiv 2211.17192); accept with probability min(1, target / draft), after a rejection
draw from the normalised positive part of target - draft. With a one-hot draft distribution this becomes:
accept with the target's probability, else draw from the target without that token; exact for any proposal,
even a random one. Coupled rows never use the ratio test. Legend: B rows, G drafted, E = G + 1 verified
positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.sampling import draw


@dataclass(frozen=True)
class Verification:
    """Which draft tokens of a proposal were accepted, and the token after them."""

    num_accepted_B: Tensor
    next_token_B: Tensor
    """The recovered token after a rejection, else the bonus token."""


def match_choice(choice_BE: Tensor, drafted_BG: Tensor, num_drafted_B: Tensor) -> Verification:
    """Accept draft tokens before the first that differs from the target's choice; then comes that choice."""
    num_accepted_B = leading(choice_BE[:, :-1] == drafted_BG, num_drafted_B)
    return Verification(num_accepted_B, choice_BE.gather(1, num_accepted_B[:, None])[:, 0])


def ratio_test(
    target_logprobs_BEV: Tensor,
    draft_logprobs_BGV: Tensor | None,
    drafted_BG: Tensor,
    num_drafted_B: Tensor,
    uniform_BG: Tensor,
    uniform_B: Tensor,
) -> Verification:
    """Accept while `uniform * draft < target` at the drafted token; see the module's docstring.

    `draft_logprobs_BGV` must be the distribution each token was drawn from, None for one-hot distributions;
    `uniform_BG` and `uniform_B` (for the next token) on [0, 1). A residual that is numerically zero falls
    back to the target's distribution.
    """
    num_drafts = drafted_BG.shape[1]
    picked_BG1 = drafted_BG[..., None]
    target_BG = target_logprobs_BEV[:, :num_drafts].gather(-1, picked_BG1)[..., 0].exp()
    if draft_logprobs_BGV is not None:
        uniform_BG = uniform_BG * draft_logprobs_BGV.gather(-1, picked_BG1)[..., 0].exp()
    num_accepted_B = leading(uniform_BG < target_BG, num_drafted_B)

    rows_B = torch.arange(drafted_BG.shape[0], device=drafted_BG.device)
    probs_BV = target_logprobs_BEV[rows_B, num_accepted_B].exp()
    if num_drafts > 0:
        rejected_at_B = num_accepted_B.clamp(max=num_drafts - 1)
        if draft_logprobs_BGV is None:
            residual_BV = probs_BV.scatter(1, drafted_BG[rows_B, rejected_at_B][:, None], 0.0)
        else:
            draft_probs_BV = draft_logprobs_BGV[rows_B, rejected_at_B].exp()
            residual_BV = (probs_BV - draft_probs_BV).clamp_(min=0.0)
        use_residual_B = (num_accepted_B < num_drafted_B) & (residual_BV.sum(-1) > 0)
        probs_BV = torch.where(use_residual_B[:, None], residual_BV, probs_BV)
    return Verification(num_accepted_B, draw(probs_BV, uniform_B))


def merge(ratio_rows_B: Tensor, ratio: Verification, choice: Verification) -> Verification:
    """Combine both results of a mixed batch: `ratio` in the rows of `ratio_rows_B`, else `choice`."""
    return Verification(
        torch.where(ratio_rows_B, ratio.num_accepted_B, choice.num_accepted_B),
        torch.where(ratio_rows_B, ratio.next_token_B, choice.next_token_B),
    )


def leading(accepted_BG: Tensor, num_drafted_B: Tensor) -> Tensor:
    """Length of each row's run of True from the left, within its drafted tokens."""
    positions_G = torch.arange(accepted_BG.shape[1], device=accepted_BG.device)
    kept_BG = accepted_BG & (positions_G < num_drafted_B[:, None])
    return kept_BG.to(torch.int64).cumprod(dim=1).sum(dim=1)
