"""An acceptance rule by itself: what it emits follows the target's distribution, whatever the draft's."""

import itertools
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from serving.engine.sampling import draw, draw_uniforms
from serving.engine.verification import Verification
from tests.support.chi_square import fit_p_value

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Verification]
"""As `ratio_test`."""

NUM_ROWS = 8_000
FUZZ_FALSE_ALARM_RATE = 1e-9
"""Nominal, of one case. Cells that expect 50 have heavier tails than chi-square's: below 1e-6 in truth."""
MIN_EXPECTED = 50.0


@st.composite
def distribution_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target [E, V] and draft [G, V], each position by itself."""
    vocab_size, num_drafts = draw(st.integers(2, 4)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (num_drafts + 1, vocab_size)
    temperature = draw(st.sampled_from([1e-3, 0.3, 1.0, 5.0]))
    target_EV = torch.randn(shape, generator=generator) / temperature
    if draw(st.booleans()):
        target_EV[:, 1:][torch.rand(target_EV[:, 1:].shape, generator=generator) < 0.4] = -torch.inf
    other_GV = torch.randn(num_drafts, vocab_size, generator=generator)
    is_best_GV = target_EV[:-1] == target_EV[:-1].amax(-1, keepdim=True)
    kind = draw(st.sampled_from(["same", "near", "other", "one_hot", "disjoint", "flat"]))
    draft_GV = {
        "same": target_EV[:-1],
        "near": target_EV[:-1] + 1e-6 * other_GV,
        "other": 2.0 * other_GV,
        "one_hot": 1e4 * other_GV,
        "disjoint": torch.where(is_best_GV, -torch.inf, other_GV),
        "flat": torch.zeros_like(other_GV),
    }[kind]
    if kind == "disjoint":
        target_EV[:-1] = torch.where(is_best_GV, 0.0, -torch.inf)
    return target_EV.log_softmax(-1), draft_GV.log_softmax(-1)


def check_rule(rule: Rule, pair: tuple[Tensor, Tensor]) -> None:
    """Drafts drawn from the draft's distributions, judged by the rule, completed by the target: the target's
    distribution."""
    target_EV, draft_GV = pair
    num_drafts, generator = len(draft_GV), torch.Generator().manual_seed(0)
    drafted_BG = torch.stack([_draws(probs_V, generator) for probs_V in draft_GV], dim=1)
    verification = rule(
        target_EV.expand(NUM_ROWS, -1, -1),
        draft_GV.expand(NUM_ROWS, -1, -1),
        drafted_BG,
        torch.full((NUM_ROWS,), num_drafts),
        torch.rand(NUM_ROWS, num_drafts, generator=generator),
        draw_uniforms(torch.empty(NUM_ROWS, target_EV.shape[1]), generator),
    )
    accepted_B1 = verification.num_accepted_B[:, None]
    if torch.equal(draft_GV, target_EV[:-1]):
        assert bool((accepted_B1 == num_drafts).all()), (
            "a draft from the target's own distribution was rejected"
        )
    fresh_BE = torch.stack([_draws(probs_V, generator) for probs_V in target_EV], dim=1)
    kept_BE = torch.arange(num_drafts + 1) < accepted_B1
    emitted_BE = torch.where(kept_BE, torch.nn.functional.pad(drafted_BG, (0, 1)), fresh_BE)
    emitted_BE.scatter_(1, accepted_B1, verification.next_token_B[:, None])
    p_value = fit_p_value(map(tuple, emitted_BE.tolist()), _product_distribution(target_EV), MIN_EXPECTED)
    assert p_value > FUZZ_FALSE_ALARM_RATE, (
        f"the rule does not emit the target's distribution: p = {p_value:.2g}"
    )


def _draws(probs_V: Tensor, generator: torch.Generator) -> Tensor:
    probs_BV = probs_V.exp().expand(NUM_ROWS, -1)
    return draw(probs_BV, draw_uniforms(probs_BV, generator))


def _product_distribution(target_EV: Tensor) -> dict[tuple[int, ...], float]:
    probs = target_EV.double().exp().tolist()
    return {
        tokens: float(torch.tensor([row[token] for row, token in zip(probs, tokens, strict=True)]).prod())
        for tokens in itertools.product(range(target_EV.shape[1]), repeat=len(probs))
    }
