"""What every mode of the throughput benchmark is: prompts in, tokens out, and how long it took."""

from dataclasses import dataclass, field
from typing import Protocol

MODES = (
    "transformers_generate",
    "transformers_assisted",
    "transformers_assisted_fixed",
    "transformers_prompt_lookup",
    "transformers_continuous",
    "engine_off",
    "engine_floor",
    "engine_adapted",
    "engine_ngram",
    "engine_adaptive",
    "engine_adaptive_random_draft",
)
REFERENCE = "engine_off"
"""What speed-ups are measured against."""
FIXED_DRAFT_TOKENS = 4
"""Draft length of every mode that does not choose it."""


class ModeUnavailableError(RuntimeError):
    """This mode cannot run here; the message becomes the note of its rows."""


@dataclass(frozen=True)
class Rounds:
    """Sums over the sequences of a turn."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_copied: int = 0
    """Of the drafted, those that no model drafted."""
    num_attempted: int = 0
    num_accepted: int = 0

    def __add__(self, other: "Rounds") -> "Rounds":
        return Rounds(
            self.num_rounds + other.num_rounds,
            self.num_drafted + other.num_drafted,
            self.num_copied + other.num_copied,
            self.num_attempted + other.num_attempted,
            self.num_accepted + other.num_accepted,
        )


@dataclass(frozen=True)
class ModeOutcome:
    """One turn of one mode."""

    wall_s: float
    """From the first submission to the last token, prefill included."""
    output_token_ids: list[list[int]] = field(repr=False)
    """In the order of the prompts."""
    rounds: Rounds | None = None
    """None where a mode does not report."""

    @property
    def num_tokens(self) -> int:
        return sum(len(token_ids) for token_ids in self.output_token_ids)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


class Mode(Protocol):
    """One way to generate; warm after its first call."""

    def generate(
        self, prompts: list[list[int]], *, concurrency: int, num_tokens: int, temperature: float
    ) -> ModeOutcome:
        """Exactly `num_tokens` after each prompt, end of text or not. `concurrency` prompts are under way at
        any time: when one is answered the next is asked, as by so many clients."""
        ...

    def close(self) -> None: ...
