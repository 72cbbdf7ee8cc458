"""The demo's measurement: the same held-out prompts without speculation, on the floor, and adapted.

Arms take turns (A B C A B C ...), as many as fit the time, so that a machine whose speed drifts treats them
alike; figures are medians over the turns, and a speed-up is the median of the turns' own ratios. The draft is
chosen by pinning a version in the adapter feed, as an operator would. Invariant: only pairs count, that is,
what every arm answered in the same turn, without a failed request.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.store import AdapterFeed
from deploy.demo.corpus import Prompt
from deploy.demo.plan import MeasuringPlan, TimeLimit
from deploy.demo.traffic import Ask, Clients, RequestOutcome
from serving.engine.counters import acceptance_rate

ARMS = ("no_speculation", "floor", "adapted")
NEAR_TIE = 1e-4
"""Top-2 gap of log-probabilities under which float32 may pick either token."""
SIGNIFICANCE = 0.05
"""How likely a coin may make as one-sided a row of ratios before one arm is called faster."""


@dataclass(frozen=True)
class ArmTurn:
    """One arm over one domain's share of prompts; turns of one number and domain make a pair."""

    number: int
    arm: str
    domain: str
    outcomes: list[RequestOutcome]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(len(outcome.token_ids) for outcome in self.outcomes) / self.wall_s

    @property
    def is_whole(self) -> bool:
        return bool(self.outcomes) and not any(outcome.error for outcome in self.outcomes)


@dataclass(frozen=True)
class Identity:
    """Whether all arms said the same as the target alone, token by token."""

    num_compared: int
    num_identical: int
    num_near_ties: int
    """Diverged first where the target's two best tokens were closer than NEAR_TIE."""
    num_unexplained: int = 0
    """Differ too, and there was no time left to ask the target how close its best tokens were."""

    @property
    def fraction(self) -> float | None:
        """Identical or a near tie, of all compared; None when nothing was."""
        return (self.num_identical + self.num_near_ties) / self.num_compared if self.num_compared else None


@dataclass(frozen=True)
class Comparison:
    """All turns of one number of clients."""

    turns: list[ArmTurn]
    arms: tuple[str, ...] = ARMS
    """Those that there were: without a promoted draft, none is adapted."""
    shortage: str = ""
    """Why there are fewer turns than planned; empty when there are not."""

    def num_pairs(self, domain: str) -> int:
        return len(self._pairs(domain))

    def tokens_per_s(self, domain: str, arm: str) -> float | None:
        """None where nothing was measured."""
        turns = self._of(domain, arm)
        return statistics.median(turn.tokens_per_s for turn in turns) if turns else None

    def num_attempted(self, domain: str, arm: str) -> int:
        return sum(outcome.num_attempted for turn in self._of(domain, arm) for outcome in turn.outcomes)

    def acceptance_rate(self, domain: str, arm: str) -> float | None:
        """None where nothing was attempted."""
        num_attempted = self.num_attempted(domain, arm)
        accepted = sum(outcome.num_accepted for turn in self._of(domain, arm) for outcome in turn.outcomes)
        return acceptance_rate(accepted, num_attempted) if num_attempted else None

    def ratios(self, *domains: str) -> list[float]:
        """Tokens a second of the adapted draft over none, pair by pair."""
        pairs = [pair for domain in domains for pair in self._pairs(domain) if "adapted" in pair]
        return [pair["adapted"].tokens_per_s / pair["no_speculation"].tokens_per_s for pair in pairs]

    def speed_up(self, *domains: str) -> float | None:
        """The median of the ratios; None without any."""
        ratios = self.ratios(*domains)
        return statistics.median(ratios) if ratios else None

    def why_not(self, domain: str, arm: str) -> str:
        """Why there is no figure; empty where there is one."""
        if arm not in self.arms:
            return "no draft was promoted"
        if self.num_pairs(domain):
            return ""
        failed = any(not turn.is_whole for turn in self.turns if turn.domain == domain)
        return "requests failed" if failed else self.shortage or "not planned"

    @property
    def num_turns(self) -> int:
        """Turns that paired at least one domain."""
        return len({turn.number for domain in self.domains for turn in self._of(domain, "no_speculation")})

    @property
    def domains(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(turn.domain for turn in self.turns))

    @property
    def outcomes(self) -> list[RequestOutcome]:
        """Of pairs or not."""
        return [outcome for turn in self.turns for outcome in turn.outcomes]

    def _of(self, domain: str, arm: str) -> list[ArmTurn]:
        return [pair[arm] for pair in self._pairs(domain) if arm in pair]

    def _pairs(self, domain: str) -> list[dict[str, ArmTurn]]:
        """What all arms answered, by turn."""
        by_number: dict[int, dict[str, ArmTurn]] = {}
        for turn in self.turns:
            if turn.domain == domain and turn.is_whole:
                by_number.setdefault(turn.number, {})[turn.arm] = turn
        return [pair for pair in by_number.values() if set(pair) == set(self.arms)]


def verdict(ratios: Sequence[float]) -> str:
    """`faster`, `slower`, or `no difference shown`: a sign test, so fewer than five pairs never show any."""
    above, below = sum(ratio > 1.0 for ratio in ratios), sum(ratio < 1.0 for ratio in ratios)
    if _chance(max(above, below), above + below) > SIGNIFICANCE:
        return "no difference shown"
    return "faster" if above > below else "slower"


def _chance(most: int, num: int) -> float:
    """That one given side of `num` fair coins comes up `most` times or more often."""
    return float(sum(math.comb(num, count) for count in range(most, num + 1)) / 2**num)


def compare(
    clients: Clients,
    feed: AdapterFeed,
    held_out: Mapping[str, Iterator[Prompt]],
    plan: MeasuringPlan,
    *,
    max_tokens: int,
    limit: TimeLimit,
    narrate: Callable[[str], None],
) -> Comparison:
    """Turns of all arms on prompts of `held_out`, by domain, while one more is likely to fit; one that then
    does not is cut. The feed is unpinned afterwards."""
    latest = feed.latest(DEFAULT_ROUTE)
    arms = ARMS if latest else ARMS[:-1]
    versions = {"floor": FLOOR_VERSION, "adapted": latest.draft_version if latest else FLOOR_VERSION}
    used_up = f"its {limit.budget_s:.0f} s were used"
    turns: list[ArmTurn] = []
    count, prompt_s = plan.num_clients, 0.0
    try:
        for number in range(plan.max_turns):
            if number == 1:
                count = plan.prompts_in(limit.left_s, prompt_s)
            share = {domain: list(islice(prompts, count)) for domain, prompts in held_out.items()}
            left_s = limit.left_s
            if left_s <= count * prompt_s:
                return Comparison(turns, arms, used_up)
            for arm in arms:
                if arm in versions and not pin_and_wait(feed, versions[arm], limit):
                    return Comparison(turns, arms, f"no replica served draft v{versions[arm]} in time")
                narrate(f"turn {number + 1} of at most {plan.max_turns}: {arm.replace('_', ' ')}")
                turns += _turns(clients, number, arm, share, max_tokens, limit)
            prompt_s = max(prompt_s, (left_s - limit.left_s) / count)
    finally:
        feed.unpin(DEFAULT_ROUTE, "the demo has measured")
    cut = len(turns) < len(arms) * len(held_out) * plan.max_turns
    return Comparison(turns, arms, used_up if cut else "")


def _turns(
    clients: Clients,
    number: int,
    arm: str,
    share: dict[str, list[Prompt]],
    max_tokens: int,
    limit: TimeLimit,
) -> Iterator[ArmTurn]:
    """One arm over the domains, until the time is used."""
    lengths = 0 if arm == "no_speculation" else None
    for domain, prompts in share.items():
        began_s = limit.clock()
        if began_s >= limit.end_s:
            return
        asks = [Ask(prompt, max_tokens, num_draft_tokens=lengths, store=False) for prompt in prompts]
        outcomes = clients.send(asks)
        yield ArmTurn(number, arm, domain, outcomes, limit.clock() - began_s)


def pin_and_wait(feed: AdapterFeed, version: int, limit: TimeLimit) -> bool:
    """Serve this version; whether every replica came to say that it does."""
    feed.pin(DEFAULT_ROUTE, version, "the demo measures")

    def serves() -> bool:
        statuses = feed.statuses()
        return bool(statuses) and all(
            status.serving_versions.get(DEFAULT_ROUTE) == version for status in statuses
        )

    return limit.wait_until(serves)


def identity(
    outcomes: Sequence[RequestOutcome], gap: Callable[[Ask, int], float], limit: TimeLimit
) -> Identity:
    """Compare every greedy answer with that of the target alone (the arm without speculation).

    `gap`: how far apart the target's two best tokens are at a position of an answer; see `top_two_gap`.
    """
    answers = [outcome for outcome in outcomes if not outcome.error]
    alone = {outcome.question: outcome for outcome in answers if outcome.ask.num_draft_tokens == 0}
    others = [
        outcome for outcome in answers if outcome.ask.num_draft_tokens != 0 and outcome.question in alone
    ]
    identical = near_ties = unexplained = 0
    for outcome in others:
        reference = alone[outcome.question]
        position = first_difference(reference.token_ids, outcome.token_ids)
        if position is None:
            identical += 1
        elif limit.left_s == 0.0:
            unexplained += 1
        elif position < len(reference.token_ids) and gap(reference.ask, position) < NEAR_TIE:
            near_ties += 1
    return Identity(len(others), identical, near_ties, unexplained)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, or of the end of the shorter; None if they are equal."""
    if tuple(one) == tuple(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
