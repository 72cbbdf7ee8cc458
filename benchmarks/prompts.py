"""Prompts of a given length, the same for every mode.

A short one is a question as it stands, of at most so many tokens. A long one has exactly as many: the end of
a conversation, the question that is asked now and before it earlier exchanges of the same topic. Topics take
turns; a stream never repeats before its source does.
"""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from deploy.demo.corpus import DOMAINS
from deploy.demo.corpus import prompts as demo_stream
from deploy.demo.question_rows import Exchange, check_folder, rows

SHORT_TOKENS = 64
"""Up to this length nothing is put before a question: models that were never trained on conversations would
answer it with noise."""


def demo_prompts(
    tokenizer: Any, num_tokens: int, *, split: str = "heldout", seed: int = 1
) -> Iterator[list[int]]:
    """Of the demo's corpus, endless."""
    return _prompts(tokenizer, [_demo_exchanges(domain, split, seed) for domain in DOMAINS], num_tokens)


def domain_prompts(
    tokenizer: Any, domain: str, num_tokens: int, *, split: str = "heldout", seed: int = 1
) -> Iterator[list[int]]:
    """Of one of the demo's domains, endless."""
    return _prompts(tokenizer, [_demo_exchanges(domain, split, seed)], num_tokens)


def folder_prompts(tokenizer: Any, folder: Path, num_tokens: int) -> Iterator[list[int]]:
    """Of the rows of every `.jsonl` file under `folder`, endless; a row has `prompt`, perhaps `response`.

    Raises DataError, before the first prompt, where there is none.
    """
    return _prompts(tokenizer, [_endless(file) for file in check_folder(folder)], num_tokens)


def _prompts(tokenizer: Any, topics: list[Iterator[Exchange]], num_tokens: int) -> Iterator[list[int]]:
    for exchanges in cycle(topics):
        messages = [said("user", next(exchanges).question)]
        while len(ids := token_ids(tokenizer, messages)) < num_tokens > SHORT_TOKENS:
            earlier = next(exchanges)
            messages = [said("user", earlier.question), said("assistant", earlier.answer), *messages]
        yield ids[-num_tokens:]


def said(role: str, content: str) -> dict[str, str]:
    """A message of a conversation."""
    return {"role": role, "content": content}


def token_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """By the chat template, or one paragraph a message where a tokenizer has none."""
    if tokenizer.chat_template:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return list(tokenizer.encode("\n\n".join(message["content"] for message in messages)))


def _demo_exchanges(domain: str, split: str, seed: int) -> Iterator[Exchange]:
    for prompt in demo_stream(domain, split, seed):
        yield Exchange(prompt.messages[-1]["content"], prompt.answer)


def _endless(file: Path) -> Iterator[Exchange]:
    while True:
        yield from rows(file)
