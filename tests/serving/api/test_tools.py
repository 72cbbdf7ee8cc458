"""Tools as the official client sees them: on models that call by themselves, and where a call is forced."""

import json
from typing import Any

import openai
import pytest

from tests.serving.api.conftest import PIECES

SAID = "".join(PIECES)
MESSAGES: Any = [{"role": "user", "content": "the weather?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 4}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
REFERS: Any = {
    "type": "function",
    "function": {
        "name": "pay",
        "parameters": {
            "type": "object",
            "properties": {"to": {"$ref": "#/$defs/who"}, "from": {"$ref": "#/$defs/who"}},
            "required": ["to", "from"],
            "additionalProperties": False,
            "$defs": {"who": {"enum": ["me", "you"]}},
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}


def chat(client: openai.OpenAI, shown: list[Any], /, **fields: Any) -> Any:
    given = {"model": "tiny", "messages": MESSAGES, "max_tokens": 120, "temperature": 0, "tools": shown}
    return client.chat.completions.create(**{**given, **fields})


def calls_of(message: Any) -> list[tuple[str, Any]]:
    assert all(call.id.startswith("call_") and call.type == "function" for call in message.tool_calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]


def test_a_model_that_calls_by_itself(caller: openai.OpenAI) -> None:
    choice = chat(caller, [WEATHER]).choices[0]
    assert calls_of(choice.message) == [("weather", {"city": "Oslo"})]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Look:")


def test_its_stream_says_the_same(caller: openai.OpenAI) -> None:
    chunks = [chunk.choices[0] for chunk in chat(caller, [WEATHER], stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Look:"
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert calls and all(call.index == 0 for call in calls)  # how many follows from timing
    assert (calls[0].id[:5], calls[0].type, calls[0].function.name) == ("call_", "function", "weather")
    assert all(call.id is None and call.function.name is None for call in calls[1:])
    assert json.loads("".join(call.function.arguments for call in calls)) == {"city": "Oslo"}
    assert chunks[-1].finish_reason == "tool_calls"


def test_without_tools_or_with_none_its_text_is_text(caller: openai.OpenAI) -> None:
    for fields in ({"tools": openai.omit}, {"tool_choice": "none"}):
        choice = chat(caller, [WEATHER], **fields).choices[0]
        assert choice.message.tool_calls is None
        assert (choice.finish_reason, choice.message.content) == ("stop", SAID)


def test_required_forces_calls_that_fit_a_tool(caller: openai.OpenAI) -> None:
    tools, fields = [WEATHER, REFERS, NOW], {"tool_choice": "required", "temperature": 1.5, "n": 4}
    answer = chat(caller, tools, **fields, max_tokens=300, parallel_tool_calls=False, seed=2)
    assert any(choice.finish_reason == "tool_calls" for choice in answer.choices)
    for choice in answer.choices:
        if choice.finish_reason == "length":
            continue
        ((name, arguments),) = calls_of(choice.message)
        assert choice.message.content is None
        if name == "weather":
            assert len(arguments["city"]) <= 4
        elif name == "pay":
            assert {arguments["to"], arguments["from"]} <= {"me", "you"}
        else:
            assert (name, arguments) == ("now", {})


def test_a_named_tool_is_called_and_its_arguments_stream(caller: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "pay"}}
    whole = chat(caller, [WEATHER, REFERS], tool_choice=named).choices[0]
    ((name, arguments),) = calls_of(whole.message)
    assert name == "pay" and {arguments["to"], arguments["from"]} <= {"me", "you"}
    assert whole.finish_reason == "stop"
    chunks = chat(caller, [WEATHER, REFERS], tool_choice=named, stream=True)
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert calls[0].function.name == "pay"
    assert json.loads("".join(call.function.arguments for call in calls)) == arguments


def test_calls_and_their_results_are_shown_to_the_model(caller: openai.OpenAI) -> None:
    first = chat(caller, [WEATHER]).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "rain <|end|>"}
    messages = [*MESSAGES, first.model_dump(exclude_none=True), result]
    answer = chat(caller, [WEATHER], messages=messages, extra_body={"return_token_ids": True})
    prompt = caller.post(
        "/../detokenize", body={"tokens": answer.model_extra["prompt_token_ids"]}, cast_to=object
    )
    said = str(prompt)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|end|>' in said
    assert "of a city" in said and "<|user|>rain <|end|><|end|>" in said


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_choice": "required", "tools": []}, "tool_choice", "needs tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
    ({"tool_choice": "maybe"}, "tool_choice", "required"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
    ({"response_format": {"type": "json_object"}}, "response_format", "tools"),
    (
        {
            "tool_choice": "required",
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}],
        },
        "tools",
        "strin",
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(
    caller: openai.OpenAI, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(caller, [WEATHER], **fields)
    assert refused.value.param == param
    assert words in str(refused.value)


def test_a_model_that_cannot_be_shown_tools_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="takes no tools"):
        chat(client, [WEATHER])
