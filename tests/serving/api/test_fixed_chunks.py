"""Streams whose chunks do not tell what was drafted: as many tokens each, and bytes of a multiple."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.fixed_chunks import FixedChunks
from serving.api.sse import event
from serving.engine.request import Generation, SamplingParams, TokenEvent
from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server

SENT: dict[str, Any] = {"prompt": "the quick", "seed": 3, "max_tokens": 23, "ignore_eos": True}
INTERVAL, PADDING = 4, 128


@pytest.fixture(scope="module")
def private(tiny_pair: tuple[str, str]) -> Iterator[LiveServer]:
    settings = ServingSettings(
        compile="off",
        target=tiny_pair[0],
        draft=tiny_pair[1],
        model_name="tiny",
        num_slots=4,
        max_seq_len=256,
        num_draft_tokens=5,
        stream_interval=INTERVAL,
        stream_padding_bytes=PADDING,
    )
    with live_server(settings) as live:
        yield live


def ended(token_ids: list[int]) -> Generation:
    return Generation(
        request_id="r",
        choice_index=0,
        route="default",
        sampling=SamplingParams(),
        prompt_token_ids=(1,),
        output_token_ids=token_ids,
        finish_reason="length",
        logprobs=[],
        top_logprobs=[],
        num_rounds=1,
        num_drafted=0,
        num_attempted=0,
        num_accepted=0,
        draft_versions=[],
        accepted_histogram=[],
    )


@given(st.lists(st.integers(0, 7), max_size=12), st.integers(2, 6))
def test_chunks_have_their_number_of_tokens_whatever_the_rounds(rounds: list[int], size: int) -> None:
    """A round may bring none, as the first event of a prompt's log-probabilities does."""
    tokens, chunks, cut = list(range(sum(rounds))), FixedChunks(size), 0
    found: list[TokenEvent] = []
    for number, num_tokens in enumerate(rounds):
        ids = tuple(tokens[cut : cut + num_tokens])
        cut += num_tokens
        last = ended(tokens) if number == len(rounds) - 1 else None
        arrived = TokenEvent("r", ids, tuple(map(float, ids)), generation=last)
        found += chunks.cut(arrived)
    if not rounds:
        return
    assert [token for chunk in found for token in chunk.token_ids] == tokens
    assert [value for chunk in found for value in chunk.logprobs] == list(map(float, tokens))
    assert [len(chunk.token_ids) for chunk in found[:-1]] == [size] * (len(found) - 1)
    assert len(found[-1].token_ids) <= size
    assert [chunk.generation is not None for chunk in found] == [False] * (len(found) - 1) + [True]


@pytest.mark.parametrize("text", ['{"a":1}', '{"text":"h\u00e9 \u4f60"}', '{"x":"' + "y" * 500 + '"}'])
@pytest.mark.parametrize("name", [None, "response.created"])
def test_an_event_is_padded_in_bytes_and_stays_the_same_json(text: str, name: str | None) -> None:
    padded = event(text, name, padded_to=64)
    assert len(padded.encode()) % 64 == 0
    body = json.loads(padded.partition("data: ")[2])
    assert set(body) - set(json.loads(text)) == {"obfuscation"}
    assert {key: value for key, value in body.items() if key != "obfuscation"} == json.loads(text)
    assert event(text, name) == event(text, name, padded_to=0)


def raw_events(server: LiveServer, path: str, **body: Any) -> list[bytes]:
    with httpx.stream("POST", server.url + path, json=body | {"stream": True}, timeout=30) as response:
        assert response.status_code == 200
        return [part + b"\n\n" for part in response.read().split(b"\n\n") if part]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", SENT),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 23}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 23}),
    ],
)
def test_every_event_of_a_stream_is_a_multiple_long(
    private: LiveServer, server: LiveServer, path: str, body: dict[str, Any]
) -> None:
    sizes = [len(part) for part in raw_events(private, path, **body) if b"[DONE]" not in part]
    assert sizes and {size % PADDING for size in sizes} == {0}
    control = [len(part) for part in raw_events(server, path, **body) if b"[DONE]" not in part]
    assert {size % PADDING for size in control} != {0}


def answer(server: LiveServer, **asked: Any) -> list[dict[str, Any]]:
    """The choices of a stream's chunks, as OpenAI's own client reads them."""
    request = {name: value for name, value in SENT.items() if name != "ignore_eos"}
    extra = {"return_token_ids": True, "ignore_eos": True}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chunks = client.completions.create(model="tiny", stream=True, extra_body=extra, **request, **asked)
        return [chunk.choices[0].model_dump() for chunk in chunks]


def test_clients_read_the_same_text_in_chunks_of_as_many_tokens(
    private: LiveServer, server: LiveServer
) -> None:
    """The other server does neither: its chunks are as rounds brought them."""
    chunks = answer(private)
    assert text_of(chunks) == text_of(answer(server))
    counts = [len(chunk["token_ids"]) for chunk in chunks]
    assert counts == [INTERVAL] * (23 // INTERVAL) + [23 % INTERVAL]


@pytest.mark.parametrize("stop", [["e"], ["qu"], ["never to be found"]])
def test_stop_strings_end_the_same_text(private: LiveServer, server: LiveServer, stop: list[str]) -> None:
    chunks, other = answer(private, stop=stop), answer(server, stop=stop)
    assert text_of(chunks) == text_of(other)
    assert chunks[-1]["finish_reason"] == other[-1]["finish_reason"]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["text"] for chunk in chunks)


def test_a_request_may_ask_for_padding_or_do_without(private: LiveServer, server: LiveServer) -> None:
    def is_padded(of: LiveServer, asked: bool | None) -> bool:
        options = {"include_obfuscation": asked}
        return b'"obfuscation"' in raw_events(of, "/v1/completions", **SENT, stream_options=options)[0]

    assert [is_padded(private, asked) for asked in (None, True, False)] == [True, True, False]
    assert [is_padded(server, asked) for asked in (None, True, False)] == [False, True, False]
    first, *_ = raw_events(server, "/v1/completions", **SENT, stream_options={"include_obfuscation": True})
    assert len(first) % 256 == 0
