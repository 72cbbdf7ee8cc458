"""Streams: the same text as whole answers, in OpenAI's chunks, read by the official clients."""

import asyncio
import json
from collections import defaultdict

import httpx
import openai
import pytest

from tests.support.live_server import LiveServer

MESSAGES = [{"role": "user", "content": "the quick brown fox"}]


def events(server: LiveServer, path: str, **body: object) -> list[str]:
    with httpx.stream("POST", server.url + path, json=body | {"stream": True}, timeout=30) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        raw = response.read().decode()
    assert raw.endswith("\n\n")
    lines = raw.split("\n\n")[:-1]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line.removeprefix("data: ") for line in lines]


@pytest.mark.parametrize("stop", [None, ["e"], ["Z", "=\u00e9", " na"]])
@pytest.mark.parametrize("seed", range(4))
def test_streamed_text_is_the_whole_text(client: openai.OpenAI, seed: int, stop: list[str] | None) -> None:
    request = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "seed": seed, "max_tokens": 40, "stop": stop}
    whole = client.completions.create(**request)
    texts: dict[int, str] = defaultdict(str)
    reasons: dict[int, str] = {}
    for chunk in client.completions.create(**request, stream=True):
        for choice in chunk.choices:
            assert choice.index not in reasons
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert [texts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [reasons[choice.index] for choice in whole.choices] == [c.finish_reason for c in whole.choices]


def test_chat_chunks_begin_with_the_role_and_end_with_the_reason_and_done(server: LiveServer) -> None:
    *chunks, done = events(server, "/v1/chat/completions", messages=MESSAGES, max_tokens=8, ignore_eos=True)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert parsed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {chunk["object"] for chunk in parsed} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in parsed}) == 1
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in parsed]
    assert reasons == [None] * (len(parsed) - 1) + ["length"]
    assert not any("usage" in chunk for chunk in parsed)


def test_usage_and_figures_come_in_one_more_chunk_when_asked_for(server: LiveServer) -> None:
    *chunks, last, done = events(
        server,
        "/v1/completions",
        prompt="a",
        max_tokens=8,
        ignore_eos=True,
        stream_options={"include_usage": True},
    )
    assert done == "[DONE]"
    assert all(json.loads(chunk)["usage"] is None for chunk in chunks)
    closing = json.loads(last)
    assert closing["choices"] == []
    assert closing["usage"]["completion_tokens"] == 8
    assert closing["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0


def test_streamed_logprobs_and_token_ids_are_those_of_the_whole_answer(client: openai.OpenAI) -> None:
    request = {"model": "tiny", "messages": MESSAGES, "seed": 2, "max_tokens": 20, "logprobs": True}
    extra = {"return_token_ids": True, "return_weight_versions": True}
    whole = client.chat.completions.create(**request, extra_body=extra)
    chunks = list(client.chat.completions.create(**request, stream=True, extra_body=extra))
    tokens = [token for c in chunks for token in (c.choices[0].model_extra.get("token_ids") or [])]
    assert tokens == whole.choices[0].model_extra["token_ids"]
    entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in entries] == [e.token for e in whole.choices[0].logprobs.content]
    assert [e.logprob for e in entries] == pytest.approx(
        [e.logprob for e in whole.choices[0].logprobs.content], abs=1e-4
    )
    assert chunks[0].model_extra["prompt_token_ids"] == whole.model_extra["prompt_token_ids"]
    last = chunks[-1].choices[0].model_extra["weight_versions"]
    assert last == whole.choices[0].model_extra["weight_versions"]


def test_an_echo_comes_before_the_first_token(server: LiveServer) -> None:
    first, *_ = events(server, "/v1/completions", prompt="hello", max_tokens=2, echo=True)
    assert json.loads(first)["choices"][0]["text"] == "hello"


def test_a_bad_request_is_refused_before_the_stream_begins(server: LiveServer) -> None:
    response = httpx.post(
        f"{server.url}/v1/completions", json={"prompt": [99999], "stream": True}, timeout=30
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.asyncio
async def test_many_async_streams_at_once_keep_apart(server: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:

        async def text(seed: int) -> str:
            request = {"model": "tiny", "prompt": "abc", "seed": seed, "max_tokens": 30}
            stream = await client.completions.create(**request, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*(text(seed) for seed in range(12)))
        alone = [await text(seed) for seed in range(12)]
    assert list(together) == alone
