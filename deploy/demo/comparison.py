"""The demo's measurement: the same held-out prompts without speculation, on the floor, and adapted.

Arms take turns (A B C A B C ...), so that a machine whose speed drifts treats them alike; figures are medians
over the turns. The draft is chosen by pinning a version in the adapter feed, as an operator would.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from buffer.records import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.store import AdapterFeed
from deploy.demo.corpus import Prompt
from deploy.demo.traffic import Ask, Clients, Outcome, top_two_gap
from deploy.errors import DeployError
from serving.engine.counters import acceptance_rate

ARMS = ("no_speculation", "floor", "adapted")
NEAR_TIE = 1e-4
"""Top-2 gap of log-probabilities under which float32 may pick either token."""
PIN_TIMEOUT_S = 20.0


class DemoError(DeployError):
    """The demo could not go on; what ran was stopped."""


@dataclass(frozen=True)
class Turn:
    """One arm over one domain's share of prompts."""

    arm: str
    domain: str
    outcomes: list[Outcome]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(len(outcome.token_ids) for outcome in self.outcomes) / self.wall_s


@dataclass(frozen=True)
class Identity:
    """Whether all arms said the same as the target alone, token by token."""

    num_compared: int
    num_identical: int
    num_near_ties: int
    """Diverged first where the target's two best tokens were closer than NEAR_TIE."""

    @property
    def fraction(self) -> float:
        """Identical or a near tie, of all compared; 1 when nothing was."""
        return (self.num_identical + self.num_near_ties) / self.num_compared if self.num_compared else 1.0


@dataclass(frozen=True)
class Comparison:
    """All turns of one number of clients."""

    turns: list[Turn]

    def tokens_per_s(self, domain: str, arm: str) -> float:
        return statistics.median(turn.tokens_per_s for turn in self._of(domain, arm))

    def acceptance_rate(self, domain: str, arm: str) -> float:
        outcomes = [outcome for turn in self._of(domain, arm) for outcome in turn.outcomes]
        return acceptance_rate(
            sum(outcome.num_accepted for outcome in outcomes),
            sum(outcome.num_attempted for outcome in outcomes),
        )

    @property
    def domains(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(turn.domain for turn in self.turns))

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for turn in self.turns for outcome in turn.outcomes]

    def _of(self, domain: str, arm: str) -> list[Turn]:
        return [turn for turn in self.turns if turn.domain == domain and turn.arm == arm]


def compare(
    url: str,
    feed: AdapterFeed,
    shares: Sequence[dict[str, list[Prompt]]],
    *,
    num_clients: int,
    max_tokens: int,
    narrate: Callable[[str], None],
) -> Comparison:
    """One turn of all arms for each share (prompts by domain). The feed is unpinned afterwards."""
    latest = feed.latest(DEFAULT_ROUTE)
    versions = {"floor": FLOOR_VERSION, "adapted": latest.draft_version if latest else FLOOR_VERSION}
    clients = Clients(url, num_clients)
    turns: list[Turn] = []
    try:
        for number, share in enumerate(shares):
            for arm in ARMS:
                if arm in versions:
                    pin_and_wait(feed, versions[arm])
                narrate(f"{num_clients} client{'s'[: num_clients > 1]}, turn {number + 1}: {arm}")
                turns += [
                    _turn(clients, arm, domain, prompts, max_tokens) for domain, prompts in share.items()
                ]
    finally:
        feed.unpin(DEFAULT_ROUTE, "the demo has measured")
    return Comparison(turns)


def _turn(clients: Clients, arm: str, domain: str, prompts: Sequence[Prompt], max_tokens: int) -> Turn:
    lengths = 0 if arm == "no_speculation" else None
    asks = [Ask(prompt, max_tokens, num_draft_tokens=lengths, store=False) for prompt in prompts]
    began_s = time.perf_counter()
    outcomes = clients.send(asks)
    return Turn(arm, domain, outcomes, time.perf_counter() - began_s)


def pin_and_wait(feed: AdapterFeed, version: int) -> None:
    """Serve this version, and return once every replica says that it does."""
    feed.pin(DEFAULT_ROUTE, version, "the demo measures")
    deadline_s = time.monotonic() + PIN_TIMEOUT_S
    while time.monotonic() < deadline_s:
        statuses = feed.statuses()
        if statuses and all(status.serving_versions.get(DEFAULT_ROUTE) == version for status in statuses):
            return
        time.sleep(0.05)
    raise DemoError(f"no replica served draft version {version} within {PIN_TIMEOUT_S:.0f} s")


def identity(url: str, outcomes: Sequence[Outcome]) -> Identity:
    """Compare every greedy answer with that of the target alone (the arm without speculation)."""
    alone = {outcome.question: outcome for outcome in outcomes if outcome.ask.num_draft_tokens == 0}
    others = [outcome for outcome in outcomes if outcome.ask.num_draft_tokens != 0 and not outcome.error]
    identical = near_ties = 0
    for outcome in others:
        reference = alone[outcome.question]
        position = first_difference(reference.token_ids, outcome.token_ids)
        if position is None:
            identical += 1
        elif position < len(reference.token_ids) and top_two_gap(url, reference.ask, position) < NEAR_TIE:
            near_ties += 1
    return Identity(len(others), identical, near_ties)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, or of the end of the shorter; None if they are equal."""
    if tuple(one) == tuple(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
