"""Questions of a folder of one's own: the rows with `prompt` of its .jsonl files.

Lines that are no such row are passed over; a folder without any is refused before anything starts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import DeployError


class DataError(DeployError, ValueError):
    """A folder that holds no prompts; nothing was measured."""


@dataclass(frozen=True)
class Exchange:
    """A question and an answer to it, which is only ever read as context."""

    question: str
    answer: str


def check_folder(folder: Path | None) -> list[Path]:
    """Its files with prompts; none for None. Raises DataError."""
    if folder is None:
        return []
    files = [file for file in sorted(folder.rglob("*.jsonl")) if next(rows(file), None) is not None]
    if not files:
        raise DataError(
            f"data={folder} holds no .jsonl file whose rows have `prompt`; nothing was measured. Give a "
            "folder that does, or leave it out for the demo's prompts"
        )
    return files


def rows(file: Path) -> Iterator[Exchange]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and row.get("prompt"):
                yield Exchange(str(row["prompt"]), str(row.get("response", "")))
