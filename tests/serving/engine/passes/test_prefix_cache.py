"""What was prefilled before is copied, never computed again, never wrong, never more than the bound."""

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serving.drafters.model_drafter import ModelDrafter
from serving.engine import Generation, GenerationRequest, SamplingParams
from serving.engine.core import EngineCore
from serving.engine.draft_length import DraftLengthController
from serving.engine.engine import Engine
from serving.engine.passes.prefix_cache import PrefixCache, PrefixCacheStats
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_cache import SlotCache
from serving.local import load_engine
from serving.options import EngineOptions
from tests.support.table_engine import MAX_LEN, PrefixCacheMaker, table_engine
from tests.support.table_model import TableModel
from tests.support.tiny_models import tiny_model

C = 2
"""Columns of a block here, so that short prompts have many."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
COUPLED = SamplingParams(temperature=0.9, seed=5, max_tokens=6)
SYSTEM = [3, 1, 4, 1, 5, 2, 0, 5, 3]
SHARED = [[*SYSTEM, 2, 2], [*SYSTEM, 4], SYSTEM, [*SYSTEM, 2, 2, 0], SYSTEM[:4], [1], [5, *SYSTEM]]


def slots(num_slots: int = 2, max_len: int = 32) -> SlotCache:
    return SlotCache(
        num_layers=2,
        num_slots=num_slots,
        num_kv_heads=2,
        head_dim=3,
        max_len=max_len,
        dtype=torch.float32,
        device="cpu",
    )


def block_bytes(cache: SlotCache) -> int:
    return C * cache.column_bytes


def pool(cache: SlotCache, num_blocks: int = 64, kind: type[PrefixCache] = PrefixCache) -> PrefixCache:
    return kind(cache, max_bytes=num_blocks * block_bytes(cache), block_tokens=C)


def texts(generations: list[Generation]) -> list[list[int]]:
    return [generation.output_token_ids for generation in generations]


def tables() -> tuple[TableModel, TableModel]:
    return TableModel(6, seed=1), TableModel(6, seed=2)


# -- the cache alone ----------------------------------------------------------------------------------


def fill(cache: SlotCache, slot: int, token_ids: tuple[int, ...]) -> None:
    """A column that only its own prefix explains, as a causal model's does."""
    cache.clear(slot)
    for position in range(len(token_ids)):
        prefix_hash = hash(token_ids[: position + 1]) % 100_003
        cache.columns(slot, position, position + 1).fill_(float(prefix_hash))


@given(
    st.lists(st.lists(st.integers(0, 1), max_size=12).map(tuple), max_size=30),
    st.integers(0, 7),
)
@settings(max_examples=150, deadline=None)
def test_whatever_is_found_is_what_that_prefix_had_and_the_bound_holds(
    prompts: list[tuple[int, ...]], num_blocks: int
) -> None:
    cache = slots()
    prefixes = pool(cache, num_blocks)
    for number, prompt in enumerate(prompts):
        cache.kv_L2SHTD.fill_(-1.0)
        found = prefixes.load(0, prompt)
        assert found % C == 0 and found <= len(prompt)
        fill(cache, 1, prompt)
        assert torch.equal(cache.columns(0, 0, found), cache.columns(1, 0, found))
        assert bool((cache.columns(0, found, 33) == -1.0).all())
        prefixes.store(1, prompt)
        stats = prefixes.stats()
        assert stats.num_bytes <= stats.max_bytes == num_blocks * block_bytes(cache) == prefixes.num_bytes
        assert prefixes.load(0, prompt) == C * min(len(prompt) // C, num_blocks), number


def test_blocks_are_shared_and_the_one_used_longest_ago_gives_way() -> None:
    cache = slots()
    prefixes = pool(cache, num_blocks=4)
    one, two, three = (0, 0, 1, 1), (0, 0, 2, 2), (0, 0, 3, 3)
    for prompt in (one, two, three):
        fill(cache, 1, prompt)
        prefixes.store(1, prompt)
    assert prefixes.stats().num_bytes == 4 * block_bytes(cache)
    prefixes.load(0, one)
    fill(cache, 1, (7, 7))
    prefixes.store(1, (7, 7))
    assert prefixes.stats().num_evicted_blocks == 1
    assert [prefixes.load(0, prompt) for prompt in (one, two, three, (7, 7))] == [4, 2, 4, 2]


def test_a_longer_chain_never_pushes_out_its_own_beginning() -> None:
    cache = slots()
    prefixes = pool(cache, num_blocks=4)
    for prompt in ((1, 1, 2, 2), (5, 5, 6, 6), (1, 1, 2, 2, 3, 3, 4, 4)):
        fill(cache, 1, prompt)
        prefixes.store(1, prompt)
    cache.clear(0)
    assert prefixes.load(0, prompt) == 8
    assert torch.equal(cache.columns(0, 0, 8), cache.columns(1, 0, 8))


def test_prefixes_of_another_salt_are_not_found() -> None:
    cache = slots()
    prefixes = pool(cache)
    prompt = (1, 1, 2, 2)
    fill(cache, 1, prompt)
    prefixes.store(1, prompt, salt="acme")
    assert [prefixes.load(0, prompt, salt) for salt in ("acme", "globex", None)] == [4, 0, 0]
    assert [len(prefixes.means(prompt, salt)) for salt in ("acme", "globex", None)] == [2, 0, 0]
    prefixes.store(1, prompt)
    assert [prefixes.load(0, prompt, salt) for salt in ("acme", "globex", None)] == [4, 0, 4]
    assert prefixes.stats().num_bytes == 4 * block_bytes(cache)


def test_a_prefix_that_is_not_finite_is_not_kept() -> None:
    cache = slots()
    prefixes = pool(cache)
    for poison in (torch.nan, torch.inf):
        cache.clear(0)
        cache.columns(0, 3, 4).fill_(poison)
        prefixes.store(0, (1, 2, 3, 4))
        assert prefixes.load(1, (1, 2, 3, 4)) == 0
    cache.clear(0)
    prefixes.store(0, (1, 2, 3, 4))
    assert prefixes.load(1, (1, 2, 3, 4)) == 4


# -- in the engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [1, 5, 64])
@pytest.mark.parametrize("sampling", [GREEDY, COUPLED])
def test_a_shared_prefix_changes_no_text(sampling: SamplingParams, num_blocks: int) -> None:
    target, draft = tables()
    with table_engine(target, None, num_draft_tokens=0) as alone:
        expected = texts(alone.generate(SHARED, sampling))
    maker = partial(pool, num_blocks=num_blocks)
    with table_engine(target, draft, num_draft_tokens=2, num_slots=3, prefix_cache=maker) as engine:
        for _ in range(3):
            generations = engine.generate(SHARED, sampling)
            assert texts(generations) == expected
        if num_blocks == 64:
            assert [g.num_prompt_tokens_reused for g in generations] == [
                (len(prompt) - 1) // C * C for prompt in SHARED
            ]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_schedule_of_shared_prefixes_gives_the_texts_of_the_target_alone(data: st.DataObject) -> None:
    """Few tokens, so that prompts, outputs and blocks coincide often; joins, leaves and cancels."""
    vocab_size = data.draw(st.sampled_from([2, 3, 6]))
    target, draft = TableModel(vocab_size, seed=1, sharpness=3.0), TableModel(vocab_size, seed=2)
    token = st.integers(0, vocab_size - 1)
    prompts = data.draw(st.lists(st.lists(token, min_size=1, max_size=30), min_size=1, max_size=10))
    maker = partial(pool, num_blocks=data.draw(st.integers(0, 20)))
    expected = [greedy(target, prompt, GREEDY.max_tokens) for prompt in prompts]
    with table_engine(target, draft, num_draft_tokens=2, num_slots=3, prefix_cache=maker) as engine:
        for turn in range(2):
            handles = [
                engine.submit(GenerationRequest(f"{turn}-{index}", tuple(prompt), GREEDY))
                for index, prompt in enumerate(prompts)
            ]
            cancelled = data.draw(st.sets(st.integers(0, len(prompts) - 1), max_size=3))
            for index in cancelled:
                handles[index].cancel()
            for handle, text in zip(handles, expected, strict=True):
                generation = handle.result(10)
                assert generation.output_token_ids == text[: len(generation.output_token_ids)]
                assert generation.finish_reason in {"length", "cancelled"}
        stats = engine.stats().prefix_cache
        assert stats.num_bytes <= stats.max_bytes


def greedy(target: TableModel, prompt: list[int], num_tokens: int) -> list[int]:
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(int(target.logits_after(text).argmax()))
    return text[len(prompt) :]


class ParentlessPrefixCache(PrefixCache):
    """Negative control: finds a block by its tokens alone, whatever stands before them."""

    def _key(self, parent: int, tokens: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        return 0, tokens


class LastTokenPrefixCache(PrefixCache):
    """Negative control: a key that forgets all but a block's last token."""

    def _key(self, parent: int, tokens: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        return parent, tokens[-1:]


@pytest.mark.parametrize("kind", [ParentlessPrefixCache, LastTokenPrefixCache])
def test_a_cache_that_returns_the_wrong_block_is_caught(kind: type[PrefixCache]) -> None:
    target, _ = tables()
    prompts = [[*prompt, 0] for prompt in itertools.product(range(3), repeat=4)]
    expected = [greedy(target, prompt, GREEDY.max_tokens) for prompt in prompts]
    outcomes = []
    for of_kind in (PrefixCache, kind):
        maker: PrefixCacheMaker = partial(pool, num_blocks=200, kind=of_kind)
        with table_engine(target, None, num_draft_tokens=0, prefix_cache=maker) as engine:
            outcomes.append(texts(engine.generate(prompts, GREEDY)) == expected)
    assert outcomes == [True, False]


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED])
def test_a_real_model_gives_the_same_text_from_copied_keys_and_values(sampling: SamplingParams) -> None:
    """float32; prompts of many lengths, outputs that become the next turn's prompt."""
    model = tiny_model("llama", 3, 320).eval()
    prompts = [[*range(20, 20 + length), *tail] for length in (0, 3, 17, 40) for tail in ([5], [6, 7], [8])]
    with real_engine(model, 0, None) as alone, real_engine(model, 3, 400) as reusing:
        for _ in range(2):
            expected = texts(alone.generate(prompts, sampling))
            generations = reusing.generate(prompts, sampling)
            assert texts(generations) == expected
            prompts = [[*prompt, *output, 9, 9, 9] for prompt, output in zip(prompts, expected, strict=True)]
    for generation in generations:  # of the second turn: what the first had cached, in whole blocks
        first_turn = len(generation.prompt_token_ids) - 3
        assert generation.num_prompt_tokens_reused >= (first_turn - 1) // C * C


def real_engine(model: Any, num_draft_tokens: int, num_blocks: int | None) -> Engine:
    """Drafts with itself, so that rounds cache several tokens at once."""
    target, draft = (Runner(model, num_slots=3, max_seq_len=96) for _ in range(2))
    return Engine(
        EngineCore(
            target,
            ModelDrafter(draft),
            controller=DraftLengthController(None, fixed=num_draft_tokens),
            prefill_chunk_tokens=7,
            prefix_cache=None if num_blocks is None else pool(target.cache, num_blocks),
        )
    )


def test_what_is_reused_is_not_computed_and_is_counted() -> None:
    seen: list[int] = []

    class Counting(TableModel):
        def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> SimpleNamespace:
            seen.append(input_ids.numel())
            return super().forward(input_ids, *args, **kwargs)

    prompt = [*SYSTEM, 2, 2]
    one = SamplingParams(temperature=0.0, max_tokens=1)
    with table_engine(Counting(6, seed=1), None, num_draft_tokens=0, prefix_cache=pool) as engine:
        engine.generate([prompt], one)
        assert sum(seen) == len(prompt)
        seen.clear()
        [generation] = engine.generate([prompt], one)
        stats = engine.stats().prefix_cache
    assert generation.num_prompt_tokens_reused == 10
    assert sum(seen) == len(prompt) - 10
    assert (stats.num_query_tokens, stats.num_hit_tokens) == (2 * (len(prompt) - 1), 10)


def test_requests_that_come_together_share_what_the_first_computed() -> None:
    target, _ = tables()
    with table_engine(target, None, num_draft_tokens=0, num_slots=4, prefix_cache=pool) as engine:
        generations = engine.generate([[*SYSTEM, token] for token in range(4)], GREEDY)
    assert [generation.num_prompt_tokens_reused for generation in generations] == [0, 8, 8, 8]


class _Poisoned(TableModel):
    """Token 5 as input overflows: its key is NaN."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> SimpleNamespace:
        broken = torch.where(input_ids == 5, torch.nan, position_ids.float())
        return super().forward(input_ids, broken, *args, **kwargs)


def test_a_prompt_that_overflowed_is_not_kept_and_harms_nobody() -> None:
    target = _Poisoned(6, seed=1)
    target.table[:, 5] = -torch.inf
    poison, clean = [1, 2, 3, 5, 1, 2, 3], [1, 2, 3, 4, 1, 2, 3]
    with table_engine(target, None, num_draft_tokens=0, prefix_cache=pool) as engine:
        for turn in range(3):
            bad, good = engine.generate([poison, clean], GREEDY)
            of_clean = 2 if turn else 0
            assert (bad.finish_reason, bad.num_prompt_tokens_reused) == ("error", of_clean)
            assert good.output_token_ids == greedy(target, clean, GREEDY.max_tokens)
        assert good.num_prompt_tokens_reused == 6


class _Failing(PrefixCache):
    """Out of memory whenever it is needed."""

    def load(self, slot: int, token_ids: Any) -> int:
        self._slots.columns(slot, 0, 4).fill_(torch.nan)
        raise RuntimeError("out of memory")

    def store(self, slot: int, token_ids: Any) -> None:
        raise RuntimeError("out of memory")


def test_a_prefix_cache_that_fails_costs_speed_only() -> None:
    target, _ = tables()
    maker = partial(pool, kind=_Failing)
    with table_engine(target, None, num_draft_tokens=0, prefix_cache=maker) as engine:
        assert texts(engine.generate(SHARED, GREEDY)) == [
            greedy(target, prompt, GREEDY.max_tokens) for prompt in SHARED
        ]


class _Raising(TableModel):
    """Token 5 cannot be prefilled."""

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> SimpleNamespace:
        if bool((input_ids == 5).any()):
            raise RuntimeError("out of memory")
        return super().forward(input_ids, *args, **kwargs)


def test_a_prefill_that_raises_ends_its_own_sequence_only() -> None:
    target = _Raising(6, seed=1)
    target.table[:, 5] = -torch.inf
    long = SamplingParams(temperature=0.0, max_tokens=30)
    with table_engine(target, None, num_draft_tokens=0, num_slots=3, prefix_cache=pool) as engine:
        first, bad, last = engine.generate([[1, 2], [1, 2, 3, 4, 5, 1], [3, 4]], long)
        again = engine.generate([[1, 2, 3, 4, 0]], long)[0]
    assert (bad.finish_reason, bad.error, bad.output_token_ids) == (
        "error",
        "the prefill failed: RuntimeError",
        [],
    )
    for prompt, generation in (([1, 2], first), ([3, 4], last), ([1, 2, 3, 4, 0], again)):
        assert generation.finish_reason == "length"
        assert generation.output_token_ids == greedy(target, prompt, 30)


def test_prompts_of_one_token_and_of_the_whole_window_are_fine() -> None:
    target, draft = tables()
    prompts = [[1], [2] * (MAX_LEN - 1), [2] * (MAX_LEN - 1), [1], [1, 1]]
    one = SamplingParams(temperature=0.0, max_tokens=1)
    with table_engine(target, draft, num_draft_tokens=2, prefix_cache=pool) as engine:
        assert texts(engine.generate(prompts, one)) == [greedy(target, prompt, 1) for prompt in prompts]


def test_an_engine_without_the_cache_looks_nothing_up(tiny_pair: tuple[str, str]) -> None:
    prompt = list(range(20, 60))
    with load_engine(
        *tiny_pair, options=EngineOptions(num_slots=1, max_seq_len=64, prefix_cache_mib=0)
    ) as engine:
        generations = engine.generate([prompt, prompt], GREEDY)
        assert engine.stats().prefix_cache == PrefixCacheStats()
    with load_engine(*tiny_pair, EngineOptions(num_slots=1, max_seq_len=64)) as engine:
        reusing = engine.generate([prompt, prompt], GREEDY)
    assert texts(reusing) == texts(generations)
    assert [g.num_prompt_tokens_reused for g in (*generations, *reusing)] == [0, 0, 0, 32]
