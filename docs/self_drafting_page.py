"""The estimate of what a part of a large target is worth on a GPU."""

from collections.abc import Iterator

from benchmarks.part_estimate import ACCEPTANCES, SMOLLM2, Hardware, rows
from docs.tables import table


def self_drafting_lines() -> Iterator[str]:
    """Every part and head of a large target, at some acceptances."""
    return _estimates(Hardware())


def real_model_lines() -> Iterator[str]:
    """The same for SmolLM2."""
    return _estimates(SMOLLM2)


def _estimates(hardware: Hardware) -> Iterator[str]:
    titles = ("part", "head", "ms a draft pass", *(f"acceptance {value:g}" for value in ACCEPTANCES))
    return table(titles, rows(hardware))
