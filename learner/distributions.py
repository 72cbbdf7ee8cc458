"""The two target distributions that a record's kept entries give: final (to judge) and training.

*Final*: the request's own distribution (temperature, top-k, top-p, min-p), exact at the kept entries, because
a record carries the scalar that re-tempers them. *Training*: the request's temperature without its filters (a
filter's zeros would hide tokens that the target considered likely), on the K+1-way partition. Greedy and
near-greedy requests are distilled, target and draft alike, at `greedy_temperature`: at 1 the kept entries are
exact, a lower one sharpens towards the argmax, which alone decides. Measured on an early demo pair after 48
steps: held-out acceptance .60 at 1, .68 at 0.5, .70 at 0.3. Knows no draft.

Legend: N positions, K kept entries, P = K + 1 cells, V vocabulary.
"""

import torch
from torch import Tensor

from learner.batch import TrainingBatch
from learner.divergences import NOTHING, partition
from serving.engine.sampling import SamplingMetadata

NEAR_GREEDY_TEMPERATURE = 0.3
"""Below it float16 rounding divided by the temperature would exceed the signal; such requests are distilled
like greedy ones."""


def final_target_logprobs(batch: TrainingBatch) -> Tensor:
    """[N, K]: the target's final distribution at its kept entries, -inf where filtered or padded.

    Exact where the filters end within the kept entries or the emitted token is kept (its stored final
    log-probability gives the normaliser); else the normaliser is its closest bound. Not meaningful in greedy
    rows, where the emitted token is the whole distribution.
    """
    sampling = SamplingMetadata.stack(batch.samplings, batch.retemper_N.device)
    tempered_NK = batch.topk_logprobs_NK / sampling.temperature_N[:, None] + batch.retemper_N[:, None]
    if not (sampling.max_top_k or sampling.any_top_p or sampling.any_min_p):
        return tempered_NK
    keep_NK = _filtered(tempered_NK, sampling)
    kept_NK = tempered_NK.masked_fill(~keep_NK, -torch.inf)
    log_mass_N = torch.where(
        keep_NK.all(-1), _open_log_mass(batch, tempered_NK, sampling), torch.logsumexp(kept_NK, -1)
    )
    unfiltered_N = (sampling.top_k_N == 0) & (sampling.top_p_N >= 1) & (sampling.min_p_N == 0)
    return kept_NK - torch.where(unfiltered_N, 0.0, log_mass_N)[:, None]


def _filtered(tempered_NK: Tensor, sampling: SamplingMetadata) -> Tensor:
    """Which kept entries pass top-k, then top-p on what is left, then min-p; entries are sorted."""
    rank_K = torch.arange(tempered_NK.shape[1], device=tempered_NK.device)
    in_top_k_NK = (sampling.top_k_N[:, None] == 0) | (rank_K < sampling.top_k_N[:, None])
    probs_NK = tempered_NK.exp() * in_top_k_NK
    mass_N1 = torch.where(sampling.top_k_N > 0, probs_NK.sum(-1), 1.0)[:, None]
    before_NK = (probs_NK.cumsum(-1) - probs_NK) / mass_N1
    in_top_p_NK = (sampling.top_p_N[:, None] >= 1) | (before_NK < sampling.top_p_N[:, None]) | (rank_K == 0)
    in_min_p_NK = tempered_NK >= tempered_NK[:, :1] + sampling.min_p_N[:, None].log()
    return in_top_k_NK & in_top_p_NK & in_min_p_NK & (tempered_NK > -torch.inf)


def _open_log_mass(batch: TrainingBatch, tempered_NK: Tensor, sampling: SamplingMetadata) -> Tensor:
    """[N]: log mass of a filtered distribution that reaches past the kept entries."""
    is_emitted_NK = batch.topk_token_ids_NK == batch.emitted_token_id_N[:, None]
    at_emitted_N = torch.where(is_emitted_NK, tempered_NK, 0.0).sum(-1) - batch.emitted_logprob_N
    kept_mass_N = torch.logsumexp(tempered_NK, -1)
    bound_N = torch.maximum(sampling.top_p_N.log(), kept_mass_N).clamp(max=0.0)
    known_N = is_emitted_NK.any(-1) & (batch.emitted_token_id_N >= 0)
    return torch.where(known_N, at_emitted_N, bound_N)


def training_logprobs(
    batch: TrainingBatch, logits_NV: Tensor, greedy_temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(target_NP, draft_NP, coverage_N): log-partitions at each position's training temperature.

    Tokens that the draft's head cannot propose are left out of the target, which is normalised over the
    others; `coverage_N` is the probability of those, 1 for a head over all tokens. Differentiable in
    `logits_NV` [N, V], the draft's.
    """
    temperature_N = torch.tensor([sampling[0] for sampling in batch.samplings], device=logits_NV.device)
    greedy_N = temperature_N < NEAR_GREEDY_TEMPERATURE
    temperature_N = torch.where(greedy_N, greedy_temperature, temperature_N)
    # log-probabilities at 1 need no re-tempering; at another greedy temperature the kept entries are
    # renormalised among themselves, and the tail, which only shrinks, is left out.
    warm_NK = batch.topk_logprobs_NK / temperature_N[:, None]
    own_N = -torch.logsumexp(warm_NK, -1) if greedy_temperature != 1.0 else torch.zeros_like(temperature_N)
    retemper_N = torch.where(greedy_N, own_N, batch.retemper_N)
    target_NP = partition(warm_NK + retemper_N[:, None])

    draft_NV = torch.log_softmax(logits_NV / temperature_N[:, None], -1)
    draft_NK = kept_entries(draft_NV, batch)
    outside_NK = (draft_NK == -torch.inf) & (batch.topk_token_ids_NK >= 0)
    if not bool(outside_NK.any()):
        return target_NP, partition(draft_NK), torch.ones_like(temperature_N)
    target_NP = target_NP.masked_fill(_with_tail(outside_NK), -torch.inf)
    log_coverage_N = torch.logsumexp(target_NP, -1)
    # A row that is -inf throughout would have no gradient but NaN.
    draft_NK = draft_NK.masked_fill(outside_NK, NOTHING)
    return target_NP - log_coverage_N[:, None], partition(draft_NK), log_coverage_N.exp()


def _with_tail(mask_NK: Tensor) -> Tensor:
    """[N, P], False at the tail."""
    return torch.nn.functional.pad(mask_NK, (0, 1))


def kept_entries(logprobs_NV: Tensor, batch: TrainingBatch) -> Tensor:
    """[N, K]: log-probabilities at the target's kept tokens; -inf at padded entries."""
    padded_NK = batch.topk_token_ids_NK < 0
    at_kept_NK = logprobs_NV.gather(-1, batch.topk_token_ids_NK.clamp(min=0))
    return at_kept_NK.masked_fill(padded_NK, -torch.inf)
