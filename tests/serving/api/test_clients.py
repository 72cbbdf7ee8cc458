"""What real clients send and expect: bodies as they write them, and two clients themselves."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.live_server import LiveServer

ROOT = Path(__file__).parents[3]
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
PLAIN: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "seed": 1},
    "/v1/chat/completions": {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": 1},
}
HARMLESS: list[dict[str, Any]] = [
    {"user": "me", "metadata": {"team": "a"}, "store": False},
    {"n": None, "stop": None, "logit_bias": None, "stream": None, "stream_options": None, "metadata": None},
    {"stop": [], "logit_bias": {}, "n": 1, "stream": False},
    {"temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0},
    {"tools": None, "tool_choice": None, "functions": None, "function_call": None, "response_format": None},
    {"tools": [], "tool_choice": "none"},
    {"tools": [], "tool_choice": "auto", "functions": [], "function_call": "auto"},
    {"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium"},
    {"parallel_tool_calls": True, "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s"},
    {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "use_beam_search": False},
    {
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "stop_token_ids": [],
        "min_tokens": 0,
    },
    {
        "prompt_logprobs": None,
        "logprobs": None,
        "truncate_prompt_tokens": None,
        "priority": 0,
        "cache_salt": "s",
    },
]
OF_CHAT: list[dict[str, Any]] = [
    {"logprobs": False, "top_logprobs": 0},
    {"logprobs": None, "top_logprobs": None},
    {"max_completion_tokens": 8},
    {"max_completion_tokens": None},
    {"max_tokens": None, "max_completion_tokens": 8},
    {"reasoning_effort": "none", "web_search_options": None, "audio": None, "prediction": None},
    {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}},
]
OF_COMPLETIONS: list[dict[str, Any]] = [
    {"suffix": None, "echo": False, "best_of": 1},
    {"suffix": "", "best_of": None, "echo": None},
]


def said(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


@pytest.mark.parametrize(
    ("path", "fields"),
    [(path, fields) for path in PLAIN for fields in HARMLESS]
    + [("/v1/chat/completions", fields) for fields in OF_CHAT]
    + [("/v1/completions", fields) for fields in OF_COMPLETIONS],
    ids=str,
)
def test_bodies_that_ask_for_nothing_more_are_answered_alike(
    server: LiveServer, path: str, fields: dict[str, Any]
) -> None:
    plain = httpx.post(server.url + path, json=PLAIN[path])
    answer = httpx.post(server.url + path, json=PLAIN[path] | fields)
    assert answer.status_code == 200, answer.text
    assert said(answer.json()) == said(plain.json()) != ""


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"stop": ""}, "stop", "1 to 1024 characters"),
        ({"stop": ["a", ""]}, "stop", "1 to 1024 characters"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "when stream is true"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"documents": [{"text": "a"}]}, "documents", "not supported"),
        ({"chat_template": "{{ messages }}"}, "chat_template", "not supported"),
    ],
    ids=str,
)
def test_what_openai_refuses_or_would_change_the_answer_is_refused_by_name(
    server: LiveServer, fields: dict[str, Any], param: str, reason: str
) -> None:
    path = "/v1/chat/completions"
    refused = httpx.post(server.url + path, json=PLAIN[path] | fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert reason in refused.json()["error"]["message"]


def test_the_official_client_s_stream_helper_collects_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "seed": 2, "max_tokens": 20}
    longer = client.chat.completions.create(**asked).choices[0].message.content or ""
    asked["stop"] = longer[len(longer) // 2]  # the helper takes no answer that was cut
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage is not None and whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_the_asynchronous_client_reads_streams_side_by_side(
    server: LiveServer, client: openai.OpenAI
) -> None:
    async def streamed(opened: openai.AsyncOpenAI, seed: int) -> tuple[str, int]:
        text, num_tokens = "", 0
        stream = await opened.chat.completions.create(
            model="tiny",
            messages=MESSAGES,  # type: ignore[arg-type]
            seed=seed,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            num_tokens = num_tokens if chunk.usage is None else chunk.usage.completion_tokens
        return text, num_tokens

    async def all_of_them() -> list[tuple[str, int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
            return list(await asyncio.gather(*(streamed(opened, seed) for seed in range(6))))

    for seed, (text, num_tokens) in enumerate(asyncio.run(all_of_them())):
        whole = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=seed, max_tokens=20)
        assert whole.usage is not None
        assert (text, num_tokens) == (whole.choices[0].message.content, whole.usage.completion_tokens)


def test_the_client_comes_back_after_429_when_it_was_told_to(
    server: LiveServer, client: openai.OpenAI
) -> None:
    admission = server.parts.context.admission
    server.wait_until_idle()
    everything = admission.admit(260, 1)
    before, began_s = admission.num_rejected, time.monotonic()

    def make_room() -> None:
        while admission.num_rejected == before:
            time.sleep(0.005)
        everything.release()

    releasing = threading.Thread(target=make_room)
    releasing.start()
    try:
        patient = client.with_options(max_retries=3).completions
        answer = patient.with_raw_response.create(model="tiny", prompt="a", max_tokens=1)
    finally:
        everything.release()
        releasing.join(10)
    assert answer.retries_taken == 1
    assert time.monotonic() - began_s >= 1.0, "Retry-After is a second or more"


def test_the_client_comes_back_after_503(server: LiveServer, client: openai.OpenAI) -> None:
    context = server.parts.context
    with pytest.raises(openai.InternalServerError) as unready:
        context.draining = True
        client.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert unready.value.status_code == 503
    soon = threading.Timer(0.3, lambda: setattr(context, "draining", False))
    soon.start()
    try:
        patient = client.with_options(max_retries=10).completions
        answer = patient.with_raw_response.create(model="tiny", prompt="a", max_tokens=1)
    finally:
        soon.join(10)
        context.draining = False
    assert answer.retries_taken >= 1


def test_a_client_that_gives_up_leaves_nothing_running(server: LiveServer, client: openai.OpenAI) -> None:
    hasty = client.with_options(timeout=0.05, max_retries=0)
    with pytest.raises(openai.APITimeoutError):
        hasty.completions.create(
            model="tiny", prompt="a", n=48, max_tokens=250, extra_body={"ignore_eos": True}
        )
    server.wait_until_idle()


@pytest.mark.skipif(find_spec("litellm") is None, reason="litellm comes with the extra clients")
def test_litellm_gets_what_the_official_client_gets(server: LiveServer, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "seed": 5, "max_tokens": 12}
    command = [sys.executable, "-m", "tests.support.litellm_client", server.url]
    done = subprocess.run(
        command, input=json.dumps(asked), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    whole = client.chat.completions.create(model="tiny", **asked)
    assert whole.usage is not None
    assert got["whole"] == got["streamed"] == got["later"] == whole.choices[0].message.content
    assert got["usage"] == got["streamed_usage"] == whole.usage.completion_tokens
    assert got["again"] in ("stop", "length"), "its own message may come back"
    text = client.completions.create(model="tiny", prompt=MESSAGES[0]["content"], seed=5, max_tokens=12)
    assert got["text"] == text.choices[0].text
    assert got["bad"].startswith("BadRequestError") and "temperature" in got["bad"]
    assert got["absent"].startswith("NotFoundError") and "'other' does not exist" in got["absent"]


def test_a_body_with_every_null_is_answered(server: LiveServer) -> None:
    """Clients in typed languages send all that they know of."""
    properties = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    for path, schema in (("/v1/completions", "CompletionBody"), ("/v1/chat/completions", "ChatBody")):
        nulls = dict.fromkeys(properties[schema]["properties"])
        content = json.dumps(nulls | PLAIN[path])
        answer = httpx.post(server.url + path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
