"""The checks of test_lossless can fail: each known way to lie, put into the engine, is caught by one of them.

A control runs the same check over the same examples as the property test, with one bug, and expects its
words. Patching our own code is what a control is; the engine under it is the real one. Quicker controls are
in test_output_distribution and test_logits_processing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor

import serving.drafters.model_drafter as model_drafter_module
import serving.engine.commit as commit_module
import serving.engine.logits_processing as logits_processing_module
import serving.engine.round as round_module
from serving.drafters.model_drafter import ModelDrafter
from serving.engine import SamplingParams
from serving.engine.constrained_rows import ConstrainedRows
from serving.engine.logits_processing import LogitsProcessing
from serving.engine.passes.prefix_cache import PrefixCache
from serving.engine.passes.slot_cache import SlotCache
from serving.engine.proposal import Proposal
from serving.engine.sampling import SamplingMetadata, draw, processed_logprobs
from serving.engine.sequence import Batch
from serving.engine.verification import Verification, match_choice, ratio_test
from serving.local import load_engine
from serving.options import EngineOptions
from tests.support.automaton import AutomatonState
from tests.support.distribution_checks import DISTRIBUTION_CASES, check_distribution
from tests.support.lossless_checks import check_schedule, check_twin, check_up_to_near_ties
from tests.support.rule_checks import check_rule, distribution_pairs
from tests.support.schedules import examples, schedules
from tests.support.table_engine import UndrawingDrafter
from tests.support.table_model import TableModel

pytestmark = pytest.mark.slow
Patch = pytest.MonkeyPatch


def _fails(check: Callable[[Any], None], strategy: Any, count: int, words: str) -> None:
    """The check fails with these words. It ends at the first example that does: some need hundreds, so a
    control has several times the property test's examples, whatever the profile."""
    phases = settings(
        examples(1), max_examples=4 * count, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises(AssertionError, match=words):
        phases(given(strategy)(check))()


def _schedules_fail(words: str, **options: Any) -> None:
    _fails(lambda schedule: check_schedule(schedule, **options), schedules(), 250, words)


def _twins_fail(words: str, **options: Any) -> None:
    twins = schedules(drafter="model", copies="none", swaps=False)
    _fails(lambda schedule: check_twin(schedule, **options), twins, 100, words)


def _distribution_fails(
    name: str, words: str = "do not follow the target's distribution", **options: Any
) -> None:
    with pytest.raises(AssertionError, match=words):
        check_distribution(DISTRIBUTION_CASES[name], **options)


# -- the ratio test ---------------------------------------------------------------------------------


def _no_residual(
    target: Tensor, draft: Tensor, drafted: Tensor, count: Tensor, uniform: Tensor, race: Tensor
) -> Verification:
    right = ratio_test(target, draft, drafted, count, uniform, race)
    plain = draw(target[torch.arange(len(drafted)), right.num_accepted_B].exp(), race)
    return Verification(right.num_accepted_B, plain)


def test_no_residual_is_caught(monkeypatch: Patch) -> None:
    _fails(
        lambda pair: check_rule(_no_residual, pair),
        distribution_pairs(),
        60,
        "does not emit the target's distribution",
    )
    monkeypatch.setattr(round_module, "ratio_test", _no_residual)
    _distribution_fails("drafted")


class _ClaimsNewWeights(ModelDrafter):
    """As if a swap fell between draw and verify: the distributions claimed are those of other weights."""

    def propose(
        self,
        batch: Batch,
        num_draft_tokens_B: list[int],
        noise_BEV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Proposal:
        proposal = super().propose(batch, num_draft_tokens_B, noise_BEV, generator)
        if proposal.logprobs_BGV is None:
            return proposal
        new = TableModel(proposal.logprobs_BGV.shape[-1], seed=77)
        contexts = [
            [*sequence.token_ids, *drafted[:g]]
            for sequence, drafted in zip(batch.sequences, proposal.token_ids_BG.tolist(), strict=True)
            for g in range(len(drafted))
        ]
        logits_NV = torch.stack([new.logits_after(context) for context in contexts])
        logprobs_BGV_ = processed_logprobs(logits_NV.view(proposal.logprobs_BGV.shape), batch.sampling)
        return replace(proposal, logprobs_BGV=logprobs_BGV_)


def test_draft_probs_from_new_weights_are_caught() -> None:
    _distribution_fails("drafted", drafter_class=_ClaimsNewWeights)


def test_another_routes_distribution_is_caught(monkeypatch: Patch) -> None:
    """Tokens are their own route's, the distributions all those of whoever drafted first."""

    def first_distributions_for_all(parts: Sequence[Proposal]) -> Proposal:
        whole = right(parts)
        drawn = next((part for part in parts if part.logprobs_BGV is not None), None)
        if drawn is None or drawn.max_drafted < whole.max_drafted:
            return whole
        return replace(whole, logprobs_BGV=drawn.logprobs_BGV)

    right = round_module.combine
    monkeypatch.setattr(round_module, "combine", first_distributions_for_all)
    _distribution_fails("drafts of three routes in one batch")


def test_another_routes_weights_behind_a_routes_distribution_are_caught(monkeypatch: Patch) -> None:
    """As if two routes shared a runner: one's pass runs on the weights that the other just drafted with, and
    claims its own distributions."""

    def tokens_of_the_first(parts: Sequence[Proposal]) -> Proposal:
        whole = right(parts)
        if parts[0].max_drafted < whole.max_drafted or parts[0].logprobs_BGV is None:
            return whole
        return replace(whole, token_ids_BG=parts[0].token_ids_BG)

    right = round_module.combine
    monkeypatch.setattr(round_module, "combine", tokens_of_the_first)
    _distribution_fails("drafts of three routes in one batch", checks_caches=False)


def test_un_drawing_an_unlikely_token_is_caught() -> None:
    _distribution_fails("drafted", drafter_class=UndrawingDrafter)


def test_noise_that_drew_the_draft_and_decides_again_in_the_ratio_test_is_caught(monkeypatch: Patch) -> None:
    uniforms: list[Tensor] = []
    right = round_module.draw_uniforms

    def remembered(like_BV: Tensor, generator: torch.Generator | None) -> Tensor:
        uniforms.append(right(like_BV, generator))
        return uniforms[-1]

    def shared(like_BV: Tensor, generator: torch.Generator | None) -> Tensor:
        return uniforms[-1] if uniforms and len(uniforms[-1]) == len(like_BV) else right(like_BV, generator)

    monkeypatch.setattr(model_drafter_module, "draw_uniforms", remembered)
    monkeypatch.setattr(round_module, "draw_uniforms", shared)
    _distribution_fails("drafted")


def test_coupled_rows_in_the_ratio_test_are_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(round_module, "merge", lambda rows_B, ratio, choice: ratio)
    _schedules_fail("another text")


# -- processors -------------------------------------------------------------------------------------


def test_a_bonus_token_without_processors_is_caught(monkeypatch: Patch) -> None:
    def processed_but_for_the_bonus(logits_BEV: Tensor, distribution: SamplingMetadata) -> Tensor:
        logprobs_BEV = processed_logprobs(logits_BEV, distribution)
        if logits_BEV.shape[1] > 1:
            logprobs_BEV[:, -1] = logits_BEV[:, -1].log_softmax(-1)
        return logprobs_BEV

    monkeypatch.setattr(round_module, "processed_logprobs", processed_but_for_the_bonus)
    _schedules_fail("is excluded|another text")
    _distribution_fails("cut distributions", "impossible outcome")


def test_a_bonus_token_without_penalties_bias_and_held_back_stops_is_caught(monkeypatch: Patch) -> None:
    def all_but_the_bonus(processing: Any, logits_BXV: Tensor, *context: Any) -> Tensor:
        processed_BXV = right(processing, logits_BXV, *context)
        if logits_BXV.shape[1] == 1:
            return processed_BXV
        return torch.cat([processed_BXV[:, :-1], logits_BXV[:, -1:]], dim=1)

    right = LogitsProcessing.apply
    monkeypatch.setattr(LogitsProcessing, "apply", all_but_the_bonus)
    _schedules_fail("is excluded|another text")
    _distribution_fails("penalties")


def test_penalties_that_forget_the_tokens_drafted_before_are_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(logits_processing_module, "_earlier_counts", lambda *shape: 0.0)
    _schedules_fail("is excluded|another text")
    _distribution_fails("penalties")


def test_penalties_that_forget_the_last_round_are_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(LogitsProcessing, "commit", lambda *emitted: None)
    _schedules_fail("is excluded|another text")


def test_a_constraint_that_does_not_follow_the_drafts_is_caught(monkeypatch: Patch) -> None:
    right = ConstrainedRows._mask
    monkeypatch.setattr(ConstrainedRows, "_mask", lambda rows, row, drafted: right(rows, row, []))
    _schedules_fail("is excluded|another text|the round failed")
    _distribution_fails("a constraint that follows the drafts", "impossible outcome|the round failed")


def test_a_constraint_that_is_not_rolled_back_with_rejected_drafts_is_caught(monkeypatch: Patch) -> None:
    """The state is left behind the longest drafts that it was asked about."""

    def left_behind(state: AutomatonState, drafted: Sequence[int]) -> Any:
        mask = right(state, drafted)
        if mask is not None:
            state._state = state._automaton.after(state._state, drafted)
        return mask

    right = AutomatonState.allowed
    monkeypatch.setattr(AutomatonState, "allowed", left_behind)
    _schedules_fail("is excluded|another text|the round failed")


def test_a_constraint_that_forgets_the_last_round_is_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(AutomatonState, "advance", lambda *emitted: None)
    _schedules_fail("is excluded|another text")
    _distribution_fails("a constraint that follows the drafts", "impossible outcome")


# -- caches -----------------------------------------------------------------------------------------


def _overstate(self: ModelDrafter, num_drafted_B: list[int], num_accepted_B: list[int]) -> None:
    """The last draft was never fed back, but is taken for cached."""
    for slot, (drafted, accepted) in enumerate(zip(num_drafted_B, num_accepted_B, strict=True)):
        if drafted > 0:
            self._cached[slot] = self._lengths[slot] + accepted


def test_catch_up_off_by_one_is_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(ModelDrafter, "observe", _overstate)
    _schedules_fail("another text's keys")
    _twins_fail("another text's keys")
    _twins_fail("was rejected", checks_caches=False)


class _AddsTheMask(TableModel):
    """What eager attention makes of a boolean mask."""

    def attend(self, mask_BTK: Tensor, cached_B1K: Tensor) -> Tensor:
        return mask_BTK + cached_B1K


def test_a_boolean_mask_that_is_added_is_caught() -> None:
    _schedules_fail("another text|another context|is excluded", model_class=_AddsTheMask)


def test_a_slot_that_does_not_move_with_its_sequence_is_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(SlotCache, "move", lambda *moved: None)
    _schedules_fail("another text's keys|another context")
    _schedules_fail("another text|another context|is excluded", checks_caches=False)


def test_a_prefix_that_is_found_by_less_than_its_tokens_is_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(PrefixCache, "_key", lambda cache, parent, tokens: (parent, tokens[:1]))
    _schedules_fail("another text's keys|another context")
    _schedules_fail("another text|another context|is excluded", checks_caches=False)


# -- ends, positions, numerics ----------------------------------------------------------------------


def test_a_stop_id_that_is_overlooked_inside_an_accepted_run_is_caught(monkeypatch: Patch) -> None:
    def only_at_the_end(sequence: Any, emitted: list[int]) -> int:
        sequence.token_ids.extend(emitted[:-1])
        return len(emitted) - 1 + right(sequence, emitted[-1:])

    right = commit_module._append
    monkeypatch.setattr(commit_module, "_append", only_at_the_end)
    _schedules_fail("another text|text after its end")


def test_noise_of_the_wrong_output_position_is_caught(monkeypatch: Patch) -> None:
    right = Batch.output_positions_BX
    monkeypatch.setattr(Batch, "output_positions_BX", lambda batch, count: right(batch, count) + 1)
    _schedules_fail("another text")


def test_accepting_what_the_target_does_not_say_is_caught(
    monkeypatch: Patch, tiny_pair: tuple[str, str]
) -> None:
    def credulous(choice_BE: Tensor, drafted_BG: Tensor, num_drafted_B: Tensor) -> Verification:
        next_B = match_choice(choice_BE, drafted_BG, num_drafted_B).next_token_B
        return Verification(num_drafted_B, next_B)

    monkeypatch.setattr(round_module, "match_choice", credulous)
    _schedules_fail("another text")
    options = EngineOptions(num_draft_tokens=3, num_slots=3, max_seq_len=96)
    with (
        load_engine(*tiny_pair, options, dtype="bfloat16") as drafted,
        load_engine(*tiny_pair, replace(options, num_draft_tokens=0), dtype="bfloat16") as alone,
        pytest.raises(AssertionError, match="where no tie is near"),
    ):
        params = SamplingParams(temperature=0.0, max_tokens=16)
        check_up_to_near_ties(drafted, alone, [[5, 6, 7], [9]], params)
