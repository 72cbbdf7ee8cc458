"""How many tokens to draft, 0 included: the length with the most expected tokens a second.

Expected tokens come from live acceptance by position, seconds from the cost table at the present batch size
(arXiv 2310.18813). A new length must win by a margin; while speculation is off, a probe round now and then
notices when it would pay again.
"""

from serving.engine.cost_table import CostTable
from serving.engine.counters import expected_block_efficiency

MAX_DRAFT_TOKENS = 8
_MARGIN = 1.03
_PROBE_EVERY = 16
_PROBE_LENGTH = 2
_MEMORY_ROUNDS = 32
_PRIOR_ATTEMPTS = 4.0


class DraftLengthController:
    """Chooses the draft length of a round. A `fixed` length is returned as it is."""

    def __init__(
        self, costs: CostTable | None, *, fixed: int | None = None, max_draft_tokens: int = MAX_DRAFT_TOKENS
    ) -> None:
        self._costs = costs
        self._fixed = fixed
        self._max = max_draft_tokens
        self._attempted = [0.0] * max_draft_tokens
        self._accepted = [0.0] * max_draft_tokens
        self._current = 3 if fixed is None else fixed
        self._rounds_at_zero = 0

    @property
    def current(self) -> int:
        """The length in use, probes aside."""
        return self._current

    def choose(self, batch_size: int) -> int:
        """The length for the next round."""
        if self._fixed is not None or self._costs is None:
            return self._current
        best = max(range(self._max + 1), key=lambda length: self._tokens_per_s(batch_size, length))
        if self._tokens_per_s(batch_size, best) > _MARGIN * self._tokens_per_s(batch_size, self._current):
            self._current = best
        if self._current > 0:
            self._rounds_at_zero = 0
            return self._current
        self._rounds_at_zero += 1
        return _PROBE_LENGTH if self._rounds_at_zero % _PROBE_EVERY == 0 else 0

    def observe(self, attempted_accepted_B: list[tuple[int, int]]) -> None:
        """One round: of each sequence, positions before `accepted` stood and the last attempted may have
        fallen. A round in which nobody drafted teaches nothing and is not remembered."""
        if not any(attempted for attempted, _ in attempted_accepted_B):
            return
        keep = 1.0 - 1.0 / _MEMORY_ROUNDS
        for position in range(self._max):
            attempted = sum(position < attempted for attempted, _ in attempted_accepted_B)
            accepted = sum(position < accepted for _, accepted in attempted_accepted_B)
            self._attempted[position] = keep * self._attempted[position] + attempted
            self._accepted[position] = keep * self._accepted[position] + accepted

    def renew(self) -> None:
        """The draft changed: if speculation is off, a probe comes at once."""
        self._rounds_at_zero = _PROBE_EVERY - 1

    def acceptance_by_position(self) -> list[float]:
        """Estimated probability that position g stands, given that all before it did; little evidence
        leans on the mean, and that on one half."""
        total = sum(self._attempted)
        mean = (sum(self._accepted) + 0.5 * _PRIOR_ATTEMPTS) / (total + _PRIOR_ATTEMPTS)
        return [
            (accepted + mean * _PRIOR_ATTEMPTS) / (attempted + _PRIOR_ATTEMPTS)
            for accepted, attempted in zip(self._accepted, self._attempted, strict=True)
        ]

    def _tokens_per_s(self, batch_size: int, length: int) -> float:
        assert self._costs is not None
        expected = expected_block_efficiency(self.acceptance_by_position()[:length])
        return expected / self._costs.round_s(batch_size, length)
