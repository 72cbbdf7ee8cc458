"""Stopping rules: rows stop one by one, where they should, and the distribution stays the target's."""

import pytest
import torch

from serving.drafters.model_drafter import ModelDrafter
from serving.drafters.stopping import Entropy, LimitOnly, StoppingRule, TopProbability, stopping_rule
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.passes.runner import Runner
from serving.engine.sequence import Batch, Sequence
from tests.support.chi_square import FALSE_ALARM_RATE, fit_p_value
from tests.support.table_engine import table_engine
from tests.support.table_model import TableModel

PROMPT, NUM_TOKENS, SAMPLES = [2, 0, 3, 1, 1, 2, 0], 3, 3000


@pytest.mark.parametrize("rule", [LimitOnly(), TopProbability(0.6), Entropy(0.9)])
@pytest.mark.parametrize("seeded", [False, True], ids=["standard", "coupled"])
def test_every_rule_keeps_the_targets_distribution(rule: StoppingRule, seeded: bool) -> None:
    """The negative control, a drafter that un-draws, is in test_output_distribution."""
    target, draft = TableModel(4, seed=1, sharpness=1.3), TableModel(4, seed=2, sharpness=1.3)
    crowd = {"num_slots": 32, "prefill_chunk_tokens": 64}
    with table_engine(target, draft, num_draft_tokens=3, stopping=rule, **crowd) as engine:
        engine.seed(9)
        params = [
            SamplingParams(max_tokens=NUM_TOKENS, seed=index if seeded else None) for index in range(SAMPLES)
        ]
        generations = engine.generate([PROMPT] * SAMPLES, params)
    outputs = [tuple(generation.output_token_ids) for generation in generations]
    assert fit_p_value(outputs, target.output_distribution(PROMPT, NUM_TOKENS)) > FALSE_ALARM_RATE
    assert sum(generation.num_drafted for generation in generations) > 0


def _num_drafted(rule: StoppingRule, sure: int) -> tuple[int, ...]:
    """Row 0 is sure of its first `sure` draft tokens, row 1 of all."""
    model = TableModel(4, seed=0)
    model.table[:] = torch.tensor([9.0, 0.0, 0.0, 0.0])
    prompts = [[1, 2, 3], [3, 3]]
    unsure = [*prompts[0], *[0] * sure]
    model.table[sum((token + 1) * (index + 1) for index, token in enumerate(unsure)) % 13] = 0.0
    drafter = ModelDrafter(Runner(model, num_slots=2, max_seq_len=32), stopping=rule)
    greedy = SamplingParams(temperature=0.0, max_tokens=20)
    batch = Batch(
        [
            Sequence(GenerationRequest("r", tuple(p), greedy), frozenset(), lambda event: None)
            for p in prompts
        ],
        vocab_size=model.config.vocab_size,
    )
    with torch.inference_mode():
        return drafter.propose(batch, [4, 4], None, None).num_drafted_B


def test_a_row_stops_before_or_after_the_unsure_token_and_its_neighbour_goes_on() -> None:
    for sure in (0, 2):
        assert _num_drafted(LimitOnly(), sure) == (4, 4)
        assert _num_drafted(TopProbability(0.5), sure) == (sure + 1, 4)
        assert _num_drafted(Entropy(0.5), sure) == (sure, 4)


def test_a_rule_that_stops_every_row_at_once_leaves_plain_decoding() -> None:
    target, draft = TableModel(6, seed=1), TableModel(6, seed=2)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    with table_engine(target, draft, num_draft_tokens=3, stopping=Entropy(0.0)) as engine:
        stopped = engine.generate([[1, 2, 3], [4]], params)
        assert engine.stats().draft_disabled_reason == ""
    with table_engine(target, None, num_draft_tokens=0) as alone:
        expected = alone.generate([[1, 2, 3], [4]], params)
    assert [g.output_token_ids for g in stopped] == [g.output_token_ids for g in expected]
    assert sum(g.num_drafted for g in stopped) == 0


def test_a_rule_has_a_name_and_a_threshold() -> None:
    assert isinstance(stopping_rule("controller"), LimitOnly)
    assert stopping_rule("top_prob", 0.7) == TopProbability(0.7)
    assert stopping_rule("entropy") == Entropy()
