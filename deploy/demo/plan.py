"""How long every part of the demo may take, in one place, and the clock that holds the parts to it.

Knows nothing of what the parts do. Invariant: a part ends when it is done or when its seconds are used, and
one that overran (requests under way are waited for) takes the time from the next, so that all parts together
take no more than their sum and the last one's overrun.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]
"""Monotonic seconds."""
POLL_S = 0.05


@dataclass(frozen=True)
class TrafficPlan:
    """One phase of traffic."""

    num_requests: int
    budget_s: float


@dataclass(frozen=True)
class MeasuringPlan:
    """One comparison of the arms: how many turns at most, and of how many prompts a domain at most.

    The first turn has one prompt a client; how long it takes decides how many the others have.
    """

    num_clients: int
    max_turns: int
    prompts_per_turn: int
    budget_s: float

    def prompts_in(self, left_s: float, prompt_s: float) -> int:
        """So many that two more turns fit, if one prompt of every domain and arm takes `prompt_s`."""
        return max(self.num_clients, min(self.prompts_per_turn, int(left_s / (2 * prompt_s))))


@dataclass(frozen=True)
class SelfDraftPlan:
    """The arm of a part of the target, which learns from some of the traffic's records afterwards."""

    part: str = "self"
    num_records: int = 224
    learning_s: float = 30.0
    """Passes are compiled meanwhile."""
    measuring_s: float = 15.0


@dataclass(frozen=True)
class DemoPlan:
    """What the demo does and how long each part may take: under six minutes at the very most, five on two
    quiet, quick cores. Starting and stopping are on top: they are as long as they are."""

    max_tokens: int = 96
    """Of every answer."""
    learner_start_s: float = 15.0
    """How long traffic waits for the learner's process: one that starts takes a core from the replica."""
    domain: TrafficPlan = TrafficPlan(num_requests=320, budget_s=24.0)
    """Each of the domains in turn."""
    mixed: TrafficPlan = TrafficPlan(num_requests=700, budget_s=55.0)
    learner_pause_s: float = 10.0
    compiled_passes_s: float = 5.0
    """How long measuring waits for compiled passes, once the part of the target has learnt."""
    measuring: tuple[MeasuringPlan, ...] = (
        MeasuringPlan(num_clients=1, max_turns=5, prompts_per_turn=3, budget_s=50.0),
        MeasuringPlan(num_clients=8, max_turns=2, prompts_per_turn=8, budget_s=25.0),
    )
    near_ties_s: float = 10.0
    """For asking the target how close its two best tokens were where answers differ."""
    self_draft: SelfDraftPlan | None = SelfDraftPlan()

    def total_s(self, num_domains: int) -> float:
        """All budgets together."""
        traffic_s = num_domains * self.domain.budget_s + self.mixed.budget_s
        measuring_s = sum(measuring.budget_s for measuring in self.measuring)
        waits_s = self.learner_start_s + self.learner_pause_s + self.compiled_passes_s + self.near_ties_s
        part = self.self_draft
        self_s = 0.0 if part is None else part.learning_s + part.measuring_s
        return traffic_s + measuring_s + waits_s + self_s


@dataclass(frozen=True)
class TimeLimit:
    """The seconds of one part, running."""

    budget_s: float
    end_s: float
    clock: Clock
    sleep: Callable[[float], None]

    @property
    def left_s(self) -> float:
        """Never negative."""
        return max(0.0, self.end_s - self.clock())

    def wait_until(self, holds: Callable[[], bool]) -> bool:
        """Whether it came to hold in time; looks once at least."""
        while not holds():
            if self.left_s == 0.0:
                return False
            self.sleep(POLL_S)
        return True


class Timekeeper:
    """Begins one part after the other."""

    def __init__(self, clock: Clock = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self.clock = clock
        self._sleep = sleep
        self._last_end_s = float("inf")

    def begin(self, budget_s: float) -> TimeLimit:
        """A part that may take `budget_s` from now, less what the one before took too much."""
        self._last_end_s = min(self._last_end_s, self.clock()) + budget_s
        return TimeLimit(budget_s, self._last_end_s, self.clock, self._sleep)
