"""The README's map tells the truth: one line for every source file, and none for a file that is gone."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("buffer", "serving", "learner", "deploy", "benchmarks")


def _mapped() -> set[str]:
    """Paths named in the map: a heading names a folder, the rows under it its files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The map")[2]
    paths, folder = set(), ""
    for line in text.splitlines():
        if heading := re.match(r"\*\*`(.+)/`\*\*", line):
            folder = heading[1]
        elif row := re.match(r"\| `(.+\.py)` \| .+ \|$", line):
            paths.add(f"{folder}/{row[1]}")
    return paths


def test_the_map_names_every_source_file_and_no_other() -> None:
    files = {
        str(file.relative_to(ROOT))
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert _mapped() == files
