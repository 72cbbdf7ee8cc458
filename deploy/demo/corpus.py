"""The demo's traffic: endless seeded streams of prompts by domain, in three splits that never meet.

Knows nothing of tokens, models or HTTP. Invariant: a sample's split follows from a hash of its key alone,
so no seed moves a prompt from one split to another; equal (domain, split, seed) give equal streams on one
Python release.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from random import Random

from deploy.demo.domains import chat, functions, maths, prose, sql
from deploy.demo.domains.sample import Sample

SAMPLERS: Mapping[str, Callable[[Random], Sample]] = {
    "prose": prose.sample,
    "code": functions.sample,
    "maths": maths.sample,
    "sql": sql.sample,
    "chat": chat.sample,
}
DOMAINS = tuple(SAMPLERS)
SPLIT_PERCENTS = {"train": 80, "replay": 13, "heldout": 7}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request in the demo: its chat messages and the answer that the corpus holds for it."""

    domain: str
    key: str
    messages: tuple[dict[str, str], ...]
    answer: str


def split_of(key: str) -> str:
    """The split that a key belongs to: `train`, `replay` or `heldout`."""
    percent = int.from_bytes(sha256(key.encode()).digest()[:4], "big") % 100
    for split, share in SPLIT_PERCENTS.items():
        if percent < share:
            return split
        percent -= share
    raise AssertionError("the shares of the splits add up to less than 100")


def prompts(domain: str, split: str, seed: int = 0) -> Iterator[Prompt]:
    """Endless prompts of one domain and split.

    Raises ValueError for an unknown domain or split, before the first prompt.
    """
    if domain not in SAMPLERS:
        raise ValueError(f"domain is {domain!r}, not one of {DOMAINS}: there is nothing to draw")
    if split not in SPLIT_PERCENTS:
        raise ValueError(f"split is {split!r}, not one of {tuple(SPLIT_PERCENTS)}: there is nothing to draw")
    return _stream(domain, split, Random(f"{seed}:{domain}:{split}"))


def _stream(domain: str, split: str, rng: Random) -> Iterator[Prompt]:
    while True:
        sample = SAMPLERS[domain](rng)
        if split_of(sample.key) == split:
            message = {"role": "user", "content": sample.request}
            yield Prompt(domain, sample.key, (message,), sample.answer)
