"""Four domains of real requests with answers, in three splits that never share a prompt.

Knows nothing of tokens or models. Invariant: a row's split follows from a hash of its prompt alone, so what a
target was trained on is never streamed and never judged on, whatever the seed.
"""

import ast
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random

from deploy.demo.domains.stdlib import bare_source, documented, module_names, reference_passages
from deploy.errors import DeployError

SPLIT_PERCENTS = {"train": 64, "stream": 30, "heldout": 6}
FUNCTION_CHARS = (40, 1200)
PYTHON_ASKED = "Please generate code based on the following doc:\n"


class CorpusError(DeployError, ValueError):
    """A folder that lacks a domain's rows; nothing was trained or measured."""


@dataclass(frozen=True, slots=True)
class CorpusExchange:
    """A request and the answer that the corpus holds for it; `kind` is the language or source of chat."""

    domain: str
    kind: str
    question: str
    answer: str


def split_of(question: str) -> str:
    """`train`, `stream` or `heldout`."""
    percent = int.from_bytes(sha256(question.encode()).digest()[:4], "big") % 100
    for split, share in SPLIT_PERCENTS.items():
        if percent < share:
            return split
        percent -= share
    raise AssertionError("the shares of the splits add up to 100")


def exchanges(folder: Path, domain: str, split: str) -> list[CorpusExchange]:
    """Every row of a domain and split, each prompt once, in a fixed shuffled order.

    Raises CorpusError where the folder lacks the domain's files.
    """
    rows = [row for row in _rows(folder, domain) if split_of(row.question) == split]
    Random(f"{domain}:{split}").shuffle(rows)
    return rows


def check_domains(folder: Path, domains: Iterable[str]) -> None:
    """Raises CorpusError, before anything is measured, for a name that is none or files that lack."""
    for domain in domains:
        if domain not in _SOURCES:
            raise CorpusError(f"domain={domain!r} is none of {', '.join(_SOURCES)}; nothing was measured")
        next(_SOURCES[domain](folder), None)


@cache
def general_english(folder: Path) -> list[str]:
    """What the draft is trained on: documentation prose of the standard library and stories, no domain's
    streamed or held-out rows among them."""
    prose = [entry.text for module in module_names() for entry in documented(module)]
    stories = [
        row.answer
        for row in _file(folder, "gpteacher/roleplay.jsonl", "chat", "en")
        if split_of(row.question) == "train"
    ]
    return [*(passage.text for passage in reference_passages()), *prose, *stories]


@cache
def _rows(folder: Path, domain: str) -> list[CorpusExchange]:
    by_question: dict[str, CorpusExchange] = {}
    for row in _SOURCES[domain](folder):
        by_question.setdefault(row.question, row)
    return sorted(by_question.values(), key=lambda row: row.question)


def _file(folder: Path, name: str, domain: str, kind: str) -> list[CorpusExchange]:
    path = folder / name
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise CorpusError(
            f"data={folder} lacks {name} ({error.strerror}): {domain} has no prompts, nothing was measured. "
            "Give --data a folder that has it"
        ) from error
    rows = map(json.loads, lines)
    return [CorpusExchange(domain, kind, row["prompt"], row["response"]) for row in rows]


def _python(folder: Path) -> Iterator[CorpusExchange]:
    yield from _file(folder, "mbpp/mbpp.jsonl", "python", "mbpp")
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            yield from _functions(path)


def _functions(path: Path) -> Iterator[CorpusExchange]:
    """Documented functions of a module, asked for by the first paragraph of their documentation."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if not isinstance(node, ast.FunctionDef) or not text or len(text.split()) < 3:
            continue
        source = bare_source(node)
        if FUNCTION_CHARS[0] <= len(source) <= FUNCTION_CHARS[1]:
            first = " ".join(text.split("\n\n")[0].split())[:300]
            question = f"{PYTHON_ASKED}Write a function {node.name}: {first}"
            yield CorpusExchange("python", "stdlib", question, source)


def _chat(folder: Path) -> Iterator[CorpusExchange]:
    yield from _file(folder, "gpteacher/codegen.jsonl", "chat", "en")
    yield from _file(folder, "gpteacher/roleplay.jsonl", "chat", "en")
    yield from _file(folder, "tldr/en.jsonl", "chat", "en")
    yield from _file(folder, "tldr/es.jsonl", "chat", "es")


_SOURCES: Mapping[str, Callable[[Path], Iterator[CorpusExchange]]] = {
    "gsm8k": lambda folder: iter(_file(folder, "gsm8k/train.jsonl", "gsm8k", "en")),
    "spider": lambda folder: iter(_file(folder, "spider/train.jsonl", "spider", "en")),
    "python": _python,
    "chat": _chat,
}
DOMAINS = tuple(_SOURCES)
