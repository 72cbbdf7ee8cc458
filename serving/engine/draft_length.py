"""How many tokens to draft, 0 included: the length with the most expected tokens a second.

Requests differ more than rounds do, so acceptance is believed by sequence: what its own rounds showed, over
a prior of one half, worth three attempts. A hopeless sequence costs two or three drafts, a good one is
drafted for at once. Expected tokens are summed over the batch and divided by the cost
table's seconds at its size (arXiv 2310.18813). A new length must win by a margin; while speculation is off, a
probe now and then notices when it would pay again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from serving.engine.cost_table import CostTable
from serving.engine.counters import expected_block_efficiency

MAX_DRAFT_TOKENS = 8
_MARGIN = 1.03
_PROBE_EVERY = 16
_PRIOR_ACCEPTANCE = 0.5
_PRIOR_ATTEMPTS = 3.0
_MEMORY_ATTEMPTS = 40.0


@dataclass
class AcceptanceBelief:
    """Attempts of one sequence, old ones fading."""

    attempted: float = 0.0
    accepted: float = 0.0

    def observe(self, num_attempted: int, num_accepted: int) -> None:
        keep = (1.0 - 1.0 / _MEMORY_ATTEMPTS) ** num_attempted
        self.attempted = keep * self.attempted + num_attempted
        self.accepted = keep * self.accepted + num_accepted

    @property
    def acceptance(self) -> float:
        """Expected of the next draft token, whatever its position."""
        prior = _PRIOR_ACCEPTANCE * _PRIOR_ATTEMPTS
        return (self.accepted + prior) / (self.attempted + _PRIOR_ATTEMPTS)


class DraftLengthController:
    """Chooses the draft length of a round. A `fixed` length is returned as it is."""

    def __init__(
        self, costs: CostTable | None, *, fixed: int | None = None, max_draft_tokens: int = MAX_DRAFT_TOKENS
    ) -> None:
        self._costs = costs
        self._fixed = fixed
        self._lengths = range(max_draft_tokens + 1)
        self._current = 3 if fixed is None else fixed
        self._rounds_at_zero = 0

    @property
    def current(self) -> int:
        """The length in use, probes aside."""
        return self._current

    def choose(self, beliefs: Sequence[AcceptanceBelief]) -> int:
        """The length for the next round of these sequences."""
        if self._fixed is not None or self._costs is None:
            return self._current
        rates = [belief.acceptance for belief in beliefs]
        tokens_per_s = [self._tokens_per_s(rates, length) for length in self._lengths]
        best = max(self._lengths, key=tokens_per_s.__getitem__)
        if tokens_per_s[best] > _MARGIN * tokens_per_s[self._current]:
            self._current = best
        self._rounds_at_zero = 0 if self._current else self._rounds_at_zero + 1
        return 1 if self._rounds_at_zero >= _PROBE_EVERY else self._current

    def observe(self, belief: AcceptanceBelief, num_attempted: int, num_accepted: int) -> None:
        """How one sequence's drafts fared in a round."""
        if num_attempted:
            belief.observe(num_attempted, num_accepted)
            if self._current == 0:
                self._rounds_at_zero = 0

    def _tokens_per_s(self, rates: list[float], length: int) -> float:
        assert self._costs is not None
        expected = sum(expected_block_efficiency([rate] * length) for rate in rates)
        return expected / self._costs.round_s(len(rates), length)
