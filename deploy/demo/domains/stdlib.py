"""Text of the running Python's standard library: documentation strings, the language reference, short
functions.

Knows nothing of requests or splits. Reads source files only, imports none of them. Invariant: the order
of everything returned depends on the Python release alone.
"""

import ast
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "encodings",
    "pydoc_data",
    "site-packages",
    "distutils",
    "tkinter",
}
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
MIN_PASSAGE_CHARS = 220
FUNCTION_CHARS = (80, 700)


@dataclass(frozen=True, slots=True)
class Documented:
    """A class or function with its documentation as one line of prose."""

    kind: str
    name: str
    signature: str
    text: str


@dataclass(frozen=True, slots=True)
class Passage:
    """A paragraph of the language reference; the key is equal for equal texts."""

    key: str
    text: str


@cache
def module_names() -> tuple[str, ...]:
    """Dotted names of the library's modules that come as Python source, sorted."""
    root = _root()
    names = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not LEFT_OUT & set(parts):
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return tuple(sorted(name for name in set(names) if not name.startswith("_") and name.count(".") < 2))


@cache
def documented(module: str) -> list[Documented]:
    """Every documented class and function of a module, in the order of its source."""
    found = []
    for node in ast.walk(_tree(module)):
        text = ast.get_docstring(node) if isinstance(node, DEFINITIONS) else None
        if isinstance(node, DEFINITIONS) and text and _is_prose(text):
            found.append(_entry(node, text))
    return found


@cache
def functions(module: str) -> list[str]:
    """Source of every short function of a module, without comments and documentation."""
    sources = []
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.FunctionDef):
            source = bare_source(node)
            if FUNCTION_CHARS[0] <= len(source) <= FUNCTION_CHARS[1]:
                sources.append(source)
    return sources


@cache
def reference_passages() -> list[Passage]:
    """Prose paragraphs of the language reference that `help()` prints, each once."""
    topics = _reference_topics()
    texts: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) >= MIN_PASSAGE_CHARS and _is_prose(text):
                texts.setdefault(text[:60], text)
    return [Passage(key, text) for key, text in texts.items()]


def _reference_topics() -> dict[str, str]:
    tree = ast.parse((_root() / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    value = next(node.value for node in ast.walk(tree) if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(value)
    return topics


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _tree(module: str) -> ast.Module:
    path = _root().joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    try:
        return ast.parse(source.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ast.Module(body=[], type_ignores=[])


def _entry(node: ast.FunctionDef | ast.ClassDef, text: str) -> Documented:
    prose = (
        " ".join(text.split("\n\n    ")[0].split())
        if isinstance(node, ast.ClassDef)
        else " ".join(text.split())
    )
    if isinstance(node, ast.ClassDef):
        return Documented("class", node.name, node.name, prose)
    names = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
    return Documented("function", node.name, f"{node.name}({', '.join(names[:5])})", prose)


def bare_source(node: ast.FunctionDef) -> str:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if not body:
        return ""
    bare = ast.FunctionDef(**{**dict(ast.iter_fields(node)), "body": body})
    return ast.unparse(ast.copy_location(bare, node))


def _is_prose(text: str) -> bool:
    plain = sum(character.isalpha() or character.isspace() for character in text)
    return (
        text.lstrip()[:1].isupper() and plain > 0.82 * len(text) and ">>>" not in text and "---" not in text
    )
