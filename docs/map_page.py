"""The map: one line for each source file, from the first sentence of its docstring."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from docs.tables import table

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("buffer", "serving", "learner", "deploy", "benchmarks")
"""In the order of the imports; a lower floor never imports a higher one."""


def map_lines() -> Iterator[str]:
    """One line a source file, folder by folder; a folder comes after those that it imports."""
    for folder in _in_import_order():
        yield f"## `{folder}/`\n\n{_first_sentence(ROOT / folder / '__init__.py')}\n"
        files = [file for file in (ROOT / folder).glob("*.py") if file.name != "__init__.py"]
        yield from table(
            ("file", "what it does"), ((f"`{f.name}`", _first_sentence(f)) for f in sorted(files))
        )


def _in_import_order() -> list[str]:
    found: list[str] = []
    entered: set[str] = set()
    folders = {file.parent.relative_to(ROOT).as_posix() for floor in FLOORS for file in _sources(floor)}

    def enter(folder: str) -> None:
        if folder not in entered:
            entered.add(folder)
            for imported in sorted(_imported_folders(folder, folders)):
                enter(imported)
            found.append(folder)

    for floor in FLOORS:
        for folder in sorted(folder for folder in folders if folder.partition("/")[0] == floor):
            enter(folder)
    return found


def _sources(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def _imported_folders(folder: str, folders: set[str]) -> set[str]:
    """Of the same floor: the floors themselves are in order already."""
    modules = {
        node.module.replace(".", "/")
        for file in (ROOT / folder).glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    named = {module if module in folders else module.rpartition("/")[0] for module in modules}
    same_floor = {name for name in named if name.partition("/")[0] == folder.partition("/")[0]}
    return (same_floor & folders) - {folder}


def _first_sentence(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    sentence = re.match(r".+?\.(?=\s|$)", paragraph)
    return sentence[0] if sentence else paragraph
