"""N-gram lookup: the longest and most recent match, kept up by token and by slot, at work in the engine."""

import pytest
import torch

from buffer.names import MODEL_DRAFTER, NGRAM_DRAFTER
from serving.drafters.ngram_drafter import NgramDrafter
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.core import EngineCore
from serving.engine.cost_table import CostTable
from serving.engine.draft_length import DraftLengthController
from serving.engine.engine import Engine
from serving.engine.passes.runner import Runner
from serving.engine.proposal import COPIED, DrafterVersion, Proposal
from serving.engine.sequence import Batch, Sequence
from serving.local import load_engine
from serving.options import EngineOptions, Speculation
from tests.support.table_engine import StagedTable, table_engine
from tests.support.table_model import TableModel

FLOOR = DrafterVersion(MODEL_DRAFTER, 0)


def _sequence(tokens: list[int]) -> Sequence:
    return Sequence(GenerationRequest("r", tuple(tokens)), frozenset(), lambda event: None)


def _drafts(drafter: NgramDrafter, sequences: list[Sequence], count: int = 3) -> list[list[int]]:
    proposal = drafter.propose(Batch(sequences, vocab_size=1000), [count] * len(sequences), None, None)
    return [
        row[:num].tolist() for row, num in zip(proposal.token_ids_BG, proposal.num_drafted_B, strict=True)
    ]


@pytest.mark.parametrize(
    ("tokens", "expected", "size"),
    [
        ([1, 2, 3, 9, 1, 2], [3, 9, 1], 2),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2], 2),  # the most recent
        ([5, 1, 2, 3, 9, 1, 2, 4, 5, 1, 2], [3, 9, 1], 3),  # the longest, though it is older
        ([7, 8, 7, 8, 7], [8, 7, 8], 3),  # a copy that reaches the end goes on with itself
        ([4, 4, 4], [4, 4, 4], 2),
        ([1, 2, 3, 4], [], 0),
        ([6], [], 0),
    ],
)
def test_what_followed_the_longest_latest_match_is_copied(
    tokens: list[int], expected: list[int], size: int
) -> None:
    drafter, sequence = NgramDrafter(1), _sequence(tokens)
    assert drafter.matches(Batch([sequence], vocab_size=1000)) == [size]
    assert _drafts(drafter, [sequence]) == [expected]


def test_tokens_added_one_by_one_give_what_a_fresh_index_gives() -> None:
    text = [(index * index // 3) % 5 for index in range(80)]
    grown, kept = _sequence(text[:1]), NgramDrafter(1)
    for end in range(1, len(text)):
        assert _drafts(kept, [grown]) == _drafts(NgramDrafter(1), [_sequence(text[:end])])
        grown.token_ids.append(text[end])


def test_state_moves_with_its_slot_and_is_gone_with_its_owner() -> None:
    drafter = NgramDrafter(3)
    first, second = _sequence([1, 2, 3, 1, 2]), _sequence([5, 6, 7, 5, 6])
    assert _drafts(drafter, [first, second], 1) == [[3], [7]]
    drafter.move(1, 0)
    assert _drafts(drafter, [second, _sequence([8, 9, 5, 6])], 1) == [[7], []]
    drafter.clear(0)
    assert _drafts(drafter, [_sequence([1, 1, 5, 6])], 1) == [[]]
    drafter.reset()
    assert _drafts(drafter, [second], 1) == [[7]]


def test_greedy_and_seeded_text_is_the_same_with_copying_and_without() -> None:
    target = TableModel(3, seed=4, sharpness=2.0)
    prompts = [[1, 2, 0, 1, 2], [0, 0, 1], [2]]
    params = [
        SamplingParams(temperature=0.0, max_tokens=30),
        SamplingParams(max_tokens=30, seed=3),
        SamplingParams(temperature=0.0, max_tokens=30, min_tokens=8, stop_token_ids=(1,)),
    ]
    with table_engine(target, None, num_draft_tokens=0, num_slots=2) as alone:
        expected = [generation.output_token_ids for generation in alone.generate(prompts, params)]
    with table_engine(target, None, num_draft_tokens=4, num_slots=2, ngram=NgramDrafter(2)) as engine:
        generations = engine.generate(prompts, params)
        counts = engine.stats().counts
    assert [generation.output_token_ids for generation in generations] == expected
    assert counts[COPIED].num_accepted > 0
    assert FLOOR not in counts or counts[FLOOR].num_drafted == 0
    assert {span.draft_version for generation in generations for span in generation.draft_versions} == {0}


def test_a_captured_round_that_copied_names_no_draft() -> None:
    target = TableModel(3, seed=4, sharpness=2.0)
    with table_engine(target, None, num_draft_tokens=3, ngram=NgramDrafter(4)) as engine:
        request = GenerationRequest("r", (1, 2, 0, 1, 2), SamplingParams(max_tokens=30), capture=True)
        rounds = engine.submit(request).result(30).captured_rounds
    copied = [trace for trace in rounds if len(trace.drafted_token_ids_G)]
    named = {(trace.drafter_id, trace.draft_route, trace.draft_version) for trace in copied}
    assert named == {(NGRAM_DRAFTER, None, None)}
    assert all((trace.drafted_draft_logprobs_G == 0).all() for trace in copied)
    rest = [trace for trace in rounds if not len(trace.drafted_token_ids_G)]
    assert all((trace.drafter_id, trace.draft_version) == FLOOR for trace in rest)


@pytest.mark.parametrize(
    ("speculation", "drafters", "knows_the_draft"),
    [("auto", {FLOOR}, True), ("model", {FLOOR}, True), ("ngram", {COPIED}, False), ("off", set(), False)],
)
def test_an_operator_chooses_who_drafts(
    tiny_pair: tuple[str, str], speculation: Speculation, drafters: set[DrafterVersion], knows_the_draft: bool
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    with load_engine(
        *tiny_pair,
        options=EngineOptions(num_slots=1, max_seq_len=128, num_draft_tokens=3, speculation=speculation),
    ) as engine:
        engine.generate([[5, 6, 5, 6, 5]], params)
        counts = engine.stats().counts
        assert (engine.drafts is not None) is knows_the_draft
    assert {drafter for drafter, counters in counts.items() if counters.num_drafted} == drafters


def test_copying_takes_over_from_a_draft_that_broke_until_another_is_swapped_in() -> None:
    target, draft = TableModel(3, seed=4, sharpness=2.0), TableModel(3, seed=5)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    with table_engine(target, draft, num_draft_tokens=2, ngram=NgramDrafter(4)) as engine:
        expected = engine.generate([[1, 2, 0, 1, 2]], params)[0].output_token_ids
        assert COPIED not in engine.stats().counts
        engine.swap(StagedTable(1, draft, torch.full_like(draft.table, torch.nan))).result(5)
        assert engine.generate([[1, 2, 0, 1, 2]] * 2, params)[1].output_token_ids == expected
        copied = engine.stats().counts[COPIED].num_accepted
        assert copied > 0 and engine.stats().draft_disabled_reason
        engine.swap(StagedTable(2, draft, TableModel(3, seed=5).table)).result(5)
        assert engine.generate([[1, 2, 0, 1, 2]], params)[0].output_token_ids == expected
        assert engine.stats().counts[COPIED].num_accepted == copied
        assert engine.stats().counts[DrafterVersion(MODEL_DRAFTER, 2)].num_drafted > 0


class _RaisingCopier(NgramDrafter):
    def propose(self, *args: object) -> Proposal:
        raise RuntimeError("injected")


def test_a_copier_that_raises_costs_no_answer_and_no_draft_its_place() -> None:
    target = TableModel(3, seed=4, sharpness=2.0)
    with table_engine(target, None, num_draft_tokens=2, ngram=_RaisingCopier(4)) as engine:
        [generation] = engine.generate([[1, 2, 0, 1, 2]], SamplingParams(max_tokens=9))
        assert generation.finish_reason == "length"
        assert engine.stats().draft_disabled_reason == ""


def test_the_free_controller_copies_a_text_that_repeats_itself() -> None:
    target = TableModel(3, seed=4)
    target.table[:, 1] = 9.0
    costs = CostTable((1, 2), (1, 9), ((1.0, 2.0), (1.5, 3.0)), (0.0, 0.0), (0.0, 0.0))
    runner, controller = Runner(target, num_slots=2, max_seq_len=128), DraftLengthController(costs)
    with Engine(EngineCore(runner, None, controller=controller, ngram=NgramDrafter(2))) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=100)
        [generation] = engine.generate([[2, 0]], params)
    assert generation.output_token_ids == [1] * 100
    assert generation.num_rounds < 25
