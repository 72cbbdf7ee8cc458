"""One request with its reference answer.

Knows nothing of tokens, splits or chat markup. Invariant: two samples that share text that must not cross
a split (a passage cut at two places, say) share their `key`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """A user's request, the answer that the target learns to give, and the key that decides the split."""

    key: str
    request: str
    answer: str
