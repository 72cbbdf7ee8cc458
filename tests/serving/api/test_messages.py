"""Messages as clients really send them: with what they keep beside, continued, and of older roles."""

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.serving.api.test_token_codec import CODEC
from tests.support.live_server import LiveServer

USER = {"role": "user", "content": "to three"}


def prompt_of(client: openai.OpenAI, *messages: Any, **fields: Any) -> str:
    """What the template made of them."""
    answer: ChatCompletion = client.chat.completions.create(
        model="tiny", messages=list(messages), max_tokens=1, extra_body={"return_token_ids": True, **fields}
    )
    assert answer.model_extra is not None
    return CODEC.decode(answer.model_extra["prompt_token_ids"])


PLAIN = "<|assistant|>one<|end|><|user|>to three<|end|><|assistant|>"


@pytest.mark.parametrize(
    "beside",
    [
        {"annotations": [{"type": "url_citation"}]},
        {"annotations": []},
        {"audio": None},
        {"refusal": None},
        {"reasoning_content": "I count"},
        {"reasoning": "I count"},
        {"reasoning_content": None, "reasoning": None},
        {"cache_control": {"type": "ephemeral"}},
        {"tool_calls": None},
        {"tool_calls": []},
        {"function_call": None},
        {"name": "ann"},
        {"id": "msg_1"},
        {"provider_specific_fields": {"refusal": None}},
        {"content": [{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}]},
        {"content": [{"type": "text", "text": "one", "annotations": []}]},
        {"content": [{"type": "input_text", "text": "o"}, {"type": "output_text", "text": "ne"}]},
        {"content": [{"type": "refusal", "refusal": "one"}]},
        {"content": None, "refusal": "one"},
        {"content": "", "refusal": "one"},
        {"content": [{"type": "text", "text": "one", "refusal": None}]},
    ],
    ids=str,
)
def test_what_clients_keep_beside_a_message_is_never_fatal(
    client: openai.OpenAI, beside: dict[str, Any]
) -> None:
    assert prompt_of(client, {"role": "assistant", "content": "one", **beside}, USER) == PLAIN


def test_an_answer_may_come_back_as_it_was(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=[USER], max_tokens=8)
    message = answer.choices[0].message
    for said in (message, message.model_dump(), message.to_dict()):
        assert prompt_of(client, USER, said, USER).count("<|user|>to three") == 2


def test_a_function_s_message_is_a_tool_s_with_its_name(client: openai.OpenAI) -> None:
    assert prompt_of(client, USER, {"role": "function", "name": "add", "content": "3"}).startswith(
        "<|user|>to three<|end|><|tool|>3<|end|>"
    )


def test_reasoning_reaches_the_template(server: LiveServer, client: openai.OpenAI) -> None:
    tokenizer = server.parts.engine.tokenizer
    assert tokenizer is not None
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.name }}:{{ m.reasoning_content }}|{{ m.content }};{% endfor %}"
    )
    try:
        for field in ("reasoning_content", "reasoning"):
            message = {"role": "assistant", "name": "ann", field: "I <|end|> count", "content": "one"}
            assert prompt_of(client, message) == "ann:I <|end|> count|one;"
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize(
    ("message", "param", "said"),
    [
        (
            {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "content[0].type",
            "reads text only",
        ),
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, "content[0].type", "'input_audio'"),
        ({"content": [{"type": "file"}]}, "content[0].type", "reads text only"),
        ({"content": [{"type": "text"}]}, "content[0].text", "must be"),
        ({"content": [{"type": "text", "refusal": "no"}]}, "content[0].text", "must be"),
        ({"content": [{"type": "text", "text": "a", "refusal": "no"}]}, "content[0].text", "no other"),
        ({"content": [{"text": "a"}]}, "content[0].type", "required"),
        ({"content": 3}, "content", "a text or a list of parts"),
        ({"content": {"type": "text"}}, "content", "a text or a list of parts"),
        ({"audio": {"id": "a"}}, "audio", "not supported"),
        ({"mood": "good"}, "mood", "no field that is known"),
        ({"role": "robot"}, "role", "'system'"),
    ],
    ids=str,
)
def test_what_a_template_could_not_say_is_refused_by_name(
    client: openai.OpenAI, message: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        prompt_of(client, {"role": "user", "content": "a", **message})
    assert refused.value.param == f"messages[0].{param}"


def test_the_last_message_is_continued(client: openai.OpenAI) -> None:
    begun = {"role": "assistant", "content": "one, <|end|> two"}
    asked = {"continue_final_message": True, "add_generation_prompt": False}
    assert prompt_of(client, USER, begun, **asked) == "<|user|>to three<|end|><|assistant|>one, <|end|> two"
    whole = prompt_of(client, USER, begun, add_generation_prompt=False)
    assert whole.endswith("two<|end|>"), "the control: without it the message is ended"


def test_tokenize_continues_a_message_as_chat_does(client: openai.OpenAI, server: LiveServer) -> None:
    import httpx

    body = {"messages": [USER], "continue_final_message": True, "add_generation_prompt": False}
    tokens = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
    assert CODEC.decode(tokens) == "<|user|>to three"


def test_a_prompt_has_one_end(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="add_generation_prompt to be false") as refused:
        prompt_of(client, USER, continue_final_message=True)
    assert refused.value.param == "continue_final_message"


def test_why_a_message_cannot_be_continued_is_said(server: LiveServer, client: openai.OpenAI) -> None:
    tokenizer = server.parts.engine.tokenizer
    assert tokenizer is not None
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}content"
    try:
        with pytest.raises(openai.BadRequestError, match="does not appear in the chat"):
            prompt_of(client, USER, continue_final_message=True, add_generation_prompt=False)
    finally:
        tokenizer.chat_template = before
