"""Divergences against the full vocabulary, their gradients, and what OSD's loss means in expectation."""

import pytest
import torch
from torch import Tensor

from learner import divergences as d

V = 9


def distributions(seed: int, num_rows: int = 20) -> tuple[Tensor, Tensor]:
    """(target log-probabilities, draft logits), [N, V], float32, target sorted."""
    generator = torch.Generator().manual_seed(seed)
    target_NV = torch.log_softmax(2 * torch.randn(num_rows, V, generator=generator), -1)
    draft_NV = 2 * torch.randn(num_rows, V, generator=generator)
    return target_NV.sort(-1, descending=True).values, draft_NV


def reference(name: str, p: Tensor, q: Tensor) -> Tensor:
    """Over the full vocabulary, from probabilities."""
    m = 0.5 * (p + q)
    tv = 0.5 * (p - q).abs().sum(-1)
    kl = (p * (p / q).log()).sum(-1)
    return {
        "forward_kl": kl,
        "osd": kl,
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jensen_shannon": 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1),
        "total_variation": tv,
        "negative_log_acceptance": -torch.minimum(p, q).sum(-1).log(),
        "tv_weighted_kl": tv.detach() * kl,
    }[name]


NAMES = [
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "negative_log_acceptance",
    "tv_weighted_kl",
    "osd",
]


@pytest.mark.parametrize("name", NAMES)
def test_with_every_token_kept_value_and_gradient_are_those_of_the_full_vocabulary(name: str) -> None:
    target_NV, draft_NV = distributions(0)
    draft_NV.requires_grad_()
    kept = d.partition(torch.log_softmax(draft_NV, -1))
    found_N = d.named_divergence(name)(d.partition(target_NV), kept)
    (found_gradient,) = torch.autograd.grad(found_N.sum(), draft_NV)
    wanted_N = reference(name, target_NV.exp(), draft_NV.softmax(-1))
    (wanted_gradient,) = torch.autograd.grad(wanted_N.sum(), draft_NV)
    torch.testing.assert_close(found_N, wanted_N, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found_gradient, wanted_gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_with_a_tail_the_value_is_that_of_the_merged_vocabulary_and_a_lower_bound(name: str) -> None:
    target_NV, draft_NV = distributions(1)
    draft_NV = torch.log_softmax(draft_NV, -1)

    def merged(logprobs_NV: Tensor) -> Tensor:
        probs_NV = logprobs_NV.exp()
        return torch.cat([probs_NV[:, :4], probs_NV[:, 4:].sum(-1, keepdim=True)], -1)

    found_N = d.named_divergence(name)(d.partition(target_NV[:, :4]), d.partition(draft_NV[:, :4]))
    torch.testing.assert_close(
        found_N, reference(name, merged(target_NV), merged(draft_NV)), atol=1e-5, rtol=1e-4
    )
    assert bool((found_N <= reference(name, target_NV.exp(), draft_NV.exp()) + 1e-5).all())


@pytest.mark.parametrize("name", NAMES)
def test_padded_and_nearly_certain_cells_give_finite_gradients(name: str) -> None:
    target_NK = torch.tensor([[0.0, -40.0, -torch.inf], [-0.1, -3.0, -torch.inf]])
    logits_NK = torch.tensor([[30.0, -30.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    draft_NK = torch.log_softmax(logits_NK, -1).masked_fill(target_NK == -torch.inf, -torch.inf)
    d.named_divergence(name)(d.partition(target_NK), d.partition(draft_NK)).sum().backward()
    assert logits_NK.grad is not None
    assert bool(torch.isfinite(logits_NK.grad).all())


def test_tv_weighted_kl_has_the_gradient_that_osd_has_on_average_over_what_is_drafted() -> None:
    target_NV, draft_NV = distributions(2, num_rows=1)
    draft_NV.requires_grad_()
    draft_probs_NV = torch.log_softmax(draft_NV, -1)
    target_NP, draft_NP = d.partition(target_NV), d.partition(draft_probs_NV)
    (osd_gradient,) = torch.autograd.grad(
        d.named_divergence("osd")(target_NP, draft_NP).sum(), draft_NV, retain_graph=True
    )
    drafted_V, target_V = draft_probs_NV.detach().exp()[0], target_NV.exp()[0]
    rejected_V = 1 - (target_V / drafted_V).clamp(max=1)
    expected_gradient = sum(drafted_V[v] * rejected_V[v] * osd_gradient for v in range(V))
    (gradient,) = torch.autograd.grad(d.tv_weighted_kl(target_NP, draft_NP).sum(), draft_NV)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


def test_an_unknown_divergence_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"divergence='kl'.*forward_kl"):
        d.named_divergence("kl")
