"""Log-probabilities of prompts as the official client sees them, in OpenAI's shape by `echo` and in vLLM's;
and completions of no token."""

import json
from collections.abc import Mapping
from typing import Any

import httpx
import openai
import pytest
import torch
from openai.types import Completion, CompletionChoice
from transformers import AutoModelForCausalLM

from serving.api.logprobs import echoed_logprobs
from serving.api.token_codec import TokenCodec
from serving.engine.request import PromptLogprobs
from tests.serving.api.test_streaming import events
from tests.support.live_server import LiveServer
from tests.support.tiny_models import tiny_tokenizer

PROMPT = "the quick brown fox, naïve café"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
CODEC = TokenCodec(tiny_tokenizer())
IDS = CODEC.encode(PROMPT, add_special_tokens=True)
IGNORE_EOS = {"ignore_eos": True}


def complete(client: openai.OpenAI, prompt: object = PROMPT, **fields: Any) -> Completion:
    return client.completions.create(**{"model": "tiny", "prompt": prompt, "max_tokens": 6, **fields})


@pytest.fixture(scope="module")
def target(tiny_pair: tuple[str, str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_pair[0]).eval()


@torch.inference_mode()
def reference(target: Any, token_ids: list[int]) -> list[list[float]]:
    """Log-probabilities over the vocabulary behind each token but the last, by transformers alone."""
    rows: list[list[float]] = target(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1).tolist()
    return rows


def check_echo(target: Any, choice: CompletionChoice, token_ids: list[int], num_top: int) -> None:
    """A choice whose `logprobs` are those of `token_ids`, the prompt's first."""
    found = choice.logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    assert found.tokens == [CODEC.token_text(token) for token in token_ids]
    first_value: Any = found.token_logprobs[0]
    first_top: Any = found.top_logprobs[0]
    assert first_value is None and first_top is None
    rows = reference(target, token_ids)
    for token, value, top, row in zip(
        token_ids[1:], found.token_logprobs[1:], found.top_logprobs[1:], rows, strict=True
    ):
        assert value == pytest.approx(row[token], abs=1e-4)
        text = CODEC.token_text(token)
        assert top[text] == value or (text == "\ufffd" and top[text] > value), "of equal texts the likelier"
        assert max(top.values()) == pytest.approx(max(row), abs=1e-4) if num_top else len(top) == 1
        assert 1 <= len(top) <= num_top + 1


@pytest.mark.parametrize("num_top", [0, 1, 4])
def test_echo_with_logprobs_has_those_of_the_prompt_then_those_of_the_output(
    client: openai.OpenAI, target: Any, num_top: int
) -> None:
    asked = {"temperature": 0, "logprobs": num_top, "extra_body": {"return_token_ids": True, **IGNORE_EOS}}
    plain = complete(client, **asked).choices[0]
    [choice] = complete(client, echo=True, **asked).choices
    assert choice.text == PROMPT + plain.text
    assert plain.model_extra is not None and choice.model_extra is not None
    assert choice.model_extra["token_ids"] == plain.model_extra["token_ids"]
    check_echo(target, choice, IDS + plain.model_extra["token_ids"], num_top)
    found, alone = choice.logprobs, plain.logprobs
    assert found is not None and alone is not None
    assert found.tokens is not None and found.tokens[len(IDS) :] == alone.tokens
    assert found.text_offset is not None and alone.text_offset is not None
    assert found.text_offset[len(IDS) :] == [len(PROMPT) + offset for offset in alone.text_offset]


def test_offsets_count_from_the_start_of_the_echoed_prompt(client: openai.OpenAI) -> None:
    [choice] = complete(client, echo=True, logprobs=1, max_tokens=0).choices
    assert choice.text == PROMPT and choice.logprobs is not None
    offsets, tokens = choice.logprobs.text_offset, choice.logprobs.tokens
    assert offsets is not None and tokens is not None and offsets[0] == 0
    for token, start, end in zip(tokens, offsets, [*offsets[1:], len(PROMPT)], strict=True):
        assert "\ufffd" in token or PROMPT[start:end] == token


@pytest.mark.parametrize("given", [IDS, [IDS], [5, *IDS, 0, 7]])
def test_a_prompt_of_token_ids_is_echoed_as_text(client: openai.OpenAI, target: Any, given: Any) -> None:
    token_ids = given[0] if isinstance(given[0], list) else given
    [choice] = complete(client, given, echo=True, logprobs=2, max_tokens=0).choices
    assert choice.text == CODEC.decode(token_ids)
    check_echo(target, choice, token_ids, 2)
    assert choice.logprobs is not None and choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[-1] < len(choice.text)


def test_what_the_tokenizer_adds_before_a_text_takes_no_place_in_it() -> None:
    end = 0  # a special token, spelled <|end|>
    empty = PromptLogprobs.empty(0)
    zeros = PromptLogprobs(*(torch.zeros(2, *shape).numpy() for shape in ((), (), (0,), (0,))))

    def offsets(token_ids: list[int], echo: str, found: PromptLogprobs) -> list[int]:
        return echoed_logprobs(CODEC, token_ids, echo, found, 0).text_offset

    [letter, space_letter] = (
        CODEC.encode("a", add_special_tokens=False),
        CODEC.encode(" a", add_special_tokens=False),
    )
    assert offsets([end, *letter, *letter], "aa", zeros) == [0, 0, 1]
    assert offsets([end, *letter, *letter], "<|end|>aa", zeros) == [0, 7, 8]
    assert offsets([*letter, end, *letter], "a<|end|>a", zeros) == [0, 1, 8]
    assert offsets(letter, "a", empty) == [0]
    padded = [end] * (3 - len(space_letter)) + space_letter
    assert offsets(padded, "a", zeros)[-1] == 0 and offsets(padded, " a", zeros)[0] == 0


def test_a_stream_brings_the_echo_and_its_logprobs_in_the_first_chunk_of_each_choice(
    client: openai.OpenAI,
) -> None:
    asked: dict[str, Any] = {"echo": True, "logprobs": 2, "n": 2, "seed": 3, "extra_body": IGNORE_EOS}
    whole = complete(client, [PROMPT, "a b"], **asked)
    chunks: dict[int, list[CompletionChoice]] = {}
    for chunk in complete(client, [PROMPT, "a b"], stream=True, **asked):
        for choice in chunk.choices:
            chunks.setdefault(choice.index, []).append(choice)
    for choice in whole.choices:
        streamed = chunks[choice.index]
        assert "".join(part.text for part in streamed) == choice.text
        assert streamed[0].text.startswith((PROMPT, "a b")[choice.index // 2])
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            told = [value for part in streamed if part.logprobs for value in getattr(part.logprobs, name)]
            expected = getattr(choice.logprobs, name)
            if name == "top_logprobs":
                assert [None if top is None else list(top) for top in told] == [
                    None if top is None else list(top) for top in expected
                ]
            elif name == "token_logprobs":
                assert told[1:] == pytest.approx(expected[1:], abs=1e-4) if told[0] is None else None
            else:
                assert told == expected


def test_a_stream_without_logprobs_echoes_before_any_token(server: LiveServer) -> None:
    first, *_ = events(server, "/v1/completions", prompt=PROMPT, echo=True, max_tokens=3)
    assert json.loads(first)["choices"][0]["text"] == PROMPT


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_no_token_may_be_asked_for(
    client: openai.OpenAI, server: LiveServer, echo: bool, logprobs: int | None
) -> None:
    exporter = server.parts._exporters["replay"]
    server.wait_until_idle()
    before, emitted = exporter.num_submitted, server.parts.engine.stats().num_output_tokens
    prompts = [PROMPT, "a b", "c"]
    answer = complete(client, prompts, max_tokens=0, n=2, echo=echo, logprobs=logprobs)
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 6
    texts = [prompt if echo else "" for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage is not None
    num_prompt = sum(len(CODEC.encode(prompt, add_special_tokens=True)) for prompt in prompts)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt, 0)
    streamed: dict[int, str] = {}
    for chunk in complete(client, prompts, max_tokens=0, n=2, echo=echo, logprobs=logprobs, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[index] for index in range(6)] == texts
    assert server.parts.engine.stats().num_output_tokens == emitted
    assert exporter.num_submitted == before, "nothing is recorded"
    server.wait_until_idle()
    assert httpx.get(f"{server.url}/metrics").status_code == 200


def check_by_token(
    target: Any, found: list[Mapping[str, Any] | None], token_ids: list[int], num_top: int
) -> None:
    assert found[0] is None and len(found) == len(token_ids)
    for token, entry, row in zip(token_ids[1:], found[1:], reference(target, token_ids), strict=True):
        assert entry is not None
        own = entry[str(token)]
        assert next(iter(entry)) == str(token)
        assert own["logprob"] == pytest.approx(row[token], abs=1e-4)
        assert own["decoded_token"] == CODEC.token_text(token)
        ranks = sorted(each["rank"] for each in entry.values())
        assert ranks == (
            [*range(1, num_top + 1)] if own["rank"] <= num_top else [*range(1, num_top + 1), own["rank"]]
        )
        for other, each in entry.items():
            assert each["logprob"] == pytest.approx(row[int(other)], abs=1e-4)


@pytest.mark.parametrize("num_top", [0, 3])
def test_vllms_field_gives_them_by_token_id(client: openai.OpenAI, target: Any, num_top: int) -> None:
    asked = {"prompt_logprobs": num_top}
    answer = complete(client, [IDS, IDS[:4]], n=2, extra_body=asked)
    for choice in answer.choices:
        assert choice.model_extra is not None and choice.logprobs is None
        check_by_token(
            target, choice.model_extra["prompt_logprobs"], [IDS, IDS[:4]][choice.index // 2], num_top
        )
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=3, n=2, extra_body=asked | {"return_token_ids": True}
    )
    assert chat.model_extra is not None
    check_by_token(target, chat.model_extra["prompt_logprobs"], chat.model_extra["prompt_token_ids"], num_top)


def test_each_field_gets_as_many_as_it_asked_for(client: openai.OpenAI, target: Any) -> None:
    fields = {"prompt_logprobs": 3}
    [choice] = complete(client, echo=True, logprobs=1, max_tokens=0, extra_body=fields).choices
    check_echo(target, choice, IDS, 1)
    assert choice.model_extra is not None
    check_by_token(target, choice.model_extra["prompt_logprobs"], IDS, 3)
    assert "prompt_logprobs" not in (complete(client, echo=True, logprobs=1).choices[0].model_extra or {})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_they_are_refused_in_a_stream(server: LiveServer, path: str) -> None:
    body = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": MESSAGES}
    answer = httpx.post(server.url + path, json={**body, "prompt_logprobs": 1, "stream": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt_logprobs"


def test_chat_has_no_answer_of_no_token(server: LiveServer) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 0})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "max_tokens"


def test_a_prompt_may_fill_the_context_where_no_token_is_asked_for(client: openai.OpenAI) -> None:
    answer = complete(client, [5] * 256, max_tokens=0)
    assert answer.usage is not None and answer.usage.total_tokens == 256
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, [5] * 257, max_tokens=0)
    assert refused.value.code == "context_length_exceeded"


def test_lm_evals_requests_say_how_likely_a_continuation_is(server: LiveServer, target: Any) -> None:
    """What `local-completions` sends, and how it reads the answer."""
    context, continuations = IDS[:6], [IDS[6:], [9, 8, 7]]
    body = {
        "model": "tiny",
        "prompt": [context + continuation for continuation in continuations],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"]
    for choice, continuation in zip(choices, continuations, strict=True):
        values = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        rows = reference(target, context + continuation)[len(context) - 1 :]
        assert sum(values) == pytest.approx(
            sum(row[token] for row, token in zip(rows, continuation, strict=True)), abs=1e-3
        )
        is_greedy = [value == max(top.values()) for value, top in zip(values, tops, strict=True)]
        assert is_greedy == [row[token] == max(row) for row, token in zip(rows, continuation, strict=True)]
    chat = {"messages": [{"role": "user", "type": "text", "content": "a"}], "stop": ["\n\n"], "max_tokens": 4}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={**chat, "temperature": 0, "seed": 1234})
    assert answer.status_code == 200
