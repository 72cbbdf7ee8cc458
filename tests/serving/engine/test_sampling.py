"""The final distribution against a plain reference that works token by token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from serving.engine.noise import gumbel_noise, noise_key
from serving.engine.sampling import SamplingMetadata, draw, draw_uniforms, processed_logprobs
from tests.support.chi_square import FALSE_ALARM_RATE, fit_p_value


def _reference(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> list[float]:
    if temperature == 0.0:
        best = max(range(len(logits)), key=lambda token: (logits[token], -token))
        return [float(token == best) for token in range(len(logits))]
    kept = {token: logit / temperature for token, logit in enumerate(logits)}
    if top_k:
        threshold = sorted(kept.values(), reverse=True)[min(top_k, len(kept)) - 1]
        kept = {token: value for token, value in kept.items() if value >= threshold}
    ordered = sorted(kept, key=lambda token: (-kept[token], token))
    if top_p < 1.0:
        total = sum(math.exp(kept[token]) for token in ordered)
        mass, nucleus = 0.0, []
        for token in ordered:
            if nucleus and mass >= top_p:
                break
            nucleus.append(token)
            mass += math.exp(kept[token]) / total
        ordered = nucleus
    best_value = kept[ordered[0]]
    ordered = (
        [token for token in ordered if kept[token] >= best_value + math.log(min_p)] if min_p else ordered
    )
    total = sum(math.exp(kept[token]) for token in ordered)
    return [math.exp(kept[token]) / total if token in ordered else 0.0 for token in range(len(logits))]


_params = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 3, 50]),
    st.sampled_from([0.13, 0.57, 0.9, 1.0]),
    st.sampled_from([0.0, 0.07, 0.5]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_params, min_size=1, max_size=4), st.integers(2, 12), st.integers(0, 2**31))
def test_the_distribution_of_every_row_equals_the_plain_reference(
    rows: list[tuple[float, int, float, float]], vocab_size: int, seed: int
) -> None:
    logits = torch.randn(len(rows), 2, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
    got = processed_logprobs(logits, SamplingMetadata.stack(rows)).exp()
    for row, params in enumerate(rows):
        for position in range(2):
            expected = _reference(logits[row, position].tolist(), *params)
            assert got[row, position].tolist() == pytest.approx(expected, abs=2e-5)


def test_a_draw_follows_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0]).expand(50_000, 5)
    tokens = draw(probs, draw_uniforms(probs, torch.Generator().manual_seed(0)))
    distribution = dict(enumerate(probs[0].tolist()))
    assert fit_p_value(tokens.tolist(), distribution) > FALSE_ALARM_RATE


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1.0 - 2.0**-53])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float, scale: float) -> None:
    probs = scale * torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.7, 0.0, 0.3], [1 / 3, 0.0, 0.0, 0.0]])
    tokens = draw(probs, torch.full((3,), uniform, dtype=torch.float64))
    assert (probs.gather(1, tokens[:, None]) > 0).all()


def test_a_draw_from_what_is_not_finite_is_still_a_token() -> None:
    assert draw(torch.full((2, 5), torch.nan), torch.tensor([0.2, 0.9], dtype=torch.float64)).max() < 5


def test_coupled_noise_is_gumbel() -> None:
    """Kolmogorov-Smirnov on 200,000 values; false-alarm rate 1e-4, seed fixed."""
    keys = torch.tensor([noise_key(seed, 0) for seed in range(50)])
    noise = gumbel_noise(keys, torch.arange(4).expand(50, 4), 1000)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > FALSE_ALARM_RATE
    assert torch.isfinite(noise).all()


def test_argmax_with_coupled_noise_follows_the_distribution_over_seeds_positions_and_choices() -> None:
    logprobs = torch.tensor([0.55, 0.3, 0.1, 0.05]).log()
    distribution = dict(enumerate(logprobs.exp().tolist()))
    by_seed = torch.tensor([noise_key(seed, 0) for seed in range(20_000)])
    by_choice = torch.tensor([noise_key(7, choice) for choice in range(20_000)])
    zero = torch.zeros(20_000, 1, dtype=torch.int64)
    for keys, positions in [
        (by_seed, zero),
        (by_choice, zero),
        (torch.full((20_000,), noise_key(3, 1)), torch.arange(20_000)[:, None]),
    ]:
        tokens = (logprobs + gumbel_noise(keys, positions, 4)[:, 0]).argmax(-1)
        assert fit_p_value(tokens.tolist(), distribution) > FALSE_ALARM_RATE


def test_noise_depends_on_nothing_but_its_four_counters() -> None:
    keys = torch.tensor([noise_key(1, 0), noise_key(-5, 2)])
    together = gumbel_noise(keys, torch.tensor([[3, 9], [4, 0]]), 30)
    alone = gumbel_noise(keys[1:], torch.tensor([[4]]), 17)
    assert torch.equal(together[1, 0, :17], alone[0, 0])
    assert not torch.equal(together[0, 0], together[0, 1])
