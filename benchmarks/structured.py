"""Structured output: how often answers end in the form that was asked for, what that changes, what it costs.

The cases are those of the public JSON-schema test suite (npm: json-schema-test-suite), read in place; each is
a schema and one of its examples, which the prompt shows. What cannot be compiled is listed as refused.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]

from benchmarks.prompts import demo_prompts, said, token_ids
from serving.engine.request import Generation, SamplingParams
from serving.local import LocalEngine
from serving.structured_output import CompiledGrammar, GrammarCompiler, GrammarError, StructuredOutput

MAX_LENGTH, MAX_ITEMS = 12, 2
SPOKEN_BY_DRAFT_3_ALONE = frozenset(("extends", "disallow", "divisibleBy"))
FORMS = {
    "anything": StructuredOutput("regex", "(?s:.*)"),
    "json": StructuredOutput("json", '{"type": "array", "items": {"type": "string"}, "minItems": 100}'),
}
"""The first allows every text, so that what it costs is not what it changes; the second goes to any limit."""


@dataclass(frozen=True)
class Case:
    """`name`: draft/file#group.test. `shown`: the suite's schema."""

    name: str
    shown: dict[str, Any]
    example: Any

    @property
    def schema(self) -> dict[str, Any]:
        """That binds: the same, bounded."""
        return bounded(self.shown)


def suite(folder: Path) -> Iterator[Case]:
    """Every case that draft 4 can say, in the order of files. Raises FileNotFoundError where none is."""
    files = [file for draft in ("draft4", "draft3") for file in sorted((folder / draft).rglob("*.json"))]
    if not files:
        raise FileNotFoundError(f"{folder} holds no draft4 or draft3 folder of the JSON-schema test suite")
    for file in files:
        for number, group in enumerate(json.loads(file.read_text())):
            schema = group["schema"]
            if SPOKEN_BY_DRAFT_3_ALONE & set(_keywords(schema)):
                continue
            for test, asked in enumerate(group["tests"]):
                name = f"{file.relative_to(folder)}#{number}.{test}"
                yield Case(name, schema, asked["data"])


def bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """With a longest text and a longest list wherever the schema sets none, two levels into what it leaves
    open, too, and in draft 4's dialect."""
    return {"$schema": "http://json-schema.org/draft-04/schema#", **_bounded(schema)}


_HOLD_SCHEMAS = ("properties", "patternProperties", "definitions")
_ARE_SCHEMAS = ("items", "additionalItems", "additionalProperties", "not")
_LIST_SCHEMAS = ("allOf", "anyOf", "oneOf", "items")


def _bounded(schema: Any, depth: int = 2) -> Any:
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key, value in schema.items():
        if key in _HOLD_SCHEMAS and isinstance(value, dict):
            made[key] = {name: _bounded(each) for name, each in value.items()}
        elif key in _LIST_SCHEMAS and isinstance(value, list):
            made[key] = [_bounded(each) for each in value]
        elif key in _ARE_SCHEMAS:
            made[key] = _bounded(value)
    if not {"$ref", "enum", "const"} & made.keys():
        made.setdefault("maxLength", max(MAX_LENGTH, made.get("minLength", 0)))
        made.setdefault("maxItems", max(MAX_ITEMS, made.get("minItems", 0)))
        for open_end in ("items", "additionalProperties") if depth else ():
            made.setdefault(open_end, _bounded({}, depth - 1))
    return made


def _keywords(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            yield key
            yield from _keywords(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _keywords(value)


def measure_suite(
    engine: LocalEngine,
    cases: Sequence[Case],
    max_tokens: int,
    report: Callable[[str], None],
    temperatures: Sequence[float] = (0.0, 1.0),
) -> dict[str, Any]:
    """Every accepted case, with speculation and without: greedy, and drawn with the case's number as seed."""
    compiler = compiler_of(engine)
    accepted: list[tuple[Case, CompiledGrammar]] = []
    refused: dict[str, str] = {}
    for case in cases:
        try:
            asked = StructuredOutput("json", json.dumps(case.schema))
            accepted.append((case, compiler.compile(asked)))
        except GrammarError as error:
            refused[case.name] = str(error)[:100]
    prompts = [token_ids(engine.tokenizer, [said("user", _question(case))]) for case, _ in accepted]
    fitting = [
        index for index, prompt in enumerate(prompts) if len(prompt) + max_tokens <= engine.max_seq_len
    ]
    report(f"{len(fitting)} cases are asked, {len(refused)} refused")
    found: dict[str, Any] = {"case_ids": [accepted[index][0].name for index in fitting], "refused": refused}
    for temperature in temperatures:
        answers = {}
        for arm, drafted in (("speculation", None), ("alone", 0)):
            sampling = [
                SamplingParams(
                    temperature=temperature,
                    seed=index if temperature else None,
                    max_tokens=max_tokens,
                    num_draft_tokens=drafted,
                    constraint=accepted[index][1],
                )
                for index in fitting
            ]
            began_s = time.perf_counter()
            answers[arm] = engine.generate([prompts[index] for index in fitting], sampling)
            spent_s = time.perf_counter() - began_s
            report(f"temperature {temperature:g}, {arm}: {len(fitting)} answers in {spent_s:.0f} s")
        asked_cases = [accepted[index][0] for index in fitting]
        found[f"temperature {temperature:g}"] = _judged(engine, asked_cases, **answers)
    return found


def _judged(
    engine: LocalEngine, cases: Sequence[Case], speculation: list[Generation], alone: list[Generation]
) -> dict[str, Any]:
    wrong, endless = dict[str, str](), dict[str, str]()
    for case, answer in zip(cases, speculation, strict=True):
        if answer.finish_reason != "stop":
            endless[case.name] = _text(engine, answer)[:60]
        elif fault := _fault(engine, case, answer):
            wrong[case.name] = fault
    num_ended = len(cases) - len(endless)
    pairs = zip(speculation, alone, strict=True)
    return {
        "num_answers": len(cases),
        "share_ended": num_ended / len(cases),
        "num_ended": num_ended,
        "num_valid": num_ended - len(wrong),
        "wrong": wrong,
        "not_ended": endless,
        "num_identical": sum(one.output_token_ids == other.output_token_ids for one, other in pairs),
        "num_draft_tokens": sum(answer.num_drafted for answer in speculation),
    }


def _question(case: Case) -> str:
    shown, example = json.dumps(case.shown), json.dumps(case.example)[:200]
    return f"JSON schema: {shown}\nExample: {example}\nWrite a short JSON value that fits the schema."


def _fault(engine: LocalEngine, case: Case, answer: Generation) -> str:
    """Why an answer is not what was asked for; empty if it is."""
    text = _text(engine, answer)
    try:
        jsonschema.Draft4Validator(case.schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text[:100]!r}: {str(error)[:100]}"
    return ""


def _text(engine: LocalEngine, answer: Generation) -> str:
    assert engine.tokenizer is not None
    return str(engine.tokenizer.decode(answer.output_token_ids, skip_special_tokens=True))


def measure_cost(
    engine: LocalEngine, turns: int, num_tokens: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds a token of requests with a form over those without, in turn: by form, number of requests at
    once, with speculation and without."""
    compiler, prompts = compiler_of(engine), demo_prompts(engine.tokenizer, 64)
    found: dict[str, Any] = {}
    for form, asked in FORMS.items():
        constraint = compiler.compile(asked)
        for batch_size in (1, 8):
            for name, drafted in (("alone", 0), ("speculation", None)):
                plain = SamplingParams(temperature=0.0, max_tokens=num_tokens, num_draft_tokens=drafted)
                arms = {"plain": plain, "formed": replace(plain, constraint=constraint)}
                ratios = []
                for turn in range(turns + 1):
                    batch, spent = list(islice(prompts, batch_size)), {}
                    for arm in sorted(arms, reverse=bool(turn % 2)):
                        spent[arm] = _seconds_a_token(engine, batch, arms[arm])
                    ratios.append(spent["formed"] / spent["plain"])
                over, where = statistics.median(ratios[1:]), f"{form}, {name}, {batch_size} at once"
                found[where] = {"seconds_over_plain": over, "pairs": turns}
                report(f"{where}: {over:.3f} of plain's seconds a token")
    return found


def _seconds_a_token(engine: LocalEngine, prompts: list[list[int]], sampling: SamplingParams) -> float:
    began_s = time.perf_counter()
    done = engine.generate(prompts, sampling)
    return (time.perf_counter() - began_s) / sum(len(each.output_token_ids) for each in done)


def compiler_of(engine: LocalEngine) -> GrammarCompiler:
    return GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
