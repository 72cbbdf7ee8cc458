"""The estimate of what a part of a large target is worth on a GPU."""

from collections.abc import Iterator

from benchmarks.part_estimate import ACCEPTANCES, rows
from docs.tables import table


def self_drafting_lines() -> Iterator[str]:
    """Every part and head, at some acceptances."""
    titles = ("part", "head", "ms a draft pass", *(f"acceptance {value:g}" for value in ACCEPTANCES))
    return table(titles, rows())
