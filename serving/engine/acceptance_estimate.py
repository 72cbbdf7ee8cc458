"""What is estimated of the next drafts of a sequence: how likely each is to be accepted.

By who drafts (`num_matched`: 0 the model, else the context tokens that a copy continues), by position (the
first, and those after it), by sequence over its route. All evidence fades. A sequence starts from what its
route showed lately; on a route never seen, from one half, worth three attempts. Text of one route is not all
alike: a new sequence may be a trial, which starts afresh; the more trials fail, the rarer they are. Knows no
costs.
"""

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

MODEL = 0
"""`num_matched` of what a model drafted."""

_FALLBACK = 0.5
_PRIOR_ATTEMPTS = 3.0
_SEQUENCE_MEMORY = 40.0
_ROUTE_MEMORY = 200.0
_MAX_ROUTES = 256
_LEAST_ODDS = 1 / 32
_TRIAL_ATTEMPTS = 3.0
_SURPRISE_KEEP = 0.5
"""What older evidence is worth after a probe that succeeded against it: something has changed."""

Rates = tuple[float, float]
"""Acceptance of the first draft token, and of each after it given those before."""


@dataclass
class Attempts:
    """Accepted of attempted, old ones fading."""

    attempted: float = 0.0
    accepted: float = 0.0

    def add(self, num_attempted: int, num_accepted: int, memory: float) -> None:
        keep = (1.0 - 1.0 / memory) ** num_attempted
        self.attempted = keep * self.attempted + num_attempted
        self.accepted = keep * self.accepted + num_accepted

    def fade(self, keep: float) -> None:
        self.attempted, self.accepted = keep * self.attempted, keep * self.accepted

    def mean(self, prior: float) -> float:
        return (self.accepted + prior * _PRIOR_ATTEMPTS) / (self.attempted + _PRIOR_ATTEMPTS)


@dataclass
class PositionEstimate:
    """Of one sequence or one route, about one way to draft."""

    first: Attempts = field(default_factory=Attempts)
    later: Attempts = field(default_factory=Attempts)

    def observe(self, num_attempted: int, num_accepted: int, memory: float) -> None:
        self.first.add(1, min(1, num_accepted), memory)
        if num_attempted > 1:
            self.later.add(num_attempted - 1, num_accepted - 1, memory)

    def fade(self, keep: float) -> None:
        self.first.fade(keep)
        self.later.fade(keep)

    def rates(self, prior: Rates) -> Rates:
        return self.first.mean(prior[0]), self.later.mean(prior[1])


@dataclass
class SequenceEstimate:
    """What one sequence's own rounds showed."""

    by_matched: dict[int, PositionEstimate] = field(default_factory=dict)
    is_trial: bool | None = None
    """Starts afresh, whatever its route showed; None until it is first asked about."""

    def of(self, num_matched: int) -> PositionEstimate:
        return self.by_matched.setdefault(num_matched, PositionEstimate())

    def forget_model(self) -> None:
        """Another draft serves."""
        self.by_matched.pop(MODEL, None)
        self.is_trial = None


@dataclass
class _Route:
    by_matched: dict[int, PositionEstimate] = field(default_factory=dict)
    trial_odds: float = 1.0
    """Of a new sequence; chance, since a fixed rhythm could fall in with that of the traffic."""


class RouteEstimates:
    """What every route showed lately; the least recently seen route is forgotten first."""

    def __init__(self) -> None:
        self._routes: OrderedDict[str, _Route] = OrderedDict()
        self._random = random.Random(0)

    def rates(self, route: str, estimate: SequenceEstimate, num_matched: int) -> Rates:
        """Of the next drafts of a sequence on this route."""
        known = self._route(route)
        seen = known.by_matched.get(num_matched)
        prior: Rates = (_FALLBACK, _FALLBACK)
        if seen is not None:
            first = seen.first.mean(_FALLBACK)
            prior = first, seen.later.mean(first)
        if num_matched == MODEL:
            if estimate.is_trial is None:
                estimate.is_trial = self._random.random() < known.trial_odds
            if estimate.is_trial:
                prior = max(prior[0], _FALLBACK), max(prior[1], _FALLBACK)
        own = estimate.by_matched.get(num_matched)
        return prior if own is None else own.rates(prior)

    def observe(
        self,
        route: str,
        estimate: SequenceEstimate,
        num_matched: int,
        num_attempted: int,
        num_accepted: int,
        *,
        is_probe: bool = False,
    ) -> None:
        """How a proposal fared. `is_probe`: it was made against what is estimated."""
        known = self._route(route)
        pooled = known.by_matched.setdefault(num_matched, PositionEstimate())
        own = estimate.of(num_matched)
        for one, memory in ((own, _SEQUENCE_MEMORY), (pooled, _ROUTE_MEMORY)):
            if is_probe and num_accepted and one.first.mean(_FALLBACK) < _FALLBACK:
                one.fade(_SURPRISE_KEEP)
            one.observe(num_attempted, num_accepted, memory)
        if num_matched == MODEL and estimate.is_trial:
            if num_accepted:
                known.trial_odds = 1.0
                estimate.is_trial = False
            elif own.first.attempted + own.later.attempted >= _TRIAL_ATTEMPTS - 0.5:
                known.trial_odds = max(_LEAST_ODDS, known.trial_odds / 2)
                estimate.is_trial = False

    def forget_model(self, is_served: Callable[[str], bool]) -> None:
        """Another draft serves these routes: what the last one showed says little."""
        for route, known in self._routes.items():
            if is_served(route):
                known.by_matched.pop(MODEL, None)
                known.trial_odds = 1.0

    def _route(self, name: str) -> _Route:
        known = self._routes.get(name)
        if known is None:
            known = self._routes[name] = _Route()
            if len(self._routes) > _MAX_ROUTES:
                self._routes.popitem(last=False)
        else:
            self._routes.move_to_end(name)
        return known
