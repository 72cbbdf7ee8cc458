"""A part's draft reads the target's columns as they are, and clears and moves only its own.

The last tests are controls: a shared cache that is a stale copy, or whose clearing reaches the target, fails
the checks above them.
"""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from buffer.names import DEFAULT_ROUTE
from serving import local
from serving.drafters.model_drafter import ModelDrafter
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.core import EngineCore
from serving.engine.draft_length import DraftLengthController
from serving.engine.engine import Engine
from serving.engine.passes.runner import Runner
from serving.engine.passes.shared_slot_cache import SharedSlotCache
from serving.engine.passes.slot_cache import SlotCache
from serving.engine.passes.slot_pass import SlotPass
from serving.engine.passes.static_pass import StaticPass
from serving.local import LocalEngine, load_engine
from serving.models.loading import ModelPair, load_pair
from serving.models.target_part import TargetPart
from serving.options import EngineOptions
from tests.support.chi_square import FALSE_ALARM_RATE, fit_p_value
from tests.support.tiny_models import tiny_model

EXIT_LAYER = 2
OPTIONS = EngineOptions(
    num_slots=3, max_seq_len=96, num_draft_tokens=3, speculation="model", max_route_drafts=1
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8], list(range(20, 60)), [9] * 17, [11, 12], list(range(100, 133))]


@pytest.fixture(scope="module")
def pair(tiny_pair: tuple[str, str]) -> ModelPair:
    return load_pair(tiny_pair[0], f"self:{EXIT_LAYER}")


@pytest.fixture
def runners(pair: ModelPair) -> tuple[Runner, Runner]:
    """The target's, and its part's over the target's cache."""
    target = Runner(pair.target, num_slots=3, max_seq_len=64)
    assert pair.draft is not None
    cache = SharedSlotCache(target.cache, num_shared=EXIT_LAYER)
    return target, Runner(pair.draft, num_slots=3, max_seq_len=64, cache=cache)


def check_reads_what_the_target_wrote(target: Runner, part: Runner) -> None:
    """Logits over a slot whose shared layers only the target has filled are those of the part alone."""
    text = list(range(30, 50))
    part.prefill(0, text[:-1], 0)
    own = part.cache.kv_L2SHTD
    own[:, :, 1, :, : len(text) - 1] = own[:, :, 0, :, : len(text) - 1]
    target.prefill(0, list(reversed(text)), 0)
    target.prefill(1, text[:-1], 0)
    got_V = part.prefill(1, text[-1:], len(text) - 1)[0, -1]
    expected_V = part.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
    assert torch.allclose(got_V, expected_V, atol=1e-4), "the part attended to something else"


def check_owns_no_more_than_its_layer(target: Runner, part: Runner) -> None:
    for slot in range(3):
        target.prefill(slot, list(range(slot, slot + 10)), 0)
        part.prefill(slot, list(range(slot, slot + 10)), 0)
    before = target.cache.kv_L2SHTD.clone()
    part.cache.clear(0)
    part.cache.move(2, 1, 5)
    part.cache.clear(2, from_column=3)
    part.cache.clear_all()
    assert torch.equal(target.cache.kv_L2SHTD, before), "the target lost its context"
    assert not part.cache.kv_L2SHTD.any()
    assert part.cache.kv_L2SHTD.shape[0] == 1


def test_a_part_reads_what_the_target_wrote(runners: tuple[Runner, Runner]) -> None:
    check_reads_what_the_target_wrote(*runners)


def test_clearing_and_moving_touch_only_the_parts_own_layer(runners: tuple[Runner, Runner]) -> None:
    check_owns_no_more_than_its_layer(*runners)


@pytest.mark.parametrize("way", ["function", "static"])
def test_every_kind_of_pass_runs_over_both(runners: tuple[Runner, Runner], way: str) -> None:
    target, part = runners
    run = SlotPass(part.model, part.max_seq_len)
    if way == "function":
        part.compiled = run
    else:
        part.static = StaticPass(run, part.cache, num_logits=part.num_embedded)
    check_reads_what_the_target_wrote(target, part)
    text = torch.arange(40, 43)[None].expand(2, -1).contiguous()
    columns = torch.arange(3).expand(2, -1).contiguous()
    got_BTV = part.forward(text, columns, kv_len=3).clone()
    expected_BTV = part.model(input_ids=text, use_cache=False).logits
    assert torch.allclose(got_BTV, expected_BTV, atol=1e-4)


def outputs(engine: LocalEngine) -> list[list[int]]:
    """More requests than slots, so that slots are cleared and moved; drafts are swapped all the while."""
    requests = [GenerationRequest(str(n), tuple(prompt), GREEDY) for n, prompt in enumerate(PROMPTS)]
    finished: list[bool] = []
    handles = [
        engine.submit(request, lambda event: finished.append(True) if event.generation else None)
        for request in requests
    ]
    while engine.drafts is not None and len(finished) < len(requests):
        engine.drafts.swap(DEFAULT_ROUTE, engine.drafts.stage(DEFAULT_ROUTE, None))
    return [handle.result(60.0).output_token_ids for handle in handles]


@pytest.fixture(scope="module")
def alone(tiny_pair: tuple[str, str]) -> list[list[int]]:
    with load_engine(tiny_pair[0], None, replace(OPTIONS, num_draft_tokens=0)) as engine:
        return outputs(engine)


def check_text(target: str, draft: str, alone: list[list[int]]) -> None:
    """Twice, so that slots are filled from the prefix cache too."""
    with load_engine(target, draft, OPTIONS) as engine:
        for _ in range(2):
            assert outputs(engine) == alone, "another text"
        stats = engine.stats()
        assert not stats.draft_disabled_reason and stats.num_draft_tokens > 0


@pytest.mark.parametrize("draft", ["self:0", "self:1", "self:2", "self:1:attention", "self:1:40"])
def test_greedy_text_is_the_targets_own(
    tiny_pair: tuple[str, str], draft: str, alone: list[list[int]]
) -> None:
    check_text(tiny_pair[0], draft, alone)


def test_the_last_exit_is_the_target_itself_and_accepted_throughout(tiny_pair: tuple[str, str]) -> None:
    """Three layers: two shared and a copy of the third."""
    with load_engine(tiny_pair[0], "self:2", OPTIONS) as engine:
        for generation in engine.generate(PROMPTS, GREEDY):
            assert generation.num_accepted == generation.num_attempted > 0


def test_a_route_that_opens_while_others_run_leaves_their_context_alone(
    tiny_pair: tuple[str, str], alone: list[list[int]]
) -> None:
    with load_engine(tiny_pair[0], "self:1", OPTIONS) as engine:
        assert engine.drafts is not None
        requests = [GenerationRequest(str(n), tuple(prompt), GREEDY) for n, prompt in enumerate(PROMPTS)]
        handles = [engine.submit(request) for request in requests]
        for number in range(20):
            engine.drafts.follow([str(number)])
        assert [handle.result(60.0).output_token_ids for handle in handles] == alone
        assert engine.drafts.routes == ["default", "19"]


@pytest.mark.parametrize("kept_tokens", [None, 3])
def test_sampled_text_follows_the_targets_distribution(kept_tokens: int | None) -> None:
    """Enumerated on a vocabulary of five; false alarms: FALSE_ALARM_RATE. A draft that can propose but three
    tokens changes nothing."""
    check_distribution(SharedSlotCache, kept_tokens)


def check_distribution(
    cache_class: type[SharedSlotCache], kept_tokens: int | None = None, rows: int = 16
) -> None:
    torch.manual_seed(3)
    target = tiny_model("llama", 3, 5).eval().requires_grad_(False)
    part = TargetPart(1, kept_tokens=kept_tokens).build(target)
    runner = Runner(target, num_slots=rows, max_seq_len=16)
    cache = cache_class(runner.cache, num_shared=1)
    drafter = ModelDrafter(Runner(part, num_slots=rows, max_seq_len=16, cache=cache))
    controller = DraftLengthController(None, fixed=2)
    params, prompt = SamplingParams(max_tokens=3, ignore_eos=True), (1, 0, 4, 4, 2)
    with Engine(EngineCore(runner, drafter, controller=controller)) as engine:
        engine.seed(0)
        found = engine.generate([list(prompt)] * 3000, params)
    distribution = {}
    for output in itertools.product(range(5), repeat=3):
        logits_TV = target(input_ids=torch.tensor([[*prompt, *output]]), use_cache=False).logits[0]
        logprobs_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
        distribution[output] = float(logprobs_TV[torch.arange(3), list(output)].sum().exp())
    assert sum(generation.num_accepted for generation in found) > 0
    p_value = fit_p_value([tuple(generation.output_token_ids) for generation in found], distribution)
    assert p_value > FALSE_ALARM_RATE, "another distribution"


# -- controls ---------------------------------------------------------------------------------------


class Stale(SharedSlotCache):
    """Over a copy of the target's layers, made when they were empty."""

    def __init__(self, shared: SlotCache, *, num_shared: int, num_own: int = 1) -> None:
        copied = copy.copy(shared)
        copied.kv_L2SHTD, copied._rows = shared.kv_L2SHTD.clone(), {}
        super().__init__(copied, num_shared=num_shared, num_own=num_own)


class Reaching(SharedSlotCache):
    """Its clearing reaches the target's layers."""

    def clear(self, slot: int, from_column: int = 0) -> None:
        super().clear(slot, from_column)
        self._shared.clear(slot, from_column)


def test_stale_columns_are_caught(pair: ModelPair) -> None:
    target = Runner(pair.target, num_slots=3, max_seq_len=64)
    assert pair.draft is not None
    cache = Stale(target.cache, num_shared=EXIT_LAYER)
    part = Runner(pair.draft, num_slots=3, max_seq_len=64, cache=cache)
    with pytest.raises(AssertionError, match="attended to something else"):
        check_reads_what_the_target_wrote(target, part)


def test_a_clear_that_reaches_the_targets_layers_is_caught(
    pair: ModelPair, tiny_pair: tuple[str, str], alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Runner(pair.target, num_slots=3, max_seq_len=64)
    assert pair.draft is not None
    cache = Reaching(target.cache, num_shared=EXIT_LAYER)
    with pytest.raises(AssertionError, match="lost its context"):
        check_owns_no_more_than_its_layer(
            target, Runner(pair.draft, num_slots=3, max_seq_len=64, cache=cache)
        )
    monkeypatch.setattr(local, "SharedSlotCache", Reaching)
    with pytest.raises(AssertionError, match="another text"):
        check_text(tiny_pair[0], "self:1", alone)


def test_layers_of_another_depth_under_the_block_are_caught(pair: ModelPair) -> None:
    target = Runner(pair.target, num_slots=3, max_seq_len=64)
    assert pair.draft is not None
    cache = SharedSlotCache(target.cache, num_shared=EXIT_LAYER)
    cache._slot_layers[:EXIT_LAYER] = list(reversed(cache._slot_layers[:EXIT_LAYER]))
    cache.layers = list(cache._slot_layers)
    part = Runner(pair.draft, num_slots=3, max_seq_len=64, cache=cache)
    with pytest.raises(AssertionError, match="attended to something else"):
        check_reads_what_the_target_wrote(target, part)
