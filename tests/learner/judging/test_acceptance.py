"""The one estimator against exact enumeration, and why the minimum of the tails is not it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from buffer.records import RecordSampling
from learner.batch import TrainingBatch, collate
from learner.judging.acceptance import PositionAcceptance, position_acceptance
from learner.rows import Positions, TrainingRow
from serving.engine.sampling import SamplingMetadata, processed_logprobs

V, K = 24, 6


def final_probs(logits_V: Tensor, sampling: RecordSampling) -> Tensor:
    row = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return processed_logprobs(logits_V[None, None], SamplingMetadata.stack([row]))[0, 0]


def one_position_a_token(logits_V: Tensor, sampling: RecordSampling) -> TrainingBatch:
    """The same target position as often as there are tokens, each time another one emitted."""
    top = torch.log_softmax(logits_V, -1).topk(K)
    temperature = sampling.temperature or 1.0
    retemper = logits_V.logsumexp(-1) / temperature - (logits_V / temperature).logsumexp(-1)
    nothing = np.zeros(V, np.bool_)
    positions = Positions(
        position_N=np.ones(V, np.int64),
        topk_token_ids_NK=top.indices.expand(V, K).numpy().copy(),
        topk_logprobs_NK=top.values.expand(V, K).numpy().copy(),
        retemper_N=np.full(V, float(retemper), np.float32),
        emitted_token_id_N=np.arange(V),
        emitted_logprob_N=final_probs(logits_V, sampling).numpy(),
        attempted_N=nothing,
        accepted_N=nothing,
        first_rejected_N=nothing,
    )
    return collate([TrainingRow(np.zeros(1, np.int64), 0, positions, 1.0, sampling)])


def pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target_V, noise_V = 1.5 * torch.randn(2, V, generator=generator)
    return target_V, 0.5 * target_V + noise_V


def estimate(
    target_V: Tensor, draft_V: Tensor, sampling: RecordSampling
) -> tuple[PositionAcceptance, Tensor]:
    """(what the estimator says for each emitted token, the probability of each)."""
    batch = one_position_a_token(target_V, sampling)
    return position_acceptance(batch, draft_V.expand(V, V)), final_probs(target_V, sampling).exp()


EXACT = [
    RecordSampling(),
    RecordSampling(temperature=0.6),
    RecordSampling(temperature=1.4),
    RecordSampling(top_k=4),
    RecordSampling(temperature=0.8, top_p=0.7),
    RecordSampling(min_p=0.3),
    RecordSampling(temperature=0.9, top_k=5, top_p=0.8, min_p=0.05),
]


@pytest.mark.parametrize("sampling", EXACT, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_its_mean_over_emitted_tokens_is_the_exact_acceptance(seed: int, sampling: RecordSampling) -> None:
    target_V, draft_V = pair(seed)
    found, probs_V = estimate(target_V, draft_V, sampling)
    exact = torch.minimum(probs_V, final_probs(draft_V, sampling).exp()).sum()
    emitted_V = probs_V > 0
    assert float((probs_V * found.expected_N)[emitted_V].sum()) == pytest.approx(float(exact), abs=1e-5)


@pytest.mark.parametrize("sampling", [RecordSampling(top_p=0.97), RecordSampling(top_k=12)], ids=str)
def test_filters_that_reach_past_the_kept_tokens_cost_little(sampling: RecordSampling) -> None:
    for seed in range(10):
        target_V, draft_V = pair(seed)
        found, probs_V = estimate(target_V, draft_V, sampling)
        exact = torch.minimum(probs_V, final_probs(draft_V, sampling).exp()).sum()
        assert float((probs_V * found.expected_N)[probs_V > 0].sum()) == pytest.approx(float(exact), abs=0.02)


def test_the_minimum_of_the_tail_masses_reads_high() -> None:
    excess = []
    for seed in range(20):
        target_V, draft_V = pair(seed)
        target_V, draft_V = target_V.softmax(-1), draft_V.softmax(-1)
        kept = target_V.topk(K).indices
        tails = [1 - probs_V[kept].sum() for probs_V in (target_V, draft_V)]
        merged = torch.minimum(target_V, draft_V)[kept].sum() + min(tails)
        excess.append(float(merged - torch.minimum(target_V, draft_V).sum()))
    assert min(excess) >= 0
    assert np.mean(excess) > 0.03


def test_given_the_emitted_token_its_mean_is_the_acceptance_too() -> None:
    target_V, draft_V = pair(3)
    found, probs_V = estimate(target_V, draft_V, RecordSampling())
    exact = torch.minimum(probs_V, draft_V.softmax(-1)).sum()
    assert float((probs_V * found.given_emitted_N).sum()) == pytest.approx(float(exact), abs=1e-5)


def test_greedy_acceptance_is_whether_the_draft_agrees() -> None:
    target_V, draft_V = pair(0)
    greedy = RecordSampling(temperature=0.0, mode="greedy")
    found, _ = estimate(target_V, draft_V, greedy)
    assert found.expected_N.tolist() == [float(v == int(draft_V.argmax())) for v in range(V)]


def test_a_draft_of_nan_is_not_mistaken_for_one_that_agrees() -> None:
    target_V, _ = pair(0)
    for sampling in (RecordSampling(), RecordSampling(temperature=0.0, mode="greedy")):
        found, _ = estimate(target_V, torch.full((V,), torch.nan), sampling)
        assert bool(found.expected_N.isnan().all())


def test_coupled_acceptance_is_that_of_shared_noise() -> None:
    """A normal test on 200,000 draws at 5 sigma: a correct estimator fails once in a million runs, and one
    that read as for unshared noise would be off by more."""
    target_V, draft_V = pair(6)
    target_V[K:], draft_V[K:] = -30.0, -30.0  # all mass kept: no bound is needed
    found, probs_V = estimate(target_V, draft_V, RecordSampling(mode="coupled"))
    expected = float((probs_V * found.expected_N).sum())
    noise_NV = -torch.empty(200_000, V).exponential_(generator=torch.Generator().manual_seed(0)).log()
    agree_N = (target_V + noise_NV).argmax(-1) == (draft_V + noise_NV).argmax(-1)
    sigma = (expected * (1 - expected) / len(agree_N)) ** 0.5
    assert abs(float(agree_N.float().mean()) - expected) < 5 * sigma
    unshared = float(torch.minimum(probs_V, draft_V.softmax(-1)).sum())
    assert abs(unshared - expected) > 5 * sigma
    assert float((probs_V * found.given_emitted_N).sum()) == pytest.approx(expected, abs=1e-4)
