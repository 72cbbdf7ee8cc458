"""Five integers a draft version, and the ratios derived from them. Each ratio is defined once, here."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class RoundCounters:
    """Sums over rounds. `num_attempted`: accepted, plus one where a draft token was rejected;
    positions behind a cut (end of text, token limit) are not attempted."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_attempted: int = 0
    num_accepted: int = 0
    num_output_tokens: int = 0
    accepted_by_position: list[int] = field(default_factory=list)
    """[g]: rounds that accepted the draft token at position g."""
    attempted_by_position: list[int] = field(default_factory=list)

    @property
    def num_drafted_rounds(self) -> int:
        """Rounds that attempted a draft token or more."""
        return self.attempted_by_position[0] if self.attempted_by_position else 0

    def add_round(self, *, drafted: int, attempted: int, accepted: int, emitted: int) -> None:
        self.num_rounds += 1
        self.num_drafted += drafted
        self.num_attempted += attempted
        self.num_accepted += accepted
        self.num_output_tokens += emitted
        while len(self.attempted_by_position) < attempted:
            self.attempted_by_position.append(0)
            self.accepted_by_position.append(0)
        for position in range(attempted):
            self.attempted_by_position[position] += 1
        for position in range(accepted):
            self.accepted_by_position[position] += 1


def acceptance_rate(num_accepted: int, num_attempted: int) -> float:
    """Accepted over attempted draft tokens; 0 when nothing was attempted."""
    return num_accepted / num_attempted if num_attempted else 0.0


def draft_utilization(num_accepted: int, num_drafted: int) -> float:
    """Accepted over drafted tokens; 0 when nothing was drafted."""
    return num_accepted / num_drafted if num_drafted else 0.0


def block_efficiency(num_output_tokens: int, num_rounds: int) -> float:
    """Output tokens per target pass; 0 before the first."""
    return num_output_tokens / num_rounds if num_rounds else 0.0


def expected_block_efficiency(acceptance_by_position: Iterable[float]) -> float:
    """Output tokens a round when draft position g is accepted, given that all before it were, with
    the g-th of these probabilities."""
    expected, reached = 1.0, 1.0
    for acceptance in acceptance_by_position:
        reached *= acceptance
        expected += reached
    return expected
