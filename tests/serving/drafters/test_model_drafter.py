"""What a model drafts is its own text, and each token is fed to it once, whoever lags, leaves or moves."""

from collections.abc import Sequence as SequenceOf
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.drafters.model_drafter import ModelDrafter
from serving.drafters.stopping import StoppingRule
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.passes.prefix_cache import PrefixCache
from serving.engine.passes.runner import Runner
from serving.engine.proposal import Proposal
from serving.engine.sequence import Batch, Sequence
from tests.support.table_model import TableModel
from tests.support.tiny_models import tiny_model

VOCAB, MAX_LEN, NUM_SLOTS = 11, 64, 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=40)
SHORT, OTHER, LONG = [1, 2, 3], [4, 5, 6, 7, 8], [number % VOCAB for number in range(20)]

Fed = list[tuple[int, int]]
"""(position, token) that one row was fed, padding left out."""


class WatchedTable(TableModel):
    """Remembers what each pass feeds each row."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(VOCAB, seed=seed, sharpness=2.0)
        self.passes: list[list[Fed]] = []

    def forward(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> SimpleNamespace:
        rows = zip(position_ids.tolist(), input_ids.tolist(), strict=True)
        padding = MAX_LEN - 1
        self.passes.append(
            [[(place, token) for place, token in zip(*row, strict=True) if place != padding] for row in rows]
        )
        return super().forward(input_ids, position_ids, *args, **options)

    def taken(self) -> list[list[Fed]]:
        """The passes since the last call."""
        found, self.passes = self.passes, []
        return found

    def greedy(self, context: SequenceOf[int], num_tokens: int) -> list[int]:
        text = list(context)
        for _ in range(num_tokens):
            text.append(int(self.logits_after(text).argmax()))
        return text[len(context) :]


@pytest.fixture
def model() -> WatchedTable:
    return WatchedTable()


def drafter_of(model: torch.nn.Module, **options: Any) -> ModelDrafter:
    return ModelDrafter(Runner(model, num_slots=NUM_SLOTS, max_seq_len=MAX_LEN), **options)


def sequence(prompt: SequenceOf[int], sampling: SamplingParams = GREEDY) -> Sequence:
    return Sequence(GenerationRequest("r", tuple(prompt), sampling), frozenset(), lambda event: None)


@torch.inference_mode()
def propose(
    drafter: ModelDrafter, sequences: list[Sequence], counts: list[int], noise_BEV: Tensor | None = None
) -> Proposal:
    batch = Batch(sequences, vocab_size=drafter.runner.vocab_size)
    return drafter.propose(batch, counts, noise_BEV, torch.Generator().manual_seed(0))


def play_round(
    drafter: ModelDrafter, sequences: list[Sequence], counts: list[int], num_accepted: SequenceOf[int]
) -> Proposal:
    """A round whose target keeps so many drafts of each row and adds token 0."""
    proposal = propose(drafter, sequences, counts)
    drafter.observe(list(proposal.num_drafted_B), list(num_accepted))
    drafts = proposal.token_ids_BG.tolist()
    for row, accepted in zip(range(len(sequences)), num_accepted, strict=True):
        sequences[row].token_ids += [*drafts[row][:accepted], 0]
    return proposal


def drafts_of(proposal: Proposal) -> list[list[int]]:
    return [
        tokens[:count]
        for tokens, count in zip(proposal.token_ids_BG.tolist(), proposal.num_drafted_B, strict=True)
    ]


def fed(one: Sequence, start: int, end: int | None = None) -> Fed:
    """Its tokens from `start` on, as a pass feeds them."""
    return list(enumerate(one.token_ids))[start:end]


# -- what is drafted --------------------------------------------------------------------------------


def test_greedy_drafts_are_the_models_own_text_and_certain(model: WatchedTable) -> None:
    rows = [sequence(SHORT), sequence(OTHER), sequence(LONG)]
    drafter = drafter_of(model, draft_version=6)
    proposal = propose(drafter, rows, [4, 2, 3])
    assert drafts_of(proposal) == [
        model.greedy(row.token_ids, n) for row, n in zip(rows, [4, 2, 3], strict=True)
    ]
    assert (proposal.draft_version, proposal.num_drafted_B, proposal.logprobs_BGV) == (6, (4, 2, 3), None)
    assert not proposal.token_logprobs_BG.any()


def test_a_transformer_drafts_its_argmax_text_through_lags_and_rejections() -> None:
    torch.manual_seed(1)
    llama = tiny_model("llama", 1, 32).eval()

    @torch.inference_mode()
    def greedy(context: list[int], num_tokens: int) -> list[int]:
        text = list(context)
        for _ in range(num_tokens):
            text.append(int(llama(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        return text[len(context) :]

    drafter, rows = drafter_of(llama, chunk_tokens=6), [sequence(SHORT), sequence(LONG)]
    for accepted in ([3, 0], [1, 0], [0, 0], [2, 1], [3, 3], [0, 2]):
        texts = [list(row.token_ids) for row in rows]
        proposal = play_round(drafter, rows, [3, 3], accepted)
        for text, drafted in zip(texts, drafts_of(proposal), strict=True):
            assert drafted == greedy(text, len(drafted))
    assert proposal.num_drafted_B == (3, 3)


@pytest.mark.parametrize("seed", [None, 5], ids=["standard", "coupled"])
def test_sampled_drafts_come_with_the_distribution_they_were_drawn_from(
    model: WatchedTable, seed: int | None
) -> None:
    sampling = SamplingParams(temperature=0.7, seed=seed, max_tokens=40)
    rows = [sequence(SHORT, sampling), sequence(OTHER, sampling)]
    noise_BEV = torch.randn((2, 4, VOCAB), generator=torch.Generator().manual_seed(3))
    proposal = propose(drafter_of(model), rows, [3, 3], None if seed is None else noise_BEV)
    assert proposal.logprobs_BGV is not None
    for row, drafted in enumerate(drafts_of(proposal)):
        for position, token in enumerate(drafted):
            logits_V = model.logits_after([*rows[row].token_ids, *drafted[:position]])
            expected_V = torch.log_softmax(logits_V / 0.7, -1)
            torch.testing.assert_close(proposal.logprobs_BGV[row, position], expected_V)
            torch.testing.assert_close(proposal.token_logprobs_BG[row, position], expected_V[token])
            if seed is not None:
                assert token == int((expected_V + noise_BEV[row, position]).argmax())


def test_a_row_that_is_asked_for_nothing_drafts_nothing_and_is_fed_nothing(model: WatchedTable) -> None:
    drafter, rows = drafter_of(model), [sequence(SHORT), sequence(OTHER)]
    proposal = propose(drafter, rows, [0, 2])
    assert proposal.num_drafted_B == (0, 2)
    assert [row_fed for row_fed, _ in model.taken()] == [[], []]
    drafter.observe([0, 2], [0, 0])
    propose(drafter, rows, [1, 0])
    assert model.taken() == [[fed(rows[0], 0), []]], "all of it was missing still"


# -- what is fed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_what_was_drafted_and_accepted_is_not_fed_again(model: WatchedTable, accepted: int) -> None:
    """Of three drafts two were fed back: after the third was accepted it is missing beside the bonus."""
    drafter, rows = drafter_of(model), [sequence(SHORT)]
    play_round(drafter, rows, [3], [accepted])
    model.taken()
    proposal = propose(drafter, rows, [1])
    num_missing = 2 if accepted == 3 else 1
    assert model.taken() == [[fed(rows[0], len(rows[0].token_ids) - num_missing)]]
    assert drafts_of(proposal) == [model.greedy(rows[0].token_ids, 1)]


@pytest.mark.parametrize(("lag", "passes"), [(8, [8]), (9, [8, 1])])
def test_a_short_lag_is_made_up_in_the_pass_that_drafts_and_a_longer_one_before_it(
    model: WatchedTable, lag: int, passes: list[int]
) -> None:
    rows = [sequence(LONG[:lag])]
    proposal = propose(drafter_of(model), rows, [1])
    assert [len(row_fed) for [row_fed] in model.taken()] == passes
    assert (proposal.num_drafted_B, proposal.num_chunks) == ((1,), len(passes) - 1)


def test_a_long_lag_is_made_up_by_a_chunk_a_round_while_the_neighbour_drafts(model: WatchedTable) -> None:
    drafter, rows = drafter_of(model, chunk_tokens=5), [sequence(LONG), sequence(SHORT)]
    for start in (0, 5, 10):
        drafted = model.greedy(rows[1].token_ids, 2)
        proposal = play_round(drafter, rows, [2, 2], [0, 0])
        assert model.taken()[0] == [fed(rows[0], start, start + 5)]
        assert (proposal.num_drafted_B, proposal.num_chunks) == ((0, 2), 1)
        assert drafts_of(proposal)[1] == drafted
    proposal = propose(drafter, rows, [2, 2])
    assert model.taken()[0] == [fed(rows[0], 15), fed(rows[1], 5)]
    assert drafts_of(proposal) == [model.greedy(row.token_ids, 2) for row in rows]
    assert proposal.num_chunks == 0


def test_two_rows_a_round_catch_up_and_the_others_wait_their_turn(model: WatchedTable) -> None:
    drafter, rows = drafter_of(model), [sequence([*LONG, token]) for token in range(4)]
    first = play_round(drafter, rows, [2] * 4, [0] * 4)
    assert (first.num_drafted_B, first.num_chunks) == ((2, 2, 0, 0), 2)
    second = propose(drafter, rows, [2] * 4)
    assert (second.num_drafted_B, second.num_chunks) == ((2, 2, 2, 2), 2)
    assert drafts_of(second) == [model.greedy(row.token_ids, 2) for row in rows]


def test_a_round_of_chunks_alone_says_that_it_made_them(model: WatchedTable) -> None:
    proposal = propose(drafter_of(model, chunk_tokens=5), [sequence(LONG), sequence(LONG)], [2, 2])
    assert (proposal.num_drafted_B, proposal.max_drafted, proposal.num_chunks) == ((0, 0), 0, 2)


# -- slots ------------------------------------------------------------------------------------------


def warm(drafter: ModelDrafter, model: WatchedTable, *prompts: list[int]) -> list[Sequence]:
    """Rows after one round of two drafts, both rejected."""
    rows = [sequence(prompt) for prompt in prompts]
    play_round(drafter, rows, [2] * len(rows), [0] * len(rows))
    model.taken()
    return rows


def test_a_new_owner_of_a_slot_is_fed_whole_and_finds_nothing_of_the_last(model: WatchedTable) -> None:
    drafter = drafter_of(model)
    rows = warm(drafter, model, SHORT, OTHER)
    drafter.clear(1)
    assert not drafter.runner.cache.columns(1, 0, MAX_LEN + 1).any()
    rows[1] = sequence([9, 9])
    proposal = propose(drafter, rows, [1, 1])
    assert model.taken() == [[fed(rows[0], 3), fed(rows[1], 0)]]
    assert drafts_of(proposal) == [model.greedy(row.token_ids, 1) for row in rows]


def test_a_sequence_that_moves_takes_along_what_it_was_fed(model: WatchedTable) -> None:
    drafter = drafter_of(model)
    rows = warm(drafter, model, SHORT, OTHER, [7, 7])
    drafter.move(2, 0)
    rows = [rows[2], rows[1]]
    proposal = propose(drafter, rows, [2, 2])
    assert model.taken()[0] == [fed(rows[0], 2), fed(rows[1], 5)]
    assert drafts_of(proposal) == [model.greedy(row.token_ids, 2) for row in rows]


def test_after_a_reset_everything_is_fed_again_to_clean_slots(model: WatchedTable) -> None:
    drafter = drafter_of(model)
    rows = warm(drafter, model, SHORT, OTHER)
    drafter.refresh(1)
    drafter.reset()
    assert not drafter.runner.cache.kv_L2SHTD.any()
    proposal = play_round(drafter, rows, [1, 1], [0, 0])
    assert model.taken() == [[fed(rows[0], 0, 4), fed(rows[1], 0, 6)]]
    assert drafts_of(proposal)[0] == model.greedy(rows[0].token_ids[:-1], 1)
    propose(drafter, rows, [1, 1])
    assert model.taken() == [[fed(rows[0], 4), fed(rows[1], 6)]], "nothing is stale any more"


def starts(model: WatchedTable) -> list[int]:
    """First position that each row was fed by the last round's first pass."""
    return [row_fed[0][0] for row_fed in model.taken()[0]]


def test_new_weights_are_named_at_once_and_old_columns_renewed_one_slot_a_round(model: WatchedTable) -> None:
    drafter = drafter_of(model)
    rows = warm(drafter, model, SHORT, OTHER)
    drafter.refresh(7)
    renewed = []
    for _ in range(3):
        lengths = [len(row.token_ids) for row in rows]
        assert play_round(drafter, rows, [1, 1], [0, 0]).draft_version == 7
        found = starts(model)
        renewed.append([row for row in (0, 1) if found[row] == 0])
        assert all(found[row] in (0, lengths[row] - 1) for row in (0, 1))
    assert sorted(renewed[:2]) == [[0], [1]] and renewed[2] == []


def test_a_slot_that_no_single_chunk_renews_keeps_its_columns(model: WatchedTable) -> None:
    drafter = drafter_of(model, chunk_tokens=4)
    rows = warm(drafter, model, SHORT, OTHER)
    drafter.refresh(7)
    for _ in range(2):
        play_round(drafter, rows, [1, 1], [0, 0])
        assert starts(model)[1] != 0


@pytest.mark.parametrize("moves", [True, False])
def test_a_stale_slot_stays_so_where_it_moves_and_not_where_it_is_cleared(
    model: WatchedTable, moves: bool
) -> None:
    drafter = drafter_of(model)
    rows = warm(drafter, model, [8] * 4, OTHER)
    drafter.refresh(7)
    drafter.clear(0)
    if moves:
        drafter.move(1, 0)
        rows = [rows[1]]
    else:
        rows = [sequence(SHORT)]
        play_round(drafter, rows, [1], [0])
        model.taken()
    propose(drafter, rows, [1])
    assert (starts(model) == [0]) == moves


def test_the_new_owner_of_a_stale_slot_is_fed_once(model: WatchedTable) -> None:
    drafter = drafter_of(model)
    rows = warm(drafter, model, SHORT, OTHER, [9, 9])
    drafter.refresh(7)
    for slot in (1, 2):
        drafter.clear(slot)
        rows[slot] = sequence([slot, slot])
    fed_whole = 0
    for _ in range(4):
        play_round(drafter, rows, [1] * 3, [0] * 3)
        fed_whole += sum(start == 0 for start in starts(model)[1:])
    assert fed_whole == 2


# -- stopping and breaking --------------------------------------------------------------------------


class StopsRowZero(StoppingRule):
    """Before or after its draw number `draw`, counted from 0."""

    def __init__(self, draw: int, *, before: bool) -> None:
        self._left, self._before = draw, before

    def before_draw(self, logits_BV: Tensor) -> list[bool] | None:
        return self._asked(len(logits_BV)) if self._before else None

    def after_draw(self, logits_BV: Tensor) -> list[bool] | None:
        return None if self._before else self._asked(len(logits_BV))

    def _asked(self, num_rows: int) -> list[bool]:
        self._left -= 1
        return [self._left < 0, *[False] * (num_rows - 1)]


@pytest.mark.parametrize(("before", "num_drafted"), [(True, 1), (False, 2)])
def test_a_row_that_stops_is_fed_no_more_and_its_neighbour_drafts_on(
    model: WatchedTable, before: bool, num_drafted: int
) -> None:
    rows = [sequence(SHORT), sequence(OTHER)]
    drafter = drafter_of(model, stopping=StopsRowZero(1, before=before))
    proposal = propose(drafter, rows, [4, 4])
    assert proposal.num_drafted_B == (num_drafted, 4)
    assert drafts_of(proposal) == [model.greedy(SHORT, num_drafted), model.greedy(OTHER, 4)]
    drafter.observe(list(proposal.num_drafted_B), [num_drafted, 0])
    rows[0].token_ids += [*drafts_of(proposal)[0], 0]
    model.taken()
    propose(drafter, rows, [1, 0])
    assert model.taken()[0][0] == fed(rows[0], len(rows[0].token_ids) - 2)


def test_a_rule_that_stops_all_rows_before_the_first_draw_leaves_an_empty_proposal(
    model: WatchedTable,
) -> None:
    drafter = drafter_of(model, stopping=StopsRowZero(0, before=True), draft_version=3)
    proposal = propose(drafter, [sequence(LONG)], [4])
    assert (proposal.num_drafted_B, proposal.max_drafted) == ((0,), 0)
    assert (proposal.num_chunks, proposal.draft_version) == (1, 3)
    assert len(model.taken()) == 2, "nothing was fed after the chunk and the first pass"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported_in_their_row_alone(
    model: WatchedTable, temperature: float
) -> None:
    sampling = SamplingParams(temperature=temperature, max_tokens=40)
    rows = [sequence(SHORT, sampling), sequence(OTHER, sampling)]
    broken = sum((token + 1) * (place + 1) for place, token in enumerate(SHORT)) % len(model.table)
    model.table[broken] = torch.nan
    proposal = propose(drafter_of(model), rows, [1, 1])
    reported = proposal.token_logprobs_BG.isnan()[:, 0].tolist()
    assert reported == [True, False]
    assert proposal.token_logprobs_BG[1].isfinite().all()


def test_a_draft_that_gives_no_allowed_token_is_sound_and_says_so(model: WatchedTable) -> None:
    model.table[:, 2] = -torch.inf
    only = SamplingParams(temperature=0.0, max_tokens=40, allowed_token_ids=(2,))
    proposal = propose(drafter_of(model), [sequence(SHORT, only), sequence(OTHER)], [1, 1])
    assert proposal.token_logprobs_BG[:, 0].tolist() == [-torch.inf, 0.0]


# -- beginnings of prompts that were read before ----------------------------------------------------


LONG_PROMPT = [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0]


def remembering(model: torch.nn.Module, **options: Any) -> ModelDrafter:
    runner = Runner(model, num_slots=NUM_SLOTS, max_seq_len=MAX_LEN)
    prefixes = PrefixCache(runner.cache, max_bytes=10**6, block_tokens=4)
    return ModelDrafter(runner, prefix_cache=prefixes, **options)


def test_a_prompt_read_before_is_not_read_again_in_any_slot(model: WatchedTable) -> None:
    drafter = remembering(model)
    first, second = sequence(LONG_PROMPT), sequence([*LONG_PROMPT, 1, 1])
    expected = model.greedy(second.token_ids, 3)
    play_round(drafter, [first], [3], [0])
    drafter.clear(1)
    model.passes.clear()
    proposal = propose(drafter, [first, second], [0, 3])
    assert drafts_of(proposal)[1] == expected
    num_fed = sum(len(row) for fed_rows in model.passes for row in fed_rows)
    assert num_fed < len(LONG_PROMPT), "16 of its 19 tokens were copied"


def test_no_prompt_of_other_weights_is_reused(model: WatchedTable) -> None:
    drafter = remembering(model)
    play_round(drafter, [sequence(LONG_PROMPT)], [3], [0])
    for forget in (lambda: drafter.refresh(7), drafter.reset):
        assert drafter.prefix_cache is not None and drafter.prefix_cache.stats().num_bytes > 0
        forget()
        assert drafter.prefix_cache.stats().num_bytes == 0
        drafter.clear(0)
        play_round(drafter, [sequence(LONG_PROMPT)], [3], [0])


def caught_up(drafter: ModelDrafter, text: list[int]) -> list[int]:
    """Its first drafts, after as many rounds as its chunks take."""
    for _ in range(20):
        if drafts := drafts_of(propose(drafter, [sequence(text)], [4]))[0]:
            return drafts
    raise AssertionError("nothing was drafted")


def test_columns_of_other_weights_are_not_kept_as_those_of_the_new(model: WatchedTable) -> None:
    """A prompt too long to be recomputed in one chunk goes on with what the old weights cached."""
    drafter = remembering(model, chunk_tokens=4)
    text = sequence([*LONG_PROMPT, *LONG_PROMPT])
    for _ in range(3):
        propose(drafter, [text], [3])
    drafter.refresh(7)
    while not drafts_of(propose(drafter, [text], [3]))[0]:
        pass
    assert drafter.prefix_cache is not None and drafter.prefix_cache.stats().num_bytes == 0


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_reused_prompts_give_a_transformer_the_drafts_it_gives_anyway(arch: str) -> None:
    torch.manual_seed(1)
    llama = tiny_model(arch, 2, 32).eval()  # type: ignore[arg-type]
    plain, drafter = drafter_of(llama, chunk_tokens=6), remembering(llama, chunk_tokens=6)
    for turn in range(3):
        text = [token % 32 for token in range(20 + 7 * turn)]
        for each in (plain, drafter):
            each.clear(0)
        drafted = [caught_up(each, text) for each in (plain, drafter)]
        assert drafted[0] == drafted[1]
    assert drafter.prefix_cache is not None and drafter.prefix_cache.stats().num_hit_tokens > 0
