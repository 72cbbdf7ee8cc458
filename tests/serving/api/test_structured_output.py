"""Structured output as the official client asks for it: every answer has the form, and speculation changes
none."""

import json
import re
from typing import Any

import openai
import pytest

import serving.structured_output as structured_output
from serving.structured_output import GrammarCompiler, GrammarError, StructuredOutput
from tests.support.live_server import LiveServer
from tests.support.tiny_models import tiny_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a", "b"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 2},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
MESSAGES: Any = [{"role": "user", "content": "describe it"}]


def fits(said: Any) -> None:
    assert list(said) == ["name", "kind", "sizes"]
    assert isinstance(said["name"], str) and len(said["name"]) <= 6 and said["kind"] in ("a", "b")
    assert len(said["sizes"]) <= 2 and all(0 <= size <= 99 for size in said["sizes"])


def asked(client: openai.OpenAI, structured_outputs: dict[str, Any] | None, **fields: Any) -> Any:
    extra = {**fields.pop("extra", {}), "structured_outputs": structured_outputs}
    return client.completions.create(
        **{"model": "tiny", "prompt": "say", "max_tokens": 120, "seed": 3, "extra_body": extra, **fields}
    )


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.3}, {"seed": 5}])
def test_a_json_schema_binds_every_answer(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=200, n=3, response_format=response_format, **sampling
    )
    ended = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    for choice in ended:
        fits(json.loads(choice.message.content or ""))
    for choice in answer.choices:
        assert (choice.message.content or "").startswith("{")
    assert ended


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 11}])
def test_speculation_changes_no_answer(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    form = {"json": SCHEMA, "disable_any_whitespace": True}
    drafted = asked(client, form, **sampling)
    alone = asked(client, form, **sampling, extra={"num_draft_tokens": 0})
    assert drafted.choices[0].text == alone.choices[0].text
    assert drafted.metrics["speculative_decoding"]["num_draft_tokens"] > 0
    assert alone.metrics["speculative_decoding"]["num_draft_tokens"] == 0
    fits(json.loads(drafted.choices[0].text))
    assert " " not in re.sub('"[^"]*"', "", drafted.choices[0].text)


def test_regex_choice_and_grammar(client: openai.OpenAI) -> None:
    assert re.fullmatch("[a-c]{2,4}=[0-9]", asked(client, {"regex": "[a-c]{2,4}=[0-9]"}).choices[0].text)
    choice = asked(client, {"choice": ["left", "right side", 'quo"te\n']}, n=4, temperature=2.0)
    assert {each.text for each in choice.choices} <= {"left", "right side", 'quo"te\n'}
    lark = asked(client, {"grammar": 'start: "a" /[0-9]{3}/ "b"'}).choices[0].text
    assert re.fullmatch("a[0-9]{3}b", lark)
    gbnf = asked(client, {"grammar": 'root ::= "x" [yz] "!"'}).choices[0].text
    assert gbnf in ("xy!", "xz!")


def test_it_ends_with_the_end_of_text_and_streams_what_it_says(client: openai.OpenAI) -> None:
    whole = asked(client, {"choice": ["yes", "no"]})
    assert whole.choices[0].finish_reason == "stop"
    stream = asked(client, {"choice": ["yes", "no"]}, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=60, seed=1, response_format={"type": "json_object"}
    )
    assert (answer.choices[0].message.content or "").startswith("{")


def test_requests_with_and_without_a_form_share_a_batch(server: LiveServer, client: openai.OpenAI) -> None:
    plain = {"model": "tiny", "prompt": "say", "max_tokens": 40, "temperature": 0}
    alone = client.completions.create(**plain).choices[0].text
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as other:
        stream = other.completions.create(**{**plain, "max_tokens": 200}, stream=True)
        next(iter(stream))
        formed = asked(client, {"json": SCHEMA}, temperature=0).choices[0]
        beside = client.completions.create(**plain).choices[0].text
        stream.close()
    assert beside == alone
    assert formed.text == asked(client, {"json": SCHEMA}, temperature=0).choices[0].text


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "regex"),
    ({"structured_outputs": {"grammar": "no grammar (("}}, "structured_outputs", "Lark"),
    ({"structured_outputs": {"json": {"type": "strin"}}}, "structured_outputs", "strin"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs", "no JSON"),
    ({"structured_outputs": {"json": {"$ref": "http://h/x"}}}, "structured_outputs", "http://h/x"),
    ({"structured_outputs": {}}, "structured_outputs", "one of json"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "regex and choice"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "no field"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "text"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "response_format",
    ),
    ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens", "excludes structured output"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "excludes structured"),
    ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [7]}, "allowed_token_ids", "excludes"),
    ({"guided_json": {}}, "guided_json", "structured_outputs"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="say", extra_body=fields)
    assert refused.value.param == param
    assert words in str(refused.value)


def test_a_schema_that_is_nested_too_deeply_is_refused(client: openai.OpenAI) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    with pytest.raises(openai.BadRequestError):
        asked(client, {"json": schema})


def test_a_text_format_asks_for_nothing(client: openai.OpenAI) -> None:
    plain: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    answers = [
        client.chat.completions.create(**plain, **also)
        for also in ({}, {"response_format": {"type": "text"}})
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


@pytest.mark.parametrize(
    ("tokenizer", "eos", "words"),
    [(object(), [1], "fast kind"), (None, [], "no end-of-text token"), ("broken", [1], "does not fit")],
)
def test_a_tokenizer_that_cannot_be_read_is_no_fault_of_the_start(
    tokenizer: Any, eos: list[int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tiny_tokenizer() if tokenizer in (None, "broken") else tokenizer
    if tokenizer == "broken":
        monkeypatch.setattr(structured_output, "from_tokenizer", lambda *asked, **options: 1 / 0)
    compiler = GrammarCompiler(given, 320, eos)
    compiler.prepare()
    with pytest.raises(GrammarError, match=words):
        compiler.compile(StructuredOutput("regex", "a"))
