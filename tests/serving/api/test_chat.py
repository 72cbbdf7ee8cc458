"""`POST /v1/chat/completions` as the official client sees it."""

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from serving.api.token_codec import TokenCodec
from tests.support.tiny_models import tiny_tokenizer

MESSAGES = [{"role": "system", "content": "count"}, {"role": "user", "content": "to three"}]


def chat(client: openai.OpenAI, **fields: object) -> ChatCompletion:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": MESSAGES, "max_tokens": 16, **fields}
    )


def test_messages_go_through_the_models_template(client: openai.OpenAI) -> None:
    answer = chat(client, seed=1, extra_body={"return_token_ids": True})
    codec = TokenCodec(tiny_tokenizer())
    text = "<|system|>count<|end|><|user|>to three<|end|><|assistant|>"
    assert answer.model_extra["prompt_token_ids"] == codec.encode(text, add_special_tokens=False)
    assert (answer.object, answer.id[:9]) == ("chat.completion", "chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    same = client.completions.create(
        model="tiny", prompt=answer.model_extra["prompt_token_ids"], max_tokens=16, seed=1
    )
    assert same.choices[0].text == answer.choices[0].message.content


def test_content_parts_are_joined_and_developer_means_system(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "to "}, {"type": "text", "text": "three"}]
    messages = [{"role": "developer", "content": "count"}, {"role": "user", "content": parts}]
    plain, other = chat(client, seed=1), chat(client, seed=1, messages=messages)
    assert plain.choices[0].message.content == other.choices[0].message.content


def test_max_completion_tokens_is_the_newer_name(client: openai.OpenAI) -> None:
    answer = chat(client, max_completion_tokens=3, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3


def test_without_a_limit_the_context_is_the_limit(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"


def test_logprobs_come_as_content_with_bytes(client: openai.OpenAI) -> None:
    answer = chat(client, seed=1, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True})
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 16
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


@pytest.mark.parametrize("logprobs", [{"logprobs": False}, {}])
def test_no_top_logprobs_of_no_logprobs_is_nothing_asked_for(
    client: openai.OpenAI, logprobs: dict[str, bool]
) -> None:
    assert chat(client, top_logprobs=0, **logprobs).choices[0].logprobs is None


def test_choices_of_one_seed_differ(client: openai.OpenAI) -> None:
    answer = chat(client, seed=1, n=3)
    assert len({choice.message.content for choice in answer.choices}) == 3
    again = chat(client, seed=1, n=3)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs"),
        ({"max_completion_tokens": 300}, "max_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **fields)
    assert refused.value.param is not None and refused.value.param.startswith(param)


def test_neutral_values_of_unsupported_fields_change_nothing(client: openai.OpenAI) -> None:
    plain = chat(client, seed=1)
    answer = chat(
        client,
        seed=1,
        response_format={"type": "text"},
        tool_choice="none",
        service_tier="auto",
        parallel_tool_calls=False,
        user="me",
        metadata={"a": "b"},
    )
    assert answer.choices[0].message.content == plain.choices[0].message.content


def test_penalties_and_bias_change_the_text_the_same_with_and_without_speculation(
    client: openai.OpenAI,
) -> None:
    fields = {"temperature": 0, "max_tokens": 40}
    plain = chat(client, **fields, frequency_penalty=0, presence_penalty=0.0, logit_bias={})
    asked: list[dict[str, Any]] = [
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2},
        {"extra_body": {"repetition_penalty": 1.8}},
        {"logit_bias": {"70": 100}},
    ]
    for change in asked:
        body = {"ignore_eos": True, **change.pop("extra_body", {})}
        drafted = chat(client, **fields, **change, extra_body=body)
        alone = chat(client, **fields, **change, extra_body={**body, "num_draft_tokens": 0})
        assert drafted.choices[0].message.content == alone.choices[0].message.content
        assert drafted.choices[0].message.content != plain.choices[0].message.content


def test_only_allowed_ids_are_emitted_and_a_bias_of_minus_100_as_good_as_bans(client: openai.OpenAI) -> None:
    body = {"allowed_token_ids": [70, 71, 72], "return_token_ids": True}
    answer = chat(client, temperature=2, logit_bias={"71": -100}, extra_body=body)
    assert set(answer.choices[0].model_extra["token_ids"]) == {70, 72}
