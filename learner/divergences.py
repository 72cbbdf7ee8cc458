"""How far a draft's distribution is from the target's, per position, on a K+1-way partition.

The partition is the K kept tokens plus everything else (the tail) as one cell; all arithmetic is in
log space and float32. Knows no records and no models. Merging the tail can only shrink an
f-divergence, so every value is a lower bound of the one over the full vocabulary. Training only:
acceptance is never read from these (see acceptance.py).

Legend: N positions, K kept tokens, P = K + 1 cells of the partition, the tail last.
Sources: DistillSpec 2310.08461, OSD 2310.07177 (re-weighted, see `tv_weighted_kl`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(target_NP, draft_NP), log-probabilities, to a value a position [N], natural units."""

MIN_TAIL_MASS = 1e-6
"""Float32 computes 1 - mass no more precisely than this; a smaller tail is rounded up to it."""

NOTHING = -100.0
"""A log-probability whose probability is 0 in float32 sums."""


def partition(kept_logprobs_NK: Tensor) -> Tensor:
    """Kept log-probabilities [N, K] (-inf allowed) to a normalised log-partition [N, K+1]."""
    log_mass_N1 = torch.logsumexp(kept_logprobs_NK, -1, keepdim=True)
    capped_N1 = log_mass_N1.clamp(max=math.log1p(-MIN_TAIL_MASS))
    tail_N1 = torch.log(-torch.expm1(capped_N1))
    cells_NP = torch.cat([kept_logprobs_NK, tail_N1], -1)
    return cells_NP - torch.logsumexp(cells_NP, -1, keepdim=True)


def _kl(first_NP: Tensor, second_NP: Tensor) -> Tensor:
    """KL(first || second); cells that the first excludes count nothing, in value and gradient."""
    live_NP = first_NP > -torch.inf
    gap_NP = torch.where(live_NP, first_NP, 0.0) - torch.where(live_NP, second_NP, 0.0)
    return (first_NP.exp() * gap_NP).sum(-1)


def forward_kl(target_NP: Tensor, draft_NP: Tensor) -> Tensor:
    """KL(target || draft): makes the draft cover all tokens that the target considers likely."""
    return _kl(target_NP, draft_NP)


def reverse_kl(target_NP: Tensor, draft_NP: Tensor) -> Tensor:
    """KL(draft || target): makes the draft avoid tokens that the target considers unlikely. Cells the target
    excludes are floored."""
    floor = math.log(MIN_TAIL_MASS)
    return _kl(draft_NP, target_NP.clamp(min=floor))


def jensen_shannon(target_NP: Tensor, draft_NP: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(target || m) + (1 - beta) KL(draft || m), m = beta target + (1 - beta) draft."""
    # Padded cells are -inf on both sides, where logaddexp has no gradient.
    target_NP, draft_NP = target_NP.clamp(min=NOTHING), draft_NP.clamp(min=NOTHING)
    mixture_NP = torch.logaddexp(target_NP + math.log(beta), draft_NP + math.log1p(-beta))
    return beta * _kl(target_NP, mixture_NP) + (1 - beta) * _kl(draft_NP, mixture_NP)


def total_variation(target_NP: Tensor, draft_NP: Tensor) -> Tensor:
    """Half the L1 distance: the probability that one draft token is rejected."""
    return 0.5 * (target_NP.exp() - draft_NP.exp()).abs().sum(-1)


def negative_log_acceptance(target_NP: Tensor, draft_NP: Tensor) -> Tensor:
    """-log sum min(target, draft)."""
    return -torch.logsumexp(torch.minimum(target_NP, draft_NP), -1)


def tv_weighted_kl(target_NP: Tensor, draft_NP: Tensor) -> Tensor:
    """Forward KL times detached total variation: OSD's "loss at the wrong tokens" in expectation.

    A position that is reached is the first rejection with probability TV, so this is the expectation of `osd`
    over possible draft tokens, with less variance.
    """
    weight_N = total_variation(target_NP, draft_NP).detach()
    return weight_N * forward_kl(target_NP, draft_NP)


def named_divergence(name: str, beta: float = 0.5) -> Divergence:
    """The divergence called `name`. `osd` is forward KL: its positions are chosen by the batch.

    Raises ValueError for an unknown name.
    """
    if name == "jensen_shannon":
        return lambda target_NP, draft_NP: jensen_shannon(target_NP, draft_NP, beta)
    if name not in _BY_NAME:
        known = ", ".join(sorted([*_BY_NAME, "jensen_shannon"]))
        raise ValueError(f"divergence={name!r} is not one of {known}; no step was taken")
    return _BY_NAME[name]


_BY_NAME: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
    "negative_log_acceptance": negative_log_acceptance,
    "tv_weighted_kl": tv_weighted_kl,
    "osd": forward_kl,
}
