"""A prompt's embedding is the mean of the target's last hidden states, whatever the chunks and the prefixes;
it gives untagged requests their route, and costs nothing where nobody wants it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from serving.engine import Generation, GenerationRequest, SamplingParams
from serving.engine.core import EngineCore
from serving.engine.draft_length import DraftLengthController
from serving.engine.engine import Engine
from serving.engine.passes.hidden_states import HiddenStates, embedder_of
from serving.engine.passes.prefix_cache import PrefixCache
from serving.engine.passes.runner import Runner
from serving.engine.prefill import Router
from tests.support.table_model import TableModel
from tests.support.tiny_models import tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
PROMPT = tuple(range(40, 90))
BLOCK = 8

OpenEngine = Callable[..., Engine]


@pytest.fixture(params=["llama", "qwen3"])
def open_engine(request: pytest.FixtureRequest) -> Iterator[OpenEngine]:
    """Over a tiny target with random weights; no draft."""
    torch.manual_seed(0)
    model = tiny_model(request.param, 2, 320).requires_grad_(False).eval()
    opened: list[Engine] = []

    def open_one(router: Router | None, *, chunk_tokens: int = 64, caches: bool = False) -> Engine:
        runner = Runner(model, num_slots=2, max_seq_len=128)
        cache = PrefixCache(runner.cache, max_bytes=2**20, block_tokens=BLOCK) if caches else None
        controller = DraftLengthController(None, fixed=0)
        opened.append(
            Engine(
                EngineCore(
                    runner,
                    None,
                    controller=controller,
                    prefill_chunk_tokens=chunk_tokens,
                    prefix_cache=cache,
                    router=router,
                    embedder=embedder_of(runner),
                )
            )
        )
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()


def generate(engine: Engine, prompt: tuple[int, ...] = PROMPT, **request: Any) -> Generation:
    return engine.submit(GenerationRequest("r", prompt, GREEDY, **request)).result(20)


def to_sql(embedding_H: NDArray[np.float16]) -> str:
    return "sql"


def mean_state(engine: Engine, prompt: tuple[int, ...]) -> NDArray[Any]:
    """By the model alone. The prompt's last token is not in it: a round feeds it."""
    decoder: Any = engine.core.target.model.model
    with torch.inference_mode():
        hidden_TH = decoder(input_ids=torch.tensor([prompt[:-1]])).last_hidden_state[0]
    mean_H: NDArray[Any] = hidden_TH.mean(0).numpy()
    return mean_H


def distance(generation: Generation, expected_H: NDArray[Any]) -> float:
    found_H = generation.prompt_embedding_H
    assert found_H is not None and found_H.dtype == np.float16
    return float(np.abs(found_H - expected_H).max() / np.abs(expected_H).max())


@pytest.mark.parametrize("chunk_tokens", [3, 8, 64])
def test_it_is_the_mean_of_the_last_hidden_states_whatever_the_chunks(
    open_engine: OpenEngine, chunk_tokens: int
) -> None:
    engine = open_engine(to_sql, chunk_tokens=chunk_tokens)
    assert distance(generate(engine), mean_state(engine, PROMPT)) < 2e-3
    other = mean_state(engine, PROMPT[5:20])
    assert distance(generate(engine), other) > 0.05, "any two prompts are alike: the test would see nothing"


def test_a_prefix_that_is_copied_brings_its_part_along(open_engine: OpenEngine) -> None:
    engine = open_engine(to_sql, chunk_tokens=5, caches=True)
    generate(engine)
    longer = (*PROMPT[:30], *range(100, 120))
    for prompt in (PROMPT, longer):
        again = generate(engine, prompt)
        assert again.num_prompt_tokens_reused >= 24
        assert distance(again, mean_state(engine, prompt)) < 2e-3


def test_of_a_copied_output_nothing_is_known_and_the_rest_is_the_mean(open_engine: OpenEngine) -> None:
    engine = open_engine(to_sql, caches=True)
    first = generate(engine)
    turn = (*PROMPT, *first.output_token_ids, *range(100, 108))
    second = generate(engine, turn)
    reused = second.num_prompt_tokens_reused
    assert reused > len(PROMPT)
    decoder: Any = engine.core.target.model.model
    with torch.inference_mode():
        hidden_TH = decoder(input_ids=torch.tensor([turn[:-1]])).last_hidden_state[0]
    num_whole = (len(PROMPT) - 1) // BLOCK * BLOCK
    expected_H = torch.cat([hidden_TH[:num_whole], hidden_TH[reused:]]).mean(0).numpy()
    assert distance(second, expected_H) < 2e-3


def test_an_untagged_request_gets_the_route_that_its_embedding_says(open_engine: OpenEngine) -> None:
    seen: list[NDArray[np.float16]] = []

    def router(embedding_H: NDArray[np.float16]) -> str:
        seen.append(embedding_H)
        return "sql"

    engine = open_engine(router)
    assert generate(engine).route == "sql"
    assert distance(generate(engine), seen[0].astype(np.float32)) == 0.0
    assert generate(engine, route="code").route == "code"
    assert generate(engine, route="default", capture=True).route == "default"
    assert len(seen) == 2


def test_a_prompt_of_one_token_and_a_router_that_fails_leave_the_default_route(
    open_engine: OpenEngine,
) -> None:
    def router(embedding_H: NDArray[np.float16]) -> str:
        raise ValueError("another model's")

    engine = open_engine(router)
    assert generate(engine).route == "default"
    [one] = [generate(open_engine(to_sql), (7,))]
    assert (one.route, one.prompt_embedding_H, one.finish_reason) == ("default", None, "length")


def test_what_is_tagged_has_an_embedding_only_where_it_is_captured(open_engine: OpenEngine) -> None:
    engine = open_engine(to_sql)
    assert generate(engine, route="code").prompt_embedding_H is None
    assert distance(generate(engine, route="code", capture=True), mean_state(engine, PROMPT)) < 2e-3


def test_without_a_router_no_prompt_is_embedded(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HiddenStates, "forward", lambda *chunk: pytest.fail("a state was asked for"))
    plain = generate(open_engine(None), capture=True)
    assert (plain.prompt_embedding_H, plain.route, plain.finish_reason) == (None, "default", "length")
    routed = generate(open_engine(to_sql), route="code")
    assert routed.output_token_ids == plain.output_token_ids


def test_the_text_is_the_same_whoever_fills_the_cache(open_engine: OpenEngine) -> None:
    """By the decoder alone, or by the whole model."""
    plain, routed = generate(open_engine(None, chunk_tokens=7)), generate(open_engine(to_sql, chunk_tokens=7))
    assert routed.output_token_ids == plain.output_token_ids
    assert routed.logprobs == plain.logprobs


def test_a_target_without_a_decoder_of_its_own_is_not_embedded() -> None:
    runner = Runner(TableModel(7, seed=1), num_slots=1, max_seq_len=48)
    controller, embedder = DraftLengthController(None, fixed=0), embedder_of(runner)
    assert embedder is None
    with Engine(EngineCore(runner, None, controller=controller, router=to_sql, embedder=embedder)) as engine:
        generation = generate(engine, (1, 2, 3), capture=True)
    assert (generation.route, generation.prompt_embedding_H) == ("default", None)


def test_states_that_are_not_finite_give_no_embedding(open_engine: OpenEngine) -> None:
    engine = open_engine(to_sql)
    norm: Any = engine.core.target.model.model.norm  # type: ignore[union-attr]
    norm.weight.fill_(1e9)
    generation = generate(engine)
    assert (generation.route, generation.prompt_embedding_H) == ("default", None)
