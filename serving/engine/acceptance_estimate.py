"""Estimates how likely the next draft tokens of a sequence are to be accepted.

Estimates are kept by drafter (`num_matched`: 0 for the model, else the number of context tokens that a copy
continues) and by position (the first, and those after it), for each sequence and each route. Old observations
fade. A sequence starts from its route's estimate; a route without observations starts from 0.5, which counts
as three attempts. Text of one route varies, so a new sequence may be a trial, which starts afresh; the more
trials fail, the rarer they are. Knows no costs.
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
"""Factor on older observations after a probe succeeded although they spoke against it."""

Rates = tuple[float, float]
"""Acceptance of the first draft token, and of each later one if those before it were accepted."""


@dataclass
class Attempts:
    """Sums of attempted and accepted draft tokens, in which old ones fade."""

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
    """Acceptance by position, of one sequence or one route and one way to draft."""

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
    """The estimates from one sequence's own rounds."""

    by_matched: dict[int, PositionEstimate] = field(default_factory=dict)
    is_trial: bool | None = None
    """True if the sequence starts afresh instead of from its route's estimate; None until that is decided."""

    def of(self, num_matched: int) -> PositionEstimate:
        return self.by_matched.setdefault(num_matched, PositionEstimate())

    def forget_model(self) -> None:
        """Drop what the previous draft showed: another one serves."""
        self.by_matched.pop(MODEL, None)
        self.is_trial = None


@dataclass
class _Route:
    by_matched: dict[int, PositionEstimate] = field(default_factory=dict)
    trial_odds: float = 1.0
    """Probability that a new sequence is a trial. Random, because a fixed period could coincide with one of
    the traffic."""


class RouteEstimates:
    """The estimates of all routes; the least recently used route is dropped first."""

    def __init__(self) -> None:
        self._routes: OrderedDict[str, _Route] = OrderedDict()
        self._random = random.Random(0)

    def rates(self, route: str, estimate: SequenceEstimate, num_matched: int) -> Rates:
        """Estimated acceptance of the next draft tokens of a sequence on this route."""
        route_estimate = self._route(route)
        pooled = route_estimate.by_matched.get(num_matched)
        prior: Rates = (_FALLBACK, _FALLBACK)
        if pooled is not None:
            first = pooled.first.mean(_FALLBACK)
            prior = first, pooled.later.mean(first)
        if num_matched == MODEL:
            if estimate.is_trial is None:
                estimate.is_trial = self._random.random() < route_estimate.trial_odds
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
        """Add the outcome of a proposal. `is_probe`: it was made although the estimates spoke against it."""
        route_estimate = self._route(route)
        pooled = route_estimate.by_matched.setdefault(num_matched, PositionEstimate())
        own = estimate.of(num_matched)
        for position_estimate, memory in ((own, _SEQUENCE_MEMORY), (pooled, _ROUTE_MEMORY)):
            if is_probe and num_accepted and position_estimate.first.mean(_FALLBACK) < _FALLBACK:
                position_estimate.fade(_SURPRISE_KEEP)
            position_estimate.observe(num_attempted, num_accepted, memory)
        if num_matched == MODEL and estimate.is_trial:
            if num_accepted:
                route_estimate.trial_odds = 1.0
                estimate.is_trial = False
            elif own.first.attempted + own.later.attempted >= _TRIAL_ATTEMPTS - 0.5:
                route_estimate.trial_odds = max(_LEAST_ODDS, route_estimate.trial_odds / 2)
                estimate.is_trial = False

    def forget_model(self, is_served: Callable[[str], bool]) -> None:
        """Drop what the previous draft showed on these routes: another one serves them."""
        for route, route_estimate in self._routes.items():
            if is_served(route):
                route_estimate.by_matched.pop(MODEL, None)
                route_estimate.trial_odds = 1.0

    def _route(self, name: str) -> _Route:
        route_estimate = self._routes.get(name)
        if route_estimate is None:
            route_estimate = self._routes[name] = _Route()
            if len(self._routes) > _MAX_ROUTES:
                self._routes.popitem(last=False)
        else:
            self._routes.move_to_end(name)
        return route_estimate
