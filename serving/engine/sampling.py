"""From logits to the distribution that tokens are drawn from; the same code for draft, target and learner.

The final distribution of a row: logits / temperature, then top-k, then top-p, then min-p, each applied to
what the one before kept; greedy rows put all mass on the argmax. Pure functions; randomness is an argument.
Legend: N rows (one a sequence), X positions of a row, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SamplingRow = tuple[float, int, float, float]
"""(temperature, top_k, top_p, min_p) of one sequence; 0, 0, 1, 0 are greedy, off, off, off."""


@dataclass(frozen=True)
class SamplingMetadata:
    """The sampling parameters of N sequences as tensors, and which filters any of them uses."""

    temperature_N: Tensor
    """Greedy rows hold 1."""
    greedy_N: Tensor
    top_k_N: Tensor
    top_p_N: Tensor
    min_p_N: Tensor
    any_greedy: bool
    all_greedy: bool
    max_top_k: int
    any_top_p: bool
    any_min_p: bool

    @classmethod
    def stack(cls, rows: Sequence[SamplingRow], device: torch.device | str = "cpu") -> "SamplingMetadata":
        """One row a sequence, in order."""
        temperatures, top_ks, top_ps, min_ps = zip(*rows, strict=True)
        greedy = [temperature == 0.0 for temperature in temperatures]
        warm = [1.0 if temperature == 0.0 else temperature for temperature in temperatures]
        return cls(
            temperature_N=torch.tensor(warm, dtype=torch.float32, device=device),
            greedy_N=torch.tensor(greedy, device=device),
            top_k_N=torch.tensor(top_ks, dtype=torch.int64, device=device),
            top_p_N=torch.tensor(top_ps, dtype=torch.float32, device=device),
            min_p_N=torch.tensor(min_ps, dtype=torch.float32, device=device),
            any_greedy=any(greedy),
            all_greedy=all(greedy),
            max_top_k=max(top_ks),
            any_top_p=any(top_p < 1.0 for top_p in top_ps),
            any_min_p=any(min_p > 0.0 for min_p in min_ps),
        )


def processed_logprobs(logits_NXV: Tensor, sampling: SamplingMetadata) -> Tensor:
    """Log-probabilities under the final distribution; -inf where it excludes a token. Float32 in and out.

    Differentiable where not greedy. A logit of -inf stays excluded.
    """
    assert logits_NXV.dim() == 3 and logits_NXV.shape[0] == sampling.temperature_N.shape[0]
    if sampling.all_greedy:
        return _one_hot_logprobs(logits_NXV)
    warm_NXV = logits_NXV.float() / sampling.temperature_N[:, None, None]
    if sampling.max_top_k > 0:
        warm_NXV = _keep_top_k(warm_NXV, sampling)
    if sampling.any_top_p:
        warm_NXV = _keep_top_p(warm_NXV, sampling.top_p_N)
    if sampling.any_min_p:
        warm_NXV = _keep_min_p(warm_NXV, sampling.min_p_N)
    logprobs_NXV = torch.log_softmax(warm_NXV, dim=-1)
    if sampling.any_greedy:
        one_hot_NXV = _one_hot_logprobs(logits_NXV)
        logprobs_NXV = torch.where(sampling.greedy_N[:, None, None], one_hot_NXV, logprobs_NXV)
    return logprobs_NXV


def _one_hot_logprobs(logits_NXV: Tensor) -> Tensor:
    best_NX1 = logits_NXV.argmax(dim=-1, keepdim=True)
    excluded_NXV = torch.full_like(logits_NXV, -torch.inf, dtype=torch.float32)
    return excluded_NXV.scatter_(-1, best_NX1, 0.0)


def _keep_top_k(warm_NXV: Tensor, sampling: SamplingMetadata) -> Tensor:
    """Keep the k largest (ties with the k-th stay); rows with k = 0 keep all."""
    num_tokens = warm_NXV.shape[-1]
    k_N = sampling.top_k_N.clamp(max=num_tokens)
    largest_NXk = warm_NXV.topk(min(sampling.max_top_k, num_tokens), dim=-1).values
    index_NX1 = (k_N - 1).clamp(min=0)[:, None, None].expand(*warm_NXV.shape[:2], 1)
    threshold_NX1 = largest_NXk.gather(-1, index_NX1)
    drop_NXV = (warm_NXV < threshold_NX1) & (k_N > 0)[:, None, None]
    return warm_NXV.masked_fill(drop_NXV, -torch.inf)


def _keep_top_p(warm_NXV: Tensor, top_p_N: Tensor) -> Tensor:
    """Keep the smallest set of most likely tokens whose mass reaches p (never fewer than one)."""
    sorted_NXV, order_NXV = warm_NXV.sort(dim=-1, descending=True, stable=True)
    probs_NXV = sorted_NXV.softmax(dim=-1)
    mass_before_NXV = probs_NXV.cumsum(dim=-1) - probs_NXV
    drop_sorted_NXV = mass_before_NXV >= top_p_N[:, None, None]
    drop_sorted_NXV[..., 0] = False
    drop_sorted_NXV &= (top_p_N < 1.0)[:, None, None]
    drop_NXV = torch.zeros_like(drop_sorted_NXV).scatter_(-1, order_NXV, drop_sorted_NXV)
    return warm_NXV.masked_fill(drop_NXV, -torch.inf)


def _keep_min_p(warm_NXV: Tensor, min_p_N: Tensor) -> Tensor:
    """Keep tokens at least min_p times as likely as the most likely one."""
    log_min_p_N11 = min_p_N.log()[:, None, None]
    threshold_NX1 = warm_NXV.amax(dim=-1, keepdim=True) + log_min_p_N11
    return warm_NXV.masked_fill(warm_NXV < threshold_NX1, -torch.inf)


def draw(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token a row, [B], by the distribution `probs / sum(probs)`: the first whose running sum, in
    float64, exceeds `uniform` times the whole sum. A token of probability 0 is never drawn."""
    mass_BV = probs_BV.double().cumsum(dim=-1)
    whole_B1 = mass_BV[:, -1:].contiguous()
    token_B1 = torch.searchsorted(mass_BV, uniform_B[:, None] * whole_B1, right=True)
    last_B1 = torch.searchsorted(mass_BV, whole_B1)  # if rounding reached the whole sum
    return torch.minimum(token_B1, last_B1)[:, 0].clamp_(max=probs_BV.shape[-1] - 1)


def draw_uniforms(like_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers for `draw`, one for each row of `like_BV`: [B] on [0, 1), float64."""
    return torch.rand(like_BV.shape[0], dtype=torch.float64, generator=generator, device=like_BV.device)
