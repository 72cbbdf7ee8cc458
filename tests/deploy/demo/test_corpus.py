"""The demo's traffic: seeded, split for good, of the size the demo was planned for, and true to itself."""

import ast
from itertools import islice
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from deploy.demo.corpus import DOMAINS, SPLIT_PERCENTS, prompts, split_of
from deploy.demo.train_pair.tokens import answer_ids, prompt_ids

TARGET = Path(__file__).parents[3] / "deploy" / "demo" / "pair" / "target"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TARGET)


@pytest.mark.parametrize("domain", DOMAINS)
def test_one_seed_gives_one_stream_and_another_seed_another(domain: str) -> None:
    first, again, other = (list(islice(prompts(domain, "replay", seed), 12)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_key_and_no_request_is_in_two_splits(domain: str) -> None:
    keys, requests = {}, {}
    for split in SPLIT_PERCENTS:
        drawn = list(islice(prompts(domain, split, 1), 60))
        keys[split] = {prompt.key for prompt in drawn}
        requests[split] = {prompt.messages[0]["content"] for prompt in drawn}
    for found in (keys, requests):
        assert not found["train"] & found["replay"] | found["train"] & found["heldout"]
        assert not found["replay"] & found["heldout"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_prompts_and_answers_are_of_the_planned_length(
    domain: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    for prompt in islice(prompts(domain, "replay", 2), 60):
        assert 15 <= len(prompt_ids(tokenizer, prompt)) <= 120
        assert 30 <= len(answer_ids(tokenizer, prompt.answer)) <= 150


def test_every_key_has_a_split_and_the_shares_are_kept() -> None:
    drawn = [split_of(str(number)) for number in range(4000)]
    for split, percent in SPLIT_PERCENTS.items():
        assert abs(drawn.count(split) / 40 - percent) < 3


def test_every_function_and_class_of_the_code_domain_parses() -> None:
    for prompt in islice(prompts("code", "replay", 3), 80):
        parsed = ast.parse(prompt.answer.removeprefix("```python\n").removesuffix("\n```"))
        assert isinstance(parsed.body[0], ast.FunctionDef | ast.ClassDef), prompt.answer


def test_every_calculation_of_the_maths_domain_is_right() -> None:
    for prompt in islice(prompts("maths", "replay", 4), 80):
        for left, operator, right, value in _calculations(prompt.answer):
            computed = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[operator]
            assert computed == value >= 0, prompt.answer


def test_every_query_names_only_columns_of_its_table() -> None:
    for prompt in islice(prompts("sql", "replay", 5), 80):
        shown = prompt.messages[0]["content"].split(")")[0].split("(")[1].split(", ")
        selected = prompt.answer.split("SELECT ")[1].split("\nFROM")[0]
        for column in selected.split(", "):
            bare = column.split(" AS ")[0].split("(")[-1].rstrip(")")
            assert bare in [*shown, "*"], prompt


def test_the_tokenizer_has_no_id_beyond_its_vocabulary_and_ends_turns(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert len(tokenizer) == 4096
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<|begin|><|user|>Hi<|end|><|assistant|>"
    assert tokenizer.eos_token == "<|end|>"


def test_an_unknown_domain_or_split_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match="poems"):
        prompts("poems", "replay")
    with pytest.raises(ValueError, match="everything"):
        prompts("prose", "everything")


def _calculations(answer: str) -> list[tuple[int, str, int, int]]:
    words = answer.replace(".", "").replace(",", "").split()
    return [
        (int(words[at - 3]), words[at - 2], int(words[at - 1]), int(words[at + 1]))
        for at, word in enumerate(words)
        if word == "="
    ]
