"""One bad request, draft, swap or callback costs itself, never its batch mates, the engine or an answer."""

import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from serving.drafters.model_drafter import ModelDrafter
from serving.engine import GenerationRequest, SamplingParams, TokenEvent
from serving.engine.engine import Engine, EngineClosedError
from serving.engine.proposal import Proposal
from serving.engine.sequence import Batch
from serving.local import LocalEngine, build_engine, load_engine
from serving.models.adapter import sha256_of
from serving.models.loading import load_pair
from serving.options import EngineOptions
from tests.support.peft_adapters import random_adapter
from tests.support.table_engine import StagedTable, table_engine
from tests.support.table_model import TableModel
from tests.support.tiny_models import save_tiny_pair, tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
PROMPTS = [[1, 2, 3], [4], [0, 5, 2, 2, 1, 3, 0, 4]]


def _texts(engine: Engine, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [generation.output_token_ids for generation in engine.generate(PROMPTS, params)]


def _tables() -> tuple[TableModel, TableModel]:
    return TableModel(6, seed=1), TableModel(6, seed=2)


def test_a_temperature_under_float32s_reach_is_greedy_and_blames_no_draft() -> None:
    target, draft = _tables()
    with table_engine(target, draft, num_draft_tokens=2) as engine:
        expected = _texts(engine)
        assert _texts(engine, SamplingParams(temperature=1e-38, max_tokens=16)) == expected
        assert _texts(engine, SamplingParams(temperature=1e-38, max_tokens=16, seed=3)) == expected
        assert engine.stats().draft_disabled_reason == ""


class _Exploding:
    draft_version = 3

    def apply(self) -> None:
        raise RuntimeError("half copied")


def test_swaps_that_fail_or_are_abandoned_leave_the_engine_running() -> None:
    target, draft = _tables()
    with table_engine(target, draft, num_draft_tokens=2) as engine:
        expected = _texts(engine)
        for _ in range(20):
            abandoned: Future[Any] = engine.swap(StagedTable(1, draft, draft.table.clone()))
            abandoned.cancel()
        with pytest.raises(RuntimeError, match="half copied"):
            engine.swap(_Exploding()).result(5)
        assert _texts(engine) == expected
    with pytest.raises(EngineClosedError):
        engine.swap(StagedTable(2, draft, draft.table.clone()))


def test_stop_ids_that_do_not_exist_touch_nobody() -> None:
    target, draft = _tables()
    with table_engine(target, draft, num_draft_tokens=2) as engine:
        [expected, *_] = _texts(engine)
        odd = SamplingParams(temperature=0.0, max_tokens=16, min_tokens=2, stop_token_ids=(2**31 - 1, -1))
        handles = [
            engine.submit(GenerationRequest(str(index), tuple(PROMPTS[0]), params))
            for index, params in enumerate([GREEDY, odd, GREEDY])
        ]
        assert [handle.result(10).output_token_ids for handle in handles] == [expected] * 3
        with pytest.raises(ValueError, match="min_tokens=1"):
            engine.generate([[1]], SamplingParams(min_tokens=1, stop_token_ids=tuple(range(6))))
    with pytest.raises(ValueError, match="top_k"):
        SamplingParams(top_k=10**30)


class _RaisingDrafter(ModelDrafter):
    def propose(
        self,
        batch: Batch,
        num_draft_tokens_B: list[int],
        noise_BEV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Proposal:
        raise RuntimeError("out of memory")


def test_a_drafter_that_raises_costs_speed_only() -> None:
    target, draft = _tables()
    with table_engine(target, None, num_draft_tokens=0) as alone:
        expected = _texts(alone)
    with table_engine(target, draft, num_draft_tokens=2, drafter_class=_RaisingDrafter) as engine:
        assert _texts(engine) == expected
        assert "draft_version=0" in engine.stats().draft_disabled_reason


class _PoisonedTable(TableModel):
    """Token 5 as input overflows: its key is NaN."""

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> SimpleNamespace:
        poisoned = kwargs.pop("position_ids", None)
        positions = poisoned if poisoned is not None else args[0]
        broken = torch.where(input_ids == 5, torch.nan, positions.float())
        return super().forward(input_ids, broken, **kwargs)


def test_what_one_owner_poisons_never_reaches_the_next() -> None:
    poison = GenerationRequest("poison", (1, 5, 1, 2, 3, 1, 2, 3, 1, 2, 3), GREEDY)
    clean = [[1, 2, 3], [4], [0, 2, 2, 1, 3, 0, 4]]
    target = _PoisonedTable(6, seed=1)
    target.table[:, 5] = -torch.inf
    with table_engine(target, None, num_draft_tokens=0, num_slots=2) as engine:
        expected = [generation.output_token_ids for generation in engine.generate(clean, GREEDY)]
        for turn in range(12):
            handle = engine.submit(poison)
            if turn % 2:
                handle.cancel()
            generations = engine.generate(clean, GREEDY)
            assert [generation.output_token_ids for generation in generations] == expected
            assert handle.result(10).finish_reason in {"cancelled", "error"}


def test_a_draft_token_that_overflows_the_target_does_not_end_the_text() -> None:
    target, draft = _PoisonedTable(6, seed=1), TableModel(6, seed=2)
    target.table[:, 5] = -torch.inf
    draft.table[:, 5] = 50.0  # always proposes what the target never says
    clean = [[1, 2, 3], [4], [0, 2, 2, 1, 3, 0, 4]]
    with table_engine(target, None, num_draft_tokens=0) as alone:
        expected = [generation.output_token_ids for generation in alone.generate(clean, GREEDY)]
    with table_engine(target, draft, num_draft_tokens=3) as engine:
        generations = engine.generate(clean, GREEDY)
    assert [generation.output_token_ids for generation in generations] == expected
    assert sum(generation.num_accepted for generation in generations) == 0


def test_the_last_event_reaches_the_callback_before_the_result() -> None:
    target, _ = _tables()
    with table_engine(target, None, num_draft_tokens=0) as engine:
        for index in range(50):
            finished = threading.Event()

            def on_event(event: TokenEvent, finished: threading.Event = finished) -> None:
                if event.generation is not None:
                    finished.set()

            engine.submit(GenerationRequest(str(index), (1,), GREEDY), on_event).result(10)
            assert finished.is_set()


@pytest.mark.parametrize(("target_size", "draft_size"), [(352, 320), (320, 352)])
def test_a_pair_whose_vocabularies_differ_by_padding_works(
    tmp_path: Path, target_size: int, draft_size: int
) -> None:
    """One family pads its embeddings differently by size; the tokenizer is the same."""
    paths = save_tiny_pair(tmp_path)
    for path, size, layers in zip(paths, (target_size, draft_size), (3, 1), strict=True):
        tiny_model("llama", layers, size).save_pretrained(path)
    prompts = [[5, 6, 7], [9], [20] * 12]
    with load_engine(
        *paths, options=EngineOptions(num_draft_tokens=3, num_slots=2, max_seq_len=64)
    ) as engine:
        with load_engine(paths[0], options=EngineOptions(num_slots=1, max_seq_len=64)) as alone:
            for params in (GREEDY, SamplingParams(seed=4, max_tokens=16)):
                expected = [generation.output_token_ids for generation in alone.generate(prompts, params)]
                generations = engine.generate(prompts, params)
                assert [generation.output_token_ids for generation in generations] == expected
        generations = engine.generate(prompts, SamplingParams(max_tokens=16))
        assert {generation.error for generation in generations} == {""}
        assert engine.stats().draft_disabled_reason == ""


def test_learned_position_tables_survive_ragged_rounds_at_their_full_length(tmp_path: Path) -> None:
    for name, layers in (("target", 2), ("draft", 1)):
        torch.manual_seed(layers)
        shape = GPT2Config(vocab_size=64, n_positions=48, n_embd=16, n_layer=layers, n_head=2)
        GPT2LMHeadModel(shape).save_pretrained(tmp_path / name)
    target, draft = str(tmp_path / "target"), str(tmp_path / "draft")
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [[1] * 8, [2, 3], [4]]
    with load_engine(target, options=EngineOptions(num_slots=1)) as alone:
        expected = [generation.output_token_ids for generation in alone.generate(prompts, params)]
    with load_engine(target, draft, EngineOptions(num_draft_tokens=3, num_slots=3)) as engine:
        generations = engine.generate(prompts, params)
    assert [generation.output_token_ids for generation in generations] == expected


def _swap_in_random_adapter(engine: LocalEngine) -> None:
    assert engine.drafts is not None
    weights, config, _ = random_adapter(tiny_model("llama", 1, 320), modules=["q_proj", "lm_head"])
    staged = engine.drafts.default.stage(
        weights,
        draft_version=1,
        adapter_config_json=config,
        sha256=sha256_of(weights),
        draft_revision=engine.pair.draft_revision,
        target_revision=engine.pair.target_revision,
    )
    engine.swap(staged).result(10)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_two_engines_on_one_pair_share_no_live_weights(tmp_path: Path) -> None:
    pair = load_pair(*save_tiny_pair(tmp_path))
    assert pair.draft is not None
    before = {name: weight.clone() for name, weight in pair.draft.state_dict().items()}
    with build_engine(pair, EngineOptions(num_slots=1, max_seq_len=64)) as first:
        _swap_in_random_adapter(first)
        with build_engine(pair, EngineOptions(num_slots=1, max_seq_len=64)) as second:
            assert second.draft_version == 0
            assert second.drafts is not None
            floor = second.drafts.default.module.state_dict()
            assert all(torch.equal(floor[name], weight) for name, weight in before.items())


def test_a_context_too_short_to_continue_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_seq_len=1"):
        load_engine(*save_tiny_pair(tmp_path), EngineOptions(max_seq_len=1))
