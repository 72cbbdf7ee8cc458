"""Log-probabilities of a prompt's own tokens are the target's, whatever the chunks, prefixes and batch mates;
a request for no output ends with its prompt; who asks for neither pays for neither."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from serving.engine import Generation, GenerationRequest, SamplingParams, TokenEvent
from serving.engine.core import EngineCore
from serving.engine.draft_length import MAX_DRAFT_TOKENS, DraftLengthController
from serving.engine.engine import Engine
from serving.engine.passes.hidden_states import embedder_of
from serving.engine.passes.prefix_cache import PrefixCache
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPass
from serving.engine.prefill import Router
from tests.support.tiny_models import tiny_model

NUM_SLOTS, VOCAB = 2, 320
PROMPT = tuple(range(40, 140))
OTHERS = ((7, 8, 9), tuple(range(200, 260)), (5,))
TOLERANCE = 2e-5

OpenEngine = Callable[..., Engine]


@pytest.fixture(params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return tiny_model(request.param, 2, VOCAB).requires_grad_(False).eval()


@pytest.fixture
def open_engine(model: Any) -> Iterator[OpenEngine]:
    """Over a tiny target with random weights; no draft."""
    opened: list[Engine] = []

    def open_one(*, chunk_tokens: int = 64, caches: bool = False, router: Router | None = None) -> Engine:
        runner = Runner(model, num_slots=NUM_SLOTS, max_seq_len=128)
        opened.append(
            Engine(
                EngineCore(
                    runner,
                    None,
                    controller=DraftLengthController(None, fixed=0),
                    prefill_chunk_tokens=chunk_tokens,
                    prefix_cache=PrefixCache(runner.cache, max_bytes=2**20) if caches else None,
                    router=router,
                    embedder=embedder_of(runner) if router is not None else None,
                )
            )
        )
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()


def generate(engine: Engine, prompt: tuple[int, ...] = PROMPT, **params: Any) -> Generation:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "prompt_logprobs": 3, **params})
    return engine.submit(GenerationRequest("r", prompt, sampling)).result(20)


@torch.inference_mode()
def reference(model: Any, prompt: tuple[int, ...]) -> Tensor:
    """[T - 1, V], by transformers alone."""
    logits_TV: Tensor = model(torch.tensor([prompt])).logits[0, :-1]
    return logits_TV.log_softmax(-1)


def check(model: Any, generation: Generation, num_top: int = 3) -> None:
    prompt, found = generation.prompt_token_ids, generation.prompt_logprobs
    assert found is not None
    expected_TV = reference(model, prompt)
    own_T1 = expected_TV.gather(-1, torch.tensor(prompt[1:])[:, None])
    assert np.abs(found.logprobs_T - own_T1[:, 0].numpy()).max(initial=0.0) < TOLERANCE
    near = (expected_TV - own_T1).abs() < TOLERANCE
    likelier_T = ((expected_TV > own_T1) & ~near).sum(-1).numpy() + 1
    assert (found.ranks_T >= likelier_T).all() and (found.ranks_T < likelier_T + near.sum(-1).numpy()).all()
    tops = found.top_logprobs(num_top)
    assert len(tops) == len(prompt) - 1
    for logprobs_V, top in zip(expected_TV, tops, strict=True):
        assert [value for _, value in top] == pytest.approx(
            logprobs_V.topk(num_top).values.tolist(), abs=1e-4
        )
        assert [float(logprobs_V[token]) for token, _ in top] == pytest.approx(
            [value for _, value in top], abs=1e-4
        )


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 256])
def test_they_are_the_targets_whatever_the_chunks(
    model: Any, open_engine: OpenEngine, chunk_tokens: int
) -> None:
    engine = open_engine(chunk_tokens=chunk_tokens)
    generation = generate(engine)
    check(model, generation)
    assert generation.output_token_ids == generate(engine, prompt_logprobs=None).output_token_ids


def test_a_warm_prefix_cache_hides_none_of_them_and_is_filled_by_them(
    model: Any, open_engine: OpenEngine
) -> None:
    engine = open_engine(caches=True)
    assert generate(engine, prompt_logprobs=None).prompt_logprobs is None
    assert generate(engine, prompt_logprobs=None).num_prompt_tokens_reused > 0
    again = generate(engine)
    check(model, again)
    assert again.num_prompt_tokens_reused == 0
    generate(engine, (1, *PROMPT))
    assert generate(engine, (1, *PROMPT), prompt_logprobs=None).num_prompt_tokens_reused > 0


def test_beside_others_each_gets_its_own(model: Any, open_engine: OpenEngine) -> None:
    engine = open_engine(chunk_tokens=16)
    asking = SamplingParams(temperature=0.0, max_tokens=6, prompt_logprobs=2)
    plain = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    expected = [generate(engine, prompt, max_tokens=40, prompt_logprobs=None) for prompt in OTHERS]
    others = [engine.submit(GenerationRequest("plain", prompt, plain)) for prompt in OTHERS]
    handles = [engine.submit(GenerationRequest("r", prompt, asking)) for prompt in (PROMPT, *OTHERS, PROMPT)]
    for handle in handles:
        check(model, handle.result(20), num_top=2)
    for handle, alone in zip(others, expected, strict=True):
        found = handle.result(20)
        assert found.output_token_ids == alone.output_token_ids and found.prompt_logprobs is None


def test_with_compiled_code_in_place_of_the_models_own(model: Any, open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.core.target.compiled = SlotPass(model, 128)
    check(model, generate(engine))


def test_a_prompt_that_is_routed_too_has_both(model: Any, open_engine: OpenEngine) -> None:
    engine = open_engine(caches=True, router=lambda embedding_H: "sql")
    unasked = generate(engine, prompt_logprobs=None)
    asked = generate(engine)
    check(model, asked)
    assert asked.route == unasked.route == "sql"
    assert asked.prompt_embedding_H is not None and unasked.prompt_embedding_H is not None
    assert np.allclose(asked.prompt_embedding_H, unasked.prompt_embedding_H, atol=2e-3)


def test_a_prompt_of_one_token_has_none(model: Any, open_engine: OpenEngine) -> None:
    check(model, generate(open_engine(), (9,)))


@pytest.mark.parametrize("num_top", [0, 20])
def test_as_many_of_the_likeliest_as_were_asked_for(
    model: Any, open_engine: OpenEngine, num_top: int
) -> None:
    check(model, generate(open_engine(), prompt_logprobs=num_top), num_top)


def test_they_come_once_with_the_first_event(open_engine: OpenEngine) -> None:
    events: list[TokenEvent] = []
    sampling = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, prompt_logprobs=1)
    generation = open_engine().submit(GenerationRequest("r", PROMPT, sampling), events.append).result(20)
    assert len(events) == 5
    assert [event.prompt_logprobs is not None for event in events] == [True, False, False, False, False]
    assert events[0].prompt_logprobs is generation.prompt_logprobs


def test_no_pass_has_more_logits_than_a_round_and_who_does_not_ask_has_those_of_one_position(
    model: Any, open_engine: OpenEngine
) -> None:
    counts: list[int] = []
    head: nn.Module = model.lm_head
    hook = head.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1]))
    try:
        generate(open_engine(), max_tokens=0, prompt_logprobs=0)
        assert max(counts) == NUM_SLOTS * (MAX_DRAFT_TOKENS + 1) and sum(counts) == len(PROMPT) - 1
        counts.clear()
        generate(open_engine(), max_tokens=0, prompt_logprobs=None)
        assert counts == [1, 1]
    finally:
        hook.remove()


@pytest.mark.parametrize("num_top", [None, 2])
def test_a_request_for_no_output_ends_with_its_prompt(
    model: Any, open_engine: OpenEngine, num_top: int | None
) -> None:
    engine = open_engine(caches=True, router=lambda embedding_H: "sql")
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=num_top)
    busy = engine.submit(GenerationRequest("busy", (5,), SamplingParams(max_tokens=60, ignore_eos=True)))
    prompts = [(*PROMPT[number:], *PROMPT[:number]) for number in range(6)] + [(3,)] * 6
    events: list[TokenEvent] = []
    handles = [
        engine.submit(GenerationRequest("r", prompt, sampling, capture=True), events.append)
        for prompt in prompts
    ]
    for handle in handles:
        generation = handle.result(20)
        assert (generation.finish_reason, generation.output_token_ids) == ("length", [])
        assert (generation.num_rounds, generation.captured_rounds) == (0, [])
        assert (generation.prompt_logprobs is None) == (num_top is None)
        if num_top is not None:
            check(model, generation, num_top)
    assert len(events) == len(prompts), "one event each"
    assert len(busy.result(20).output_token_ids) == 60
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_output_tokens) == (0, 0, 60)
    assert stats.num_prompt_tokens == 1 + sum(map(len, prompts))


def test_a_prompt_may_fill_the_context_where_no_output_follows(model: Any, open_engine: OpenEngine) -> None:
    engine, whole = open_engine(), tuple(range(100, 228))
    check(model, generate(engine, whole, max_tokens=0))
    with pytest.raises(ValueError, match="max_tokens=1"):
        generate(engine, whole, max_tokens=1)


def test_logits_that_are_not_finite_end_their_own_request_and_no_other(
    model: Any, open_engine: OpenEngine
) -> None:
    embedding = model.get_input_embeddings().weight
    embedding[9] = torch.nan
    engine = open_engine(caches=True)
    broken = generate(engine, (*PROMPT[:50], 9, *PROMPT[:20]), max_tokens=0)
    assert broken.finish_reason == "error" and "prefill" in broken.error and broken.prompt_logprobs is None
    check(model, generate(engine))
    assert engine.stats().num_running == 0


def test_one_that_is_cancelled_in_prefill_leaves_nothing_behind(model: Any, open_engine: OpenEngine) -> None:
    engine = open_engine(chunk_tokens=1)
    sampling = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=1)
    handles = [engine.submit(GenerationRequest("r", PROMPT, sampling)) for _ in range(4)]
    for handle in handles[:3]:
        handle.cancel()
    assert {handle.result(20).finish_reason for handle in handles[:3]} == {"cancelled"}
    check(model, handles[3].result(20), 1)
    assert engine.stats().num_running == 0


@pytest.mark.parametrize("wrong", [{"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"max_tokens": -1}])
def test_what_makes_no_sense_is_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)
