"""The acceptance rules against distributions known by enumeration, each with a control that must fail."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serving.engine.sampling import draw, draw_uniforms
from serving.engine.verification import Verification, match_choice, ratio_test
from tests.support.chi_square import FALSE_ALARM_RATE, fit_p_value

V, G, ROWS = 4, 2, 120_000


def _logprobs(seed: int) -> tuple[Tensor, Tensor]:
    """Bigram tables [previous, next] of log-probabilities for target and draft."""
    generator = torch.Generator().manual_seed(seed)
    target, draft = (torch.randn(V, V, generator=generator) * 1.5 for _ in range(2))
    return target.log_softmax(-1), draft.log_softmax(-1)


Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Verification]


def _p_value(rule: Rule, seed: int) -> float:
    """Emit two tokens by rounds of the rule from previous token 0; p-value against target x target."""
    target_VV, draft_VV = _logprobs(seed)
    generator = torch.Generator().manual_seed(seed + 100)
    previous_B = torch.zeros(ROWS, dtype=torch.int64)
    drafted, draft_distributions, contexts = [], [], [previous_B]
    for _ in range(G):
        logprobs_BV = draft_VV[contexts[-1]]
        token_B = draw(logprobs_BV.exp(), draw_uniforms(logprobs_BV, generator))
        drafted.append(token_B)
        draft_distributions.append(logprobs_BV)
        contexts.append(token_B)
    target_BEV = torch.stack([target_VV[context] for context in contexts], dim=1)
    drafted_BG = torch.stack(drafted, dim=1)
    verification = rule(
        target_BEV,
        torch.stack(draft_distributions, dim=1),
        drafted_BG,
        torch.full((ROWS,), G),
        torch.rand(ROWS, G, generator=generator),
        draw_uniforms(target_BEV[:, 0], generator),
    )
    accepted_B, next_B = verification.num_accepted_B, verification.next_token_B
    emitted_BE = torch.cat([drafted_BG, torch.zeros(ROWS, 1, dtype=torch.int64)], 1)
    emitted_BE[torch.arange(ROWS), accepted_B] = next_B
    # A row that emitted one token draws its second from the target, as a later round of length 0 would.
    fresh_B = draw(target_VV[emitted_BE[:, 0]].exp(), draw_uniforms(target_BEV[:, 0], generator))
    second_B = torch.where(accepted_B >= 1, emitted_BE[:, 1], fresh_B)
    distribution = {
        (first, second): float((target_VV[0, first] + target_VV[first, second]).exp())
        for first, second in itertools.product(range(V), repeat=2)
    }
    return fit_p_value(zip(emitted_BE[:, 0].tolist(), second_B.tolist(), strict=True), distribution)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_ratio_test_emits_exactly_the_targets_distribution(seed: int) -> None:
    assert _p_value(ratio_test, seed) > FALSE_ALARM_RATE


def _no_residual(
    target: Tensor, draft: Tensor, drafted: Tensor, count: Tensor, uniform: Tensor, race: Tensor
) -> Verification:
    right = ratio_test(target, draft, drafted, count, uniform, race)
    plain = draw(target[torch.arange(len(drafted)), right.num_accepted_B].exp(), race)
    return Verification(right.num_accepted_B, plain)


def _always_accept_likelier(
    target: Tensor, draft: Tensor, drafted: Tensor, count: Tensor, uniform: Tensor, race: Tensor
) -> Verification:
    return ratio_test(target, draft, drafted, count, 0.5 * uniform, race)


@pytest.mark.parametrize("broken", [_no_residual, _always_accept_likelier])
def test_the_distribution_test_catches_a_broken_rule(broken: Rule) -> None:
    assert _p_value(broken, seed=0) < FALSE_ALARM_RATE


def test_acceptance_of_one_token_is_the_sum_of_minima_by_enumeration() -> None:
    target_VV, draft_VV = _logprobs(7)
    target_V, draft_V = target_VV[0], draft_VV[0]
    grid = (torch.arange(2000) + 0.5) / 2000
    expected = torch.minimum(target_V.exp(), draft_V.exp()).sum()
    got = 0.0
    for token in range(V):
        verification = ratio_test(
            target_V.expand(2000, 2, V),
            draft_V.expand(2000, 1, V),
            torch.full((2000, 1), token),
            torch.ones(2000, dtype=torch.int64),
            grid[:, None],
            torch.zeros(2000, dtype=torch.float64),
        )
        got += float(draft_V[token].exp()) * float(verification.num_accepted_B.float().mean())
    assert got == pytest.approx(float(expected), abs=1e-3)


def test_a_recovered_token_comes_only_from_where_the_target_exceeds_the_draft() -> None:
    target = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    draft = torch.tensor([0.1, 0.4, 0.4, 0.1]).log()
    rows = 500
    verification = ratio_test(
        target.expand(rows, 2, 4),
        draft.expand(rows, 1, 4),
        torch.full((rows, 1), 3),
        torch.ones(rows, dtype=torch.int64),
        torch.zeros(rows, 1),
        draw_uniforms(torch.zeros(rows, 4), torch.Generator().manual_seed(0)),
    )
    assert verification.num_accepted_B.tolist() == [0] * rows
    assert verification.next_token_B.tolist() == [0] * rows


def test_a_residual_of_zero_falls_back_to_the_targets_distribution() -> None:
    distribution = torch.tensor([0.25, 0.75]).log()
    verification = ratio_test(
        distribution.expand(1, 2, 2),
        distribution.expand(1, 1, 2),
        torch.zeros((1, 1), dtype=torch.int64),
        torch.ones(1, dtype=torch.int64),
        torch.full((1, 1), 1.0),  # one beyond [0, 1): forces a rejection of an equal distribution
        torch.tensor([0.5], dtype=torch.float64),
    )
    assert verification.next_token_B.tolist() == [1]


def test_columns_past_a_rows_draft_length_are_never_accepted() -> None:
    choice_BE = torch.tensor([[1, 2, 3], [1, 2, 3]])
    drafted_BG = torch.tensor([[1, 2], [1, 2]])
    verification = match_choice(choice_BE, drafted_BG, torch.tensor([1, 2]))
    assert verification.num_accepted_B.tolist() == [1, 2]
    assert verification.next_token_B.tolist() == [2, 3]


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    target_VV, _ = _logprobs(3)
    generator = torch.Generator().manual_seed(0)
    logprobs_BV = target_VV[torch.zeros(5000, dtype=torch.int64)]
    token_B = draw(logprobs_BV.exp(), draw_uniforms(logprobs_BV, generator))
    verification = ratio_test(
        torch.stack([logprobs_BV, target_VV[token_B]], 1),
        logprobs_BV[:, None],
        token_B[:, None],
        torch.ones(5000, dtype=torch.int64),
        torch.rand(5000, 1, generator=generator),
        draw_uniforms(logprobs_BV, generator),
    )
    assert int(verification.num_accepted_B.sum()) == 5000
