"""What each distribution of this repository would install: the product nothing of the benchmarks."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def setuptools_table(project: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]
    return table


def test_everdraft_installs_its_own_four_packages_and_none_of_the_benchmarks() -> None:
    patterns = setuptools_table(ROOT)["packages"]["find"]["include"]
    folders = [file.parent.name for file in ROOT.glob("*/__init__.py")]
    installed = {name for name in folders if any(fnmatch(name, pattern) for pattern in patterns)}
    assert installed == {"buffer", "serving", "learner", "deploy"}
    assert "benchmarks" in folders


def test_the_benchmarks_install_every_package_of_theirs_from_where_it_lies() -> None:
    home = ROOT / "benchmarks"
    table = setuptools_table(home)
    found = {
        ".".join(("benchmarks", *file.parent.relative_to(home).parts)): file.parent
        for file in home.rglob("__init__.py")
    }
    assert set(table["packages"]) == set(found)
    assert {name: (home / place).resolve() for name, place in table["package-dir"].items()} == found
