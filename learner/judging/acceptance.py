"""Expected acceptance at a verified position: the estimator that losses, gate and routes report.

The sum over the target's kept tokens of min(target, draft), plus, if the emitted token lies outside them,
min(1, draft / target) at that token. Unbiased, because the emitted token follows the target's sampling. It
never uses the minimum of the two tail masses, which is biased upward, so that a candidate could win by
matching only the mass of the tail. Everything is under the request's own final sampling.

Coupled (seeded) requests accept by shared noise, a little less often: the sum becomes that of 1 / sum_u
max(target_u / target_v, draft_u / draft_v) (2408.07978); outside the kept tokens the sum over u is bounded by
its cells, which is too high by at most the tail.

Knows no model. Legend: N positions, K kept entries, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.batch import TrainingBatch
from learner.distributions import final_target_logprobs, kept_entries
from serving.engine.sampling import SamplingMetadata, processed_logprobs


@dataclass(frozen=True, eq=False)
class PositionAcceptance:
    """Per position, [N] float32."""

    expected_N: Tensor
    """Unbiased for the probability that a draft token is accepted here. A single value may exceed 1, but
    never 2; clipping it would bias the mean."""
    given_emitted_N: Tensor
    """Probability that the draft would have been accepted *as the emitted token*, over the target's
    probability of it: products of it along a trajectory are unbiased for whole runs."""


def position_acceptance(batch: TrainingBatch, logits_NV: Tensor) -> PositionAcceptance:
    """Acceptance of a draft with these logits [N, V], at emitted positions (every `emitted_token_id_N` is
    set)."""
    assert bool((batch.emitted_token_id_N >= 0).all()), "acceptance is defined at emitted positions"
    sampling = SamplingMetadata.stack(batch.samplings, logits_NV.device)
    draft_NV = processed_logprobs(logits_NV[:, None].float(), sampling)[:, 0]
    target_NK = final_target_logprobs(batch)
    draft_NK = kept_entries(draft_NV, batch)
    draft_N = draft_NV.gather(-1, batch.emitted_token_id_N[:, None])[:, 0]

    ratio_N = (draft_N - batch.emitted_logprob_N).clamp(max=0.0).exp()
    kept_sum_N = torch.minimum(target_NK, draft_NK).exp().sum(-1)
    if bool(batch.coupled_N.any()):
        coupled = _coupled(target_NK, draft_NK, batch.emitted_logprob_N, draft_N)
        kept_sum_N = torch.where(batch.coupled_N, coupled[0], kept_sum_N)
        ratio_N = torch.where(batch.coupled_N, coupled[1], ratio_N)
    kept_N = (batch.topk_token_ids_NK == batch.emitted_token_id_N[:, None]).any(-1)
    expected_N = kept_sum_N + torch.where(kept_N, 0.0, ratio_N)
    # An argmax hides NaN: without this a draft with NaN logits could look like a good greedy one.
    agrees_N = draft_N.exp().masked_fill(logits_NV.isnan().any(-1), torch.nan)
    return PositionAcceptance(
        expected_N=torch.where(sampling.greedy_N, agrees_N, expected_N),
        given_emitted_N=torch.where(sampling.greedy_N, agrees_N, ratio_N),
    )


def _coupled(
    target_NK: Tensor, draft_NK: Tensor, emitted_target_N: Tensor, emitted_draft_N: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum over kept tokens, value at the emitted token given that it was emitted), each [N]."""
    target_NP = _with_tail(target_NK.exp())
    draft_NP = _with_tail(draft_NK.exp())
    gain_NK = (draft_NK - target_NK).exp().nan_to_num(0.0, posinf=torch.inf)
    emitted_gain_N = (emitted_draft_N - emitted_target_N).exp()

    def meeting(gain_N1: Tensor) -> Tensor:
        """P(the draft's choice is v | the target's is v), for draft/target ratio `gain` at v."""
        rate_NP = torch.maximum(target_NP, draft_NP / gain_N1.clamp(min=1e-30))
        return torch.where(gain_N1[:, 0] > 0, 1 / rate_NP.sum(-1), 0.0)

    columns = [meeting(gain_NK[:, k : k + 1]) for k in range(gain_NK.shape[1])]
    kept_sum_N = (target_NK.exp() * torch.stack(columns, -1)).sum(-1)
    return kept_sum_N, meeting(emitted_gain_N[:, None])


def _with_tail(probs_NK: Tensor) -> Tensor:
    return torch.cat([probs_NK, (1 - probs_NK.sum(-1, keepdim=True)).clamp(min=0.0)], -1)
