"""`/v1/responses` as the official client sees it: whole, streamed, with tools and in a form."""

import json
from typing import Any

import openai
import pytest

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 4}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def respond(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(
        **{"model": "tiny", "input": "to three", "max_output_tokens": 24, "temperature": 0, **fields}
    )


def test_it_says_what_chat_says(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "count"}, {"role": "user", "content": "to three"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, temperature=0)
    answer = respond(client, instructions="count")
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.object, answer.id[:5], answer.model) == ("response", "resp_", "tiny")
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.model_extra["metrics"]["speculative_decoding"]["num_spec_steps"] > 0
    items: Any = [
        {"role": "developer", "content": [{"type": "input_text", "text": "count"}]},
        {"type": "message", "role": "user", "content": "to three"},
    ]
    assert respond(client, input=items).output_text == answer.output_text


def test_an_answer_that_reaches_its_limit_is_incomplete(client: openai.OpenAI) -> None:
    answer = respond(client, max_output_tokens=2)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI) -> None:
    whole = respond(client)
    events = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    last = events[-1].response
    assert events[-1].type == f"response.{whole.status}" and last.status == whole.status
    assert last.output_text == whole.output_text and last.usage == whole.usage


def test_the_clients_own_helper_follows_the_stream(caller: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "to three", "max_output_tokens": 24, "temperature": 0}
    with caller.responses.stream(**asked) as stream:
        said = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert said == final.output_text == respond(caller).output_text


def test_calls_are_items_and_their_results_go_back(caller: openai.OpenAI) -> None:
    whole = respond(caller, tools=[WEATHER])
    text, call = whole.output
    assert (text.type, text.content[0].text) == ("message", "Look:")
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "weather",
        {"city": "Oslo"},
    )
    assert whole.status == "completed"
    events = list(respond(caller, tools=[WEATHER], stream=True))
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == done.arguments == call.arguments
    assert [item.type for item in events[-1].response.output] == ["message", "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    again: Any = [
        {"role": "user", "content": "the weather?"},
        *[item.model_dump(exclude_none=True) for item in whole.output],
        result,
    ]
    longer = respond(caller, input=again, tools=[WEATHER])
    assert longer.usage.input_tokens > whole.usage.input_tokens + 10


def test_a_form_and_a_forced_tool_bind(client: openai.OpenAI, caller: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "it", "schema": {**schema, "additionalProperties": False}}
    assert json.loads(respond(client, text={"format": form}).output_text)["a"] in (1, 2)
    forced = respond(
        caller, tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}, max_output_tokens=64
    )
    assert [item.type for item in forced.output] == ["function_call"]
    assert len(json.loads(forced.output[0].arguments)["city"]) <= 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"colour": 1}}, "colour"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        respond(client, **fields)
    assert (refused.value.param or "").startswith(param)
