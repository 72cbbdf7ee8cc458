"""What the Markdown files point at is in the repository: links, pictures, anchors, paths in code spans.

And nothing that is needed is ignored: by git, or by the wheel.
"""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.M | re.S)
CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.S)
TARGETS = (
    re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+(?:\"[^\"]*\"|'[^']*'))?\s*\)"),
    re.compile(r"^\s*\[[^\]]+\]:\s*<?([^\s>]+)", re.M),
    re.compile(r"<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=[\"']([^\"'\s]+)"),
)
"""Of `[text](target)` and `![text](target)`, of `[name]: target`, of HTML."""
HISTORIES = {"CHANGELOG.md", "LOG.md"}
EXTERNAL = re.compile(r"[a-z][a-z0-9+.\-]*:|//", re.I)
PATH_IN_CODE = re.compile(r"[\w.\-]+(?:/[\w.\-]+)+\.(?:py|md|json|png|toml|txt|safetensors)")


@cache
def tracked() -> frozenset[str]:
    """Every file that a clone gets. Skips where there is no checkout, as in an unpacked sdist."""
    listed = _git("ls-files", "-z")
    if listed.returncode or _git("rev-parse", "--show-prefix").stdout.strip():
        pytest.skip("no git checkout: what a clone would get cannot be known")
    return frozenset(listed.stdout.split("\0")) - {""}


def _git(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, input=given, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no git: what a clone would get cannot be known")


def pages() -> dict[str, str]:
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in tracked() if name.endswith(".md")}


def links(text: str) -> Iterator[str]:
    """Relative targets of links and pictures; what stands in code is no link."""
    prose = CODE.sub("", FENCE.sub("", text))
    for pattern in TARGETS:
        yield from (target for target in pattern.findall(prose) if not EXTERNAL.match(target))


def paths_in_code(text: str) -> Iterator[str]:
    """Paths from the root that a code span names; others, of data or of a cache, are not ours."""
    folders = {name.partition("/")[0] for name in tracked() if "/" in name}
    for _, code in CODE.findall(FENCE.sub("", text)):
        if PATH_IN_CODE.fullmatch(code) and code.partition("/")[0] in folders:
            yield code


def resolved(page: str, target: str) -> tuple[str, str]:
    """(path from the root, anchor); a target without a path is on the page itself."""
    path, _, anchor = unquote(target).partition("#")
    if not path:
        return page, anchor
    parts: list[str] = [] if path.startswith("/") else list(PurePosixPath(page).parent.parts)
    for part in path.strip("/").split("/"):
        if part == "..":
            parts = parts[:-1] if parts else ["outside"]
        elif part != ".":
            parts.append(part)
    return "/".join(parts), anchor


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings, repeated ones numbered; and those written as HTML."""
    found: dict[str, int] = {}
    made = set(re.findall(r"<a\b[^>]*?\b(?:id|name)=[\"']([^\"']+)", text))
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", FENCE.sub("", text), re.M):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        made.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return made


def fault(page: str, target: str) -> str | None:
    """Why a reader of a clone would not get there, or None."""
    path, anchor = resolved(page, target)
    if path not in tracked() and not any(name.startswith(f"{path}/") for name in tracked()):
        return f"{page}: {target} is not in the repository"
    if anchor and path.endswith(".md") and anchor not in anchors((ROOT / path).read_text(encoding="utf-8")):
        return f"{page}: {target}: no heading makes this anchor"
    return None


def test_every_link_and_picture_leads_to_a_tracked_file_and_a_heading() -> None:
    faults = [why for page, text in pages().items() for target in links(text) if (why := fault(page, target))]
    assert faults == []


def test_every_path_that_a_page_names_in_code_is_tracked() -> None:
    """The histories may name what is gone."""
    missing = [
        f"{page}: {path}"
        for page, text in pages().items()
        for path in paths_in_code(text)
        if page not in HISTORIES and path not in tracked()
    ]
    assert missing == []


def test_no_file_that_is_tracked_or_pointed_at_is_ignored() -> None:
    pointed_at = {resolved(page, link)[0] for page, text in pages().items() for link in links(text)}
    named = {path for text in pages().values() for path in paths_in_code(text)}
    needed = "\n".join(sorted(tracked() | pointed_at | named))
    assert _git("check-ignore", "--no-index", "--stdin", given=needed).stdout.split("\n") == [""]


def test_every_file_of_a_package_that_is_no_python_goes_into_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packed = {
        name
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for name in tracked()
        if fnmatch(name, f"{package}/{pattern.replace('**/', '*')}")
    }
    needed = {
        name
        for name in tracked()
        if name.partition("/")[0] in setuptools["package-data"] and not name.endswith(".py")
    }
    assert needed - packed == set()
    assert any(name.endswith("model.safetensors") for name in packed)
    assert {f"{package}/py.typed" for package in setuptools["package-data"]} <= packed


@pytest.mark.parametrize(
    "text",
    [
        "![a](no.png)",
        "[a](../README.md)",
        "[a](README.md#no-such-heading)",
        "[a](#no-such-heading)",
        '<img alt="a" src="no.png">',
        "[a][b]\n\n[b]: no.md",
        '[a](no.md "title")',
    ],
)
def test_a_link_that_leads_nowhere_is_caught(text: str) -> None:
    assert [why for target in links(text) if (why := fault("README.md", target))]


@pytest.mark.parametrize(
    "text",
    [
        "[a](README.md#two-commands)",
        "[a](#your-own-models)",
        "[a](benchmarks/results)",
        "[a](https://arxiv.org/abs/2310.07177)",
        "`[a](no.md)`",
        "```\n[a](no.md)\n```",
    ],
)
def test_a_link_that_leads_somewhere_is_not(text: str) -> None:
    assert [why for target in links(text) if (why := fault("README.md", target))] == []
