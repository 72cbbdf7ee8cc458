"""The core, step by step and without a thread: who joins, leaves and is swapped between two rounds; and a
round that fails ends what was in it and nothing else."""

from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from serving.drafters.model_drafter import ModelDrafter
from serving.engine import Generation, GenerationRequest, SamplingParams, TokenEvent
from serving.engine.acceptance_estimate import MODEL
from serving.engine.core import EngineCore
from serving.engine.cost_table import CostTable
from serving.engine.draft_length import DraftLengthController
from serving.engine.draft_pool import BrokenDraftError, Staged
from serving.engine.passes.prefix_cache import BLOCK_TOKENS, PrefixCache
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPass
from serving.engine.sequence import Sequence
from tests.support.table_engine import MAX_LEN, StagedTable
from tests.support.table_model import TableModel
from tests.support.tiny_models import tiny_model

VOCAB = 17
PROMPTS = ([1, 2, 3], [4, 5, 6, 7], [8], [9, 10, 11, 12, 13])


class FailingTable(TableModel):
    """Raises in its passes over this many rows at once."""

    rows_that_fail = 0
    prompt_that_fails = -1
    """First token of a prompt."""

    def forward(self, input_ids: Tensor, *args: Any, **options: Any) -> SimpleNamespace:
        if len(input_ids) == self.rows_that_fail or int(input_ids[0, 0]) == self.prompt_that_fails:
            raise ArithmeticError("out of memory, say")
        return super().forward(input_ids, *args, **options)


@pytest.fixture
def target() -> FailingTable:
    return FailingTable(VOCAB, seed=1, sharpness=2.0)


def wrong(target: TableModel) -> TableModel:
    """A draft that never says what the target would."""
    model = deepcopy(target)
    model.table.copy_(-target.table)
    return model


def core_of(
    target: nn.Module,
    draft: nn.Module | None = None,
    *,
    num_slots: int = 4,
    chunk_tokens: int = 64,
    costs: CostTable | None = None,
    floor: Callable[[], Staged] | None = None,
    has_prefix_cache: bool = False,
) -> EngineCore:
    """Greedy texts of its table; draft length 2."""
    runner = Runner(target, num_slots=num_slots, max_seq_len=MAX_LEN)
    prefix_cache = PrefixCache(runner.cache, max_bytes=1 << 20) if has_prefix_cache else None
    return EngineCore(
        runner,
        drafter_of(draft, num_slots) if draft is not None else None,
        controller=DraftLengthController(None, fixed=2),
        costs=costs,
        floor=floor,
        prefill_chunk_tokens=chunk_tokens,
        prefix_cache=prefix_cache,
    )


def drafter_of(model: nn.Module, num_slots: int = 4) -> ModelDrafter:
    return ModelDrafter(Runner(model, num_slots=num_slots, max_seq_len=MAX_LEN))


class Caller:
    """Asks a core, and keeps what comes back."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.events: dict[str, list[TokenEvent]] = {}
        self.sequences: dict[str, Sequence] = {}

    def ask(self, name: str, prompt: list[int], *, num_tokens: int = 6, route: str | None = None) -> Sequence:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens)
        events = self.events[name] = []
        request = GenerationRequest(name, tuple(prompt), sampling, route=route)
        found = self.sequences[name] = Sequence(request, frozenset(), events.append)
        self.core.add(found)
        return found

    def finish(self) -> None:
        while self.core.has_work:
            self.core.step()

    def tokens(self, name: str) -> list[int]:
        return [token for event in self.events[name] for token in event.token_ids]

    def generation(self, name: str) -> Generation:
        """It was the last event's, and no other's."""
        *others, last = self.events[name]
        assert last.generation is not None
        assert all(event.generation is None for event in others)
        return last.generation


def text(target: TableModel, prompt: list[int], num_tokens: int = 6) -> list[int]:
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(int(target.logits_after(context).argmax()))
    return context[len(prompt) :]


# -- joining ----------------------------------------------------------------------------------------


def test_those_that_join_together_run_together_and_say_what_the_target_says(target: FailingTable) -> None:
    core = core_of(target, wrong(target))
    caller = Caller(core)
    for name, prompt in zip("abcd", PROMPTS, strict=True):
        caller.ask(name, prompt)
    assert core.stats().num_waiting == 4
    core.step()
    assert {name: len(events) for name, events in caller.events.items()} == dict.fromkeys("abcd", 1)
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_slots) == (4, 0, 4)
    assert stats.num_cached_tokens == sum(map(len, PROMPTS)) and stats.num_output_tokens == 4
    caller.finish()
    for name, prompt in zip("abcd", PROMPTS, strict=True):
        assert caller.tokens(name) == text(target, prompt) == caller.generation(name).output_token_ids
        assert caller.generation(name).finish_reason == "length"
    stats = core.stats()
    assert (stats.num_running, stats.num_prompt_tokens, stats.num_output_tokens) == (0, 13, 24)
    assert stats.mean_batch_size == 4


def test_a_long_prompt_takes_a_chunk_a_step_and_stops_nobody(target: FailingTable) -> None:
    core = core_of(target, chunk_tokens=3)
    caller = Caller(core)
    caller.ask("short", [1, 2], num_tokens=20)
    core.step()
    long = caller.ask("long", list(range(10)))
    for num_steps in (1, 2, 3):
        assert not caller.events["long"]
        core.step()
        assert long.num_cached == 3 * num_steps + (num_steps == 3)
        assert len(caller.events["short"]) == 1 + num_steps
    assert len(caller.events["long"]) == 1, "it took part in the round after its last chunk"
    caller.finish()
    assert caller.tokens("long") == text(target, list(range(10)))
    assert caller.tokens("short") == text(target, [1, 2], 20)


def test_more_than_there_are_slots_wait_their_turn_and_lose_no_word(target: FailingTable) -> None:
    core = core_of(target, wrong(target), num_slots=2)
    caller, begun = Caller(core), list[str]()
    names = [f"{number}" for number in range(7)]
    for number, name in enumerate(names):
        caller.ask(name, PROMPTS[number % 4], num_tokens=2 + 3 * (number % 3))
    while core.has_work:
        core.step()
        assert core.stats().num_running <= 2
        begun += [name for name in names if name not in begun and caller.events[name]]
    assert begun == names, "first come, first served"
    for number, name in enumerate(names):
        assert caller.tokens(name) == text(target, PROMPTS[number % 4], 2 + 3 * (number % 3))


# -- leaving ----------------------------------------------------------------------------------------


def test_who_is_cancelled_leaves_before_the_next_round_with_what_it_has(target: FailingTable) -> None:
    core = core_of(target, wrong(target))
    caller = Caller(core)
    for name, prompt in zip("abc", PROMPTS, strict=False):
        caller.ask(name, prompt)
    core.step()
    core.step()
    core.cancel(caller.sequences["a"])
    core.step()
    cancelled = caller.generation("a")
    assert cancelled.finish_reason == "cancelled"
    assert cancelled.output_token_ids == text(target, PROMPTS[0], 2) == caller.tokens("a")
    assert core.stats().num_running == 2 and len(caller.events["b"]) == 3
    assert core.stats().num_output_tokens == 3 + 3 + 2, "nothing was computed for who had left"
    caller.finish()
    for name, prompt in zip("bc", PROMPTS[1:3], strict=True):
        assert caller.tokens(name) == text(target, prompt), "one of them moved into the slot that was left"


def test_a_sequence_that_moves_to_another_slot_is_drafted_for_as_before(target: FailingTable) -> None:
    core = core_of(target, deepcopy(target))
    caller = Caller(core)
    for name, prompt in zip("abc", PROMPTS, strict=False):
        caller.ask(name, prompt, num_tokens=20)
    core.step()
    core.cancel(caller.sequences["a"])
    caller.finish()
    for name in "bc":
        assert caller.generation(name).num_accepted == caller.generation(name).num_attempted > 8


def test_who_waits_or_is_in_prefill_can_leave_too(target: FailingTable) -> None:
    core = core_of(target, num_slots=2, chunk_tokens=2)
    caller = Caller(core)
    caller.ask("running", [1])
    core.step()
    caller.ask("prefilling", list(range(9)))
    core.step()
    caller.ask("waiting", [2, 3])
    caller.ask("next", [4, 5])
    for name in ("prefilling", "waiting"):
        core.cancel(caller.sequences[name])
    caller.finish()
    for name in ("prefilling", "waiting"):
        assert (caller.generation(name).finish_reason, caller.tokens(name)) == ("cancelled", [])
    assert caller.tokens("running") == text(target, [1])
    assert caller.tokens("next") == text(target, [4, 5])


def test_an_end_that_came_first_stands(target: FailingTable) -> None:
    core = core_of(target)
    caller = Caller(core)
    sequence = caller.ask("a", [1, 2])
    sequence.finish_reason = "stop"
    core.cancel(sequence)
    core.cancel_all()
    assert caller.generation("a").finish_reason == "stop"


def test_cancelling_all_ends_what_runs_what_is_prefilled_and_what_waits(target: FailingTable) -> None:
    core = core_of(target, num_slots=2, chunk_tokens=2)
    caller = Caller(core)
    caller.ask("a", [1])
    caller.ask("b", list(range(9)))
    caller.ask("c", [3])
    core.step()
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, len(caller.events["b"])) == (2, 1, 0)
    core.cancel_all()
    assert not core.has_work
    assert [caller.generation(name).finish_reason for name in "abc"] == ["cancelled"] * 3


def test_what_a_finished_text_cached_is_there_for_the_next(target: FailingTable) -> None:
    core = core_of(target, has_prefix_cache=True)
    caller, prompt = Caller(core), list(range(BLOCK_TOKENS - 4))
    caller.ask("a", prompt, num_tokens=12)
    caller.finish()
    longer = [*prompt, *caller.tokens("a")]
    caller.ask("b", longer)
    caller.finish()
    reused = [caller.generation(name).num_prompt_tokens_reused for name in "ab"]
    assert reused == [0, BLOCK_TOKENS], "a block of which the end is output"
    assert core.stats().prefix_cache.num_hit_tokens == BLOCK_TOKENS
    assert caller.tokens("b") == text(target, longer)


# -- swapping ---------------------------------------------------------------------------------------


def test_a_swap_between_two_steps_changes_the_drafts_and_no_word(target: FailingTable) -> None:
    draft = wrong(target)
    core = core_of(target, draft)
    caller = Caller(core)
    caller.ask("a", PROMPTS[0], num_tokens=20)
    for _ in range(3):
        core.step()
    assert MODEL in caller.sequences["a"].estimate.by_matched
    report = core.swap(StagedTable(4, draft, target.table.clone()), "default")
    assert (report.draft_version, report.under_load) == (4, True)
    assert MODEL not in caller.sequences["a"].estimate.by_matched, "another draft's acceptance is not its"
    before = caller.sequences["a"].num_accepted
    caller.finish()
    assert before == 0 and caller.generation("a").num_accepted > 8
    spans = [(span.draft_version, span.start) for span in caller.generation("a").draft_versions]
    assert spans == [(0, 0), (4, 3)]
    assert caller.tokens("a") == text(target, PROMPTS[0], 20)
    stats = core.stats()
    assert (stats.draft_versions, stats.num_swaps, stats.num_swaps_under_load) == ({"default": 4}, 1, 1)
    assert not core.swap(StagedTable(5, draft, target.table.clone()), "default").under_load


def test_a_route_has_its_own_draft_while_it_is_open(target: FailingTable) -> None:
    core = core_of(target, wrong(target))
    caller, own = Caller(core), deepcopy(target)

    def estimated() -> list[bool]:
        """Whether a's and b's own acceptance of what serves them is known."""
        return [MODEL in caller.sequences[name].estimate.by_matched for name in "ab"]

    caller.ask("a", PROMPTS[0], route="sql", num_tokens=12)
    caller.ask("b", PROMPTS[0], num_tokens=12)
    core.step()
    core.open_draft("sql", drafter_of(own), None)
    assert estimated() == [False, True], "another draft serves a"
    core.step()
    assert estimated() == [True, True] and "sql" in core.stats().route_counts
    core.close_draft("sql")
    assert estimated() == [False, True]
    stats = core.stats()
    assert stats.draft_versions == {"default": 0} and "sql" not in stats.route_counts
    accepted = caller.sequences["a"].num_accepted
    caller.finish()
    assert accepted > 0 == caller.sequences["b"].num_accepted
    assert caller.sequences["a"].num_accepted == accepted, "the default route's draft is wrong for it too"
    assert caller.tokens("a") == caller.tokens("b") == text(target, PROMPTS[0], 12)


def test_a_draft_that_is_not_finite_goes_back_to_its_floor(target: FailingTable) -> None:
    draft = deepcopy(target)
    core = core_of(target, draft, floor=lambda: StagedTable(0, draft, target.table.clone()))
    caller = Caller(core)
    caller.ask("a", PROMPTS[0], num_tokens=12)
    core.step()
    broken = StagedTable(3, draft, torch.full_like(target.table, torch.nan))
    core.swap(broken, "default")
    core.step()
    stats = core.stats()
    assert (stats.draft_versions, stats.num_swaps) == ({"default": 0}, 2)
    with pytest.raises(BrokenDraftError, match="draft_version=3"):
        core.swap(broken, "default")
    accepted = caller.sequences["a"].num_accepted
    caller.finish()
    assert caller.generation("a").num_accepted > accepted, "the floor drafts"
    assert caller.tokens("a") == text(target, PROMPTS[0], 12)


def test_rounds_correct_the_costs_and_new_passes_bring_their_own() -> None:
    torch.manual_seed(3)
    model = tiny_model("llama", 1, VOCAB).eval()

    def costs(seconds: float) -> CostTable:
        return CostTable((1, 4), (1, 4), ((seconds, seconds),) * 2, (seconds,) * 2, (seconds,) * 2)

    core = core_of(model, deepcopy(model), costs=costs(1e6))
    caller = Caller(core)
    caller.ask("a", [1, 2], num_tokens=12)
    core.step()
    assert core.costs is not None
    assert core.costs.target_scale == pytest.approx(0.99) and core.costs.draft_scale == pytest.approx(0.99)
    compiled = SlotPass(model, MAX_LEN)
    core.use_passes([(core.target, compiled)], costs(1e-9))
    assert core.target.compiled is compiled
    caller.finish()
    assert core.costs.target_pass_s[0][0] == 1e-9 and core.costs.target_scale > 1
    plain = Caller(core_of(model))
    plain.ask("a", [1, 2], num_tokens=12)
    plain.finish()
    assert caller.tokens("a") == plain.tokens("a")
    assert caller.generation("a").num_accepted == caller.generation("a").num_attempted > 0


# -- what fails -------------------------------------------------------------------------------------


def test_a_round_that_fails_ends_its_sequences_and_the_core_goes_on(
    target: FailingTable, caplog: pytest.LogCaptureFixture
) -> None:
    core = core_of(target, wrong(target), num_slots=2)
    caller = Caller(core)
    for name, prompt in zip("abc", PROMPTS, strict=False):
        caller.ask(name, prompt)
    core.step()
    target.rows_that_fail = 2
    core.step()
    for name, prompt in zip("ab", PROMPTS, strict=False):
        ended = caller.generation(name)
        assert (ended.finish_reason, ended.error) == ("error", "the round failed: ArithmeticError")
        assert ended.output_token_ids == text(target, prompt, 1), "what was said before stands"
    assert "the engine goes on" in caplog.text
    target.rows_that_fail = 0
    caller.finish()
    assert caller.generation("c").finish_reason == "length"
    assert caller.tokens("c") == text(target, PROMPTS[2])


def test_a_prefill_that_fails_ends_its_own_sequence_alone(target: FailingTable) -> None:
    core = core_of(target)
    caller = Caller(core)
    target.prompt_that_fails = 4
    for name, prompt in zip("abc", PROMPTS, strict=False):
        caller.ask(name, prompt)
    caller.finish()
    ended = caller.generation("b")
    assert (ended.finish_reason, ended.error) == ("error", "the prefill failed: ArithmeticError")
    for name, prompt in zip("ac", (PROMPTS[0], PROMPTS[2]), strict=True):
        assert caller.tokens(name) == text(target, prompt)


def test_a_callback_that_raises_costs_nobody_a_token(
    target: FailingTable, caplog: pytest.LogCaptureFixture
) -> None:
    core = core_of(target)
    caller = Caller(core)
    caller.ask("a", PROMPTS[0])

    def refuse(event: TokenEvent) -> None:
        raise RuntimeError("the client left")

    bad = caller.ask("bad", PROMPTS[1])
    bad.on_event = refuse
    caller.finish()
    assert caller.tokens("a") == text(target, PROMPTS[0])
    assert bad.finish_reason == "length" and bad.num_output == 6
    assert "the callback of request 'bad' raised" in caplog.text
