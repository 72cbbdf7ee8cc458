"""Static passes say what the model's own code says, whatever the padding, and disturb nobody's cache."""

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.drafters.model_drafter import ModelDrafter
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.core import EngineCore
from serving.engine.draft_length import DraftLengthController
from serving.engine.engine import Engine
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPass, additive_mask
from serving.engine.passes.static_check import static_error, static_pass_of
from serving.engine.passes.static_pass import TOKEN_BUCKETS, column_buckets, row_buckets
from serving.models.draft_weights import DraftWeights
from tests.support.host_reads import HostReads
from tests.support.pass_shapes import shaped
from tests.support.table_model import TableModel
from tests.support.tiny_models import tiny_model

NUM_SLOTS, MAX_LEN = 5, 330
PROMPTS = [[5, 6, 7, 8], [9], [20, 21, 22, 23, 24] * 8, [30, 31], [40] * 20, [50, 51, 52], [60, 3, 20]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _model(arch: str, num_layers: int) -> Any:
    torch.manual_seed(num_layers)
    return tiny_model(arch, num_layers, 64).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def runner(arch: str) -> Iterator[Runner]:
    yield Runner(_model(arch, 2), num_slots=NUM_SLOTS, max_seq_len=MAX_LEN)


def test_buckets_cover_every_size_and_waste_little() -> None:
    assert row_buckets(8) == (1, 2, 4, 8) and row_buckets(6) == (1, 2, 4, 6) and row_buckets(1) == (1,)
    assert row_buckets(32) == (1, 2, 4, 8, 16, 32)
    assert column_buckets(100) == (100,)
    assert column_buckets(1024) == (256, 320, 384, 448, 512, 640, 768, 896, 1024)
    buckets = column_buckets(40_000)
    assert buckets[-1] == 40_000
    assert all(small < large <= 1.25 * small for small, large in pairwise(buckets))


@pytest.mark.parametrize("kv_len", [20, 255, 256, 257, 320, 321, MAX_LEN])
@pytest.mark.parametrize("num_rows", range(1, NUM_SLOTS + 1))
@torch.inference_mode()
def test_padding_changes_no_logit_and_no_column_of_anyone(runner: Runner, num_rows: int, kv_len: int) -> None:
    """Slots past the batch and all trash columns hold NaN, which would show wherever it was read."""
    static = static_pass_of(runner)
    kv, trash = runner.cache.kv_L2SHTD, runner.cache.trash_column
    for num_tokens in (1, 2, 3, 4, 5, 6, 7, 9):
        assert num_tokens <= TOKEN_BUCKETS[-1]
        generator = torch.Generator().manual_seed(num_tokens)
        tokens_BT = torch.randint(64, (num_rows, num_tokens), generator=generator)
        ends_B1 = torch.tensor([[kv_len - 2 * row] for row in range(num_rows)])
        positions_BT = ends_B1 - num_tokens + torch.arange(num_tokens)
        positions_BT[1:, -1] = trash  # padding within a row
        context = torch.randn(kv.shape, generator=generator)
        context[:, :, num_rows:] = torch.nan
        context[:, :, :, :, trash] = torch.nan
        outcomes = []
        for way in (None, static):
            kv.copy_(context)
            runner.static = way
            logits_BTV = runner.forward(tokens_BT, positions_BT, kv_len=kv_len)
            outcomes.append((logits_BTV.clone(), kv[..., :trash, :].clone()))
        runner.static = None
        (eager_BTV, eager_kv), (static_BTV, static_kv) = outcomes
        real_BT = positions_BT != trash
        torch.testing.assert_close(static_BTV[real_BT], eager_BTV[real_BT], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(static_kv, eager_kv, atol=1e-5, rtol=1e-5, equal_nan=True)
        assert torch.isfinite(static_BTV).all()
    runner.cache.clear_all()


@torch.inference_mode()
def test_a_pass_away_from_the_first_slot_or_too_long_is_left_to_the_models_own_code(runner: Runner) -> None:
    static = static_pass_of(runner)
    assert static.can_run(shaped(0, NUM_SLOTS, 9))
    assert not static.can_run(shaped(1, 1, 1))
    assert not static.can_run(shaped(0, 1, 10))
    runner.static = static
    runner.prefill(2, list(range(12)), 0)
    runner.static = None
    assert runner.cache.kv_L2SHTD[:, :, 2, :, :12].abs().sum() > 0
    assert runner.cache.kv_L2SHTD[:, :, :2].abs().sum() == 0
    runner.cache.clear_all()


@torch.inference_mode()
def test_few_shapes_are_kept_and_those_made_again_are_right(runner: Runner) -> None:
    few, many = static_pass_of(runner, max_graphs=2), static_pass_of(runner)
    for num_tokens in (1, 2, 4, 1, 6, 2, 1):
        tokens_BT = torch.arange(num_tokens)[None]
        one = few(tokens_BT, tokens_BT, num_tokens).clone()
        assert torch.equal(one, many(tokens_BT, tokens_BT, num_tokens))
        assert len(few._shapes) <= 2
    assert len(many._shapes) == 4
    runner.cache.clear_all()


def test_the_check_before_serving_finds_a_pass_that_is_wrong(runner: Runner) -> None:
    assert static_error(runner, static_pass_of(runner)) < 1e-4
    own = SlotPass(runner.model, runner.max_seq_len)

    def forgets_its_mask(tokens: Tensor, columns: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        return own(tokens, columns, torch.zeros_like(mask), *rest)

    def not_finite(*inputs: Any) -> Tensor:
        return torch.nan * own(*inputs)

    assert static_error(runner, static_pass_of(runner, forgets_its_mask)) > 1e-2
    assert not static_error(runner, static_pass_of(runner, not_finite)) <= 1.0
    assert runner.cache.kv_L2SHTD.abs().sum() == 0


@torch.inference_mode()
def test_weights_swapped_in_place_are_seen_by_the_next_pass(arch: str) -> None:
    weights = DraftWeights(_model(arch, 1), draft_revision="d", target_revision="t")
    runner = Runner(weights.module, num_slots=2, max_seq_len=64)
    runner.static = static_pass_of(runner)
    tokens_BT = torch.tensor([[3, 4], [5, 6]])
    positions_BT = torch.tensor([[0, 1], [0, 1]])

    def both_ways() -> list[Tensor]:
        static_BTV = runner.forward(tokens_BT, positions_BT, kv_len=2).clone()
        runner.static, kept = None, runner.static
        eager_BTV = runner.forward(tokens_BT, positions_BT, kv_len=2)
        runner.static = kept
        return [static_BTV, eager_BTV]

    floor, _ = both_ways()
    name = "model.layers.0.mlp.down_proj.weight"
    merged = {name: dict(weights.module.named_parameters())[name] + 0.5}
    weights.copy_in(merged)
    swapped, expected = both_ways()
    torch.testing.assert_close(swapped, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(swapped, floor, atol=1e-2)
    weights.copy_in({})
    assert torch.equal(both_ways()[0], floor)


def _engine(target: Any, draft: Any, *, static: bool, num_slots: int = 3, max_len: int = 128) -> Engine:
    runners = [Runner(model, num_slots=num_slots, max_seq_len=max_len) for model in (target, draft)]
    for each in runners:
        each.static = static_pass_of(each) if static else None
    return Engine(
        EngineCore(
            runners[0],
            ModelDrafter(runners[1], chunk_tokens=16),
            controller=DraftLengthController(None, fixed=4),
            prefill_chunk_tokens=16,
        )
    )


def test_an_engine_of_static_passes_says_the_same_through_joins_and_leaves(arch: str) -> None:
    models = _model(arch, 2), _model(arch, 1)
    params = [
        SamplingParams(temperature=0.0, max_tokens=7 + 9 * (row % 3), num_draft_tokens=[None, 2, 0][row % 3])
        for row in range(len(PROMPTS))
    ]
    seeded = [SamplingParams(temperature=0.9, seed=row, max_tokens=12) for row in range(len(PROMPTS))]
    texts = []
    for static in (False, True):
        with _engine(*models, static=static) as engine:
            texts.append(
                [
                    generation.output_token_ids
                    for each in (params, seeded)
                    for generation in engine.generate(PROMPTS, each)
                ]
            )
    assert texts[0] == texts[1]


class _AdditiveTable(TableModel):
    """Takes a pass's additive mask. What a mask hides is multiplied by 0, so NaN leaks as in attention.
    Token 5 as input overflows: its key is NaN."""

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> SimpleNamespace:
        if kwargs["attention_mask"].is_floating_point():
            kwargs["attention_mask"] = kwargs["attention_mask"] == 0
        keep = kwargs.pop("logits_to_keep")
        kwargs["position_ids"] = torch.where(input_ids == 5, torch.nan, kwargs["position_ids"].float())
        logits_BTV = super().forward(input_ids, *args, **kwargs).logits
        kept = keep if isinstance(keep, Tensor) else slice(-keep, None)
        return SimpleNamespace(logits=logits_BTV[:, kept])


def test_poison_of_one_owner_reaches_no_other_through_padding() -> None:
    """Static passes read every column of a slot and run slots that are not in the batch."""
    target, draft = _AdditiveTable(6, seed=1), _AdditiveTable(6, seed=2)
    target.table[:, 5] = draft.table[:, 5] = -torch.inf
    poison = GenerationRequest("poison", (1, 5, *[1, 2, 3] * 6), GREEDY)
    clean = [[1, 2, 3], [4], [0, 2, 2, 1, 3, 0, 4]]
    with _engine(target, draft, static=False, max_len=48) as engine:
        expected = [generation.output_token_ids for generation in engine.generate(clean, GREEDY)]
    with _engine(target, draft, static=True, max_len=48) as engine:
        for turn in range(12):
            handle = engine.submit(poison)
            if turn % 2:
                handle.cancel()
            generations = engine.generate(clean, GREEDY)
            assert [generation.output_token_ids for generation in generations] == expected
            assert handle.result(10).finish_reason in {"cancelled", "error"}


def test_a_slot_that_is_moved_into_holds_nothing_of_its_last_owner(runner: Runner) -> None:
    cache = runner.cache
    cache.kv_L2SHTD[:, :, 1], cache.kv_L2SHTD[:, :, 3] = torch.nan, 2.0
    cache.move(3, 1, 7)
    assert (cache.kv_L2SHTD[:, :, 1, :, :7] == 2.0).all()
    assert (cache.kv_L2SHTD[:, :, 1, :, 7:] == 0.0).all()
    cache.clear_all()


@torch.inference_mode()
def test_nothing_in_a_pass_reads_the_device(runner: Runner) -> None:
    """What a capture cannot hold: a value read on the host, an index by mask or list."""
    static = static_pass_of(runner)
    tokens_BT = torch.zeros((3, 2), dtype=torch.int64)
    with HostReads() as reads:
        static(tokens_BT, tokens_BT, 2)
    assert reads.places == []
    runner.cache.clear_all()


@torch.inference_mode()
def test_a_pass_is_one_graph_to_the_compiler(arch: str) -> None:
    """No Python decides by a tensor's value on the way."""
    runner = Runner(_model(arch, 1), num_slots=2, max_seq_len=32)
    own = SlotPass(runner.model, runner.max_seq_len)
    compiled = torch.compile(own, fullgraph=True, dynamic=False, backend="eager")
    tokens_BT, columns_BT = torch.tensor([[1, 2]]), torch.tensor([[4, 5]])
    inputs = tokens_BT, columns_BT, additive_mask(columns_BT, 16, runner.dtype), torch.arange(2)
    expected = own(*inputs, runner.cache.rows(0, 1)).clone()
    torch.testing.assert_close(compiled(*inputs, runner.cache.rows(0, 1)), expected)
