"""Calls of tools in a model's text: found wherever it is cut, and nothing is lost or said twice."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.tool_parsing import (
    ForcedCallParser,
    ForcedListParser,
    HermesParser,
    Llama3JsonParser,
    ParsedText,
    ToolParser,
    parser_for,
)

CITY = '{"name": "weather", "arguments": {"city": "K\\u00f6ln \\"}</tool_call>{", "days": [1, {"a": 2}]}}'
CITY_ARGUMENTS = {"city": 'Köln "}</tool_call>{', "days": [1, {"a": 2}]}
LATE = '{"arguments": {"x": 1}, "name": "late"}'


def read(parser: ToolParser, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """(content, [(name, arguments)])"""
    said = ParsedText()
    for piece in pieces:
        said += parser.feed(piece)
    said += parser.finish()
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for call in said.calls:
        assert (call.name is None) == (call.id is None) == (call.index in names)
        names.setdefault(call.index, call.name or "")
        arguments[call.index] = arguments.get(call.index, "") + call.arguments
    assert sorted(names) == list(range(parser.num_calls))
    return said.content, [(names[index], arguments[index]) for index in sorted(names)]


def calls(found: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in found]


HERMES = {
    "one call": (f"<tool_call>\n{CITY}\n</tool_call>", "", [("weather", CITY_ARGUMENTS)]),
    "text before and after": (
        f"Let me look.\n<tool_call>{CITY}</tool_call>\n Done.",
        "Let me look.\n Done.",
        [("weather", CITY_ARGUMENTS)],
    ),
    "two calls, one with its name last": (
        f"<tool_call>\n{LATE}\n</tool_call>\n<tool_call>\n{CITY}\n</tool_call>",
        "",
        [("late", {"x": 1}), ("weather", CITY_ARGUMENTS)],
    ),
    "only text": ("a < b, <tool_ is none, ", "a < b, <tool_ is none, ", []),
    "only space": (" \n", " \n", []),
    "no JSON in the tag": ("<tool_call>weather</tool_call>", "<tool_call>weather</tool_call>", []),
    "JSON that is no call": ('<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    "cut before the name": ('<tool_call>{"na', '<tool_call>{"na', []),
}
LLAMA = {
    "one call": (
        CITY.replace("arguments", "parameters"),
        "",
        [("weather", CITY_ARGUMENTS)],
    ),
    "behind a tag": (f"<|python_tag|>{CITY}", "", [("weather", CITY_ARGUMENTS)]),
    "two": (f"{CITY}; {LATE}\n", "", [("weather", CITY_ARGUMENTS), ("late", {"x": 1})]),
    "text": ("I would say {not a call}", "I would say {not a call}", []),
    "JSON that is no call": ('{"a": 1} and more', '{"a": 1} and more', []),
}


@pytest.mark.parametrize("name", HERMES)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_the_form_of_hermes_and_qwen(name: str, cuts: list[int]) -> None:
    text, content, found = HERMES[name]
    said, made = read(HermesParser(), cut(text, cuts))
    assert (said, calls(made)) == (content, found)


@pytest.mark.parametrize("name", LLAMA)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_the_form_of_llama(name: str, cuts: list[int]) -> None:
    text, content, found = LLAMA[name]
    said, made = read(Llama3JsonParser(), cut(text, cuts))
    assert (said, calls(made)) == (content, found)


@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_the_forced_list(cuts: list[int]) -> None:
    text = f"[{CITY.replace('arguments', 'parameters')}, {LATE}]"
    said, made = read(ForcedListParser(), cut(text, cuts))
    assert (said, calls(made)) == ("", [("weather", CITY_ARGUMENTS), ("late", {"x": 1})])


def test_the_forced_call_is_all_arguments() -> None:
    assert read(ForcedCallParser("f"), ['{"a"', ": 1}"]) == ("", [("f", '{"a": 1}')])
    assert read(ForcedCallParser("f"), ["", ""]) == ("", [])


@given(st.text(alphabet='<>tool_cal/{}"\\:, \nname[]argumets', max_size=80), st.lists(st.integers(0, 80)))
def test_any_text_means_the_same_wherever_it_is_cut(text: str, cuts: list[int]) -> None:
    for parser in (HermesParser, Llama3JsonParser):
        assert read(parser(), [text]) == read(parser(), cut(text, cuts))


def test_arguments_come_as_they_are_written() -> None:
    parser = HermesParser()
    assert parser.feed('<tool_call>{"name": "f", "arguments": ').calls == ()
    (first,) = parser.feed('{"a"').calls
    assert (first.name, first.arguments) == ("f", '{"a"')
    assert [call.arguments for call in parser.feed(": 1").calls] == [": 1"]


def test_an_answer_cut_inside_its_arguments_keeps_the_call() -> None:
    content, made = read(HermesParser(), ['<tool_call>{"name": "f", "arguments": {"a": "b'])
    assert (content, made) == ("", [("f", '{"a": "b')])


def test_a_template_says_which_form_its_model_writes() -> None:
    assert parser_for("{% if tools %}... <tool_call> ...{% endif %}") == "hermes"
    assert parser_for('{% if tools %}{"name": ..., "parameters": ...}{% endif %}') == "llama3_json"
    assert parser_for("{{ messages }}") is None


def cut(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({min(end, len(text)) for end in cuts} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(ends)]
