"""The cost model: seconds of a round, used by the engine's choice of draft lengths and the learner's gate.

Holds seconds of a target pass by (batch, tokens a sequence), and by batch the seconds of a one-token draft
pass and the extra seconds of the first one (see cost_measurement). Between measured points the table
interpolates; live rounds scale it as a whole, because a measurement on an idle machine is too low. Pure:
knows no pass and no tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

_LIVE_WEIGHT = 0.02
"""Weight of one live round in the running correction."""


@dataclass
class CostTable:
    """Rows by batch size, columns by tokens a sequence; the two scales follow live rounds.

    `draft_scale` multiplies `target_scale`: other work on the machine slows both models alike, and rounds
    without drafts, which show nothing of the draft, must not leave its cost at the level of a busy hour.
    """

    batch_sizes: tuple[int, ...]
    token_counts: tuple[int, ...]
    target_pass_s: tuple[tuple[float, ...], ...]
    draft_pass_s: tuple[float, ...]
    draft_start_s: tuple[float, ...]
    target_scale: float = field(default=1.0)
    draft_scale: float = field(default=1.0)

    def adopt(self, other: "CostTable") -> None:
        """Take over a newer measurement in place, so that all who hold this table use it."""
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    def target_s(self, batch_size: float, num_tokens: int) -> float:
        by_tokens = [interpolate(self.token_counts, row, num_tokens) for row in self.target_pass_s]
        return self.target_scale * interpolate(self.batch_sizes, by_tokens, batch_size)

    def propose_s(self, batch_size: float, num_draft_tokens: int) -> float:
        """Seconds of drafting so many tokens; 0 for none."""
        if num_draft_tokens == 0:
            return 0.0
        start_s = interpolate(self.batch_sizes, self.draft_start_s, batch_size)
        pass_s = interpolate(self.batch_sizes, self.draft_pass_s, batch_size)
        return self.target_scale * self.draft_scale * (start_s + num_draft_tokens * pass_s)

    def round_s(self, batch_size: float, num_draft_tokens: int) -> float:
        """Forward time of a round of this draft length."""
        return self.target_s(batch_size, num_draft_tokens + 1) + self.propose_s(batch_size, num_draft_tokens)

    def seconds_by_length(self, batch_size: float, longest: int) -> tuple[list[float], list[float]]:
        """Seconds of the target's pass and of the proposal, by draft length, 0 to `longest`. A longer pass
        never costs less: where the measurement says so, other work slowed the shorter pass."""
        lengths = range(longest + 1)
        target_s = [self.target_s(batch_size, length + 1) for length in lengths]
        for length in reversed(lengths[:-1]):
            target_s[length] = min(target_s[length], target_s[length + 1])
        return target_s, [self.propose_s(batch_size, length) for length in lengths]

    def observe_target(self, batch_size: float, num_drafted: int, target_pass_s: float) -> None:
        """Move `target_scale` toward a live round; a single slow round moves it little."""
        ratio = target_pass_s / self.target_s(batch_size, num_drafted + 1)
        self.target_scale *= 1.0 + _LIVE_WEIGHT * (_clip(ratio) - 1.0)

    def observe_draft(self, batch_size: float, draft_passes: Sequence[int], propose_s: float) -> None:
        """Move `draft_scale` toward a live round's proposals (`draft_passes` of each model) that had at most
        two tokens to catch up with."""
        ratio = propose_s / sum(self.propose_s(batch_size, num_passes) for num_passes in draft_passes)
        self.draft_scale *= 1.0 + _LIVE_WEIGHT * (_clip(ratio) - 1.0)


def interpolate(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    """Piecewise linear; beyond the ends the last value scales with x / x_end upward, stays downward."""
    if x <= xs[0]:
        return ys[0]
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=True), strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1] * x / xs[-1]


def _clip(ratio: float) -> float:
    return min(2.0, max(0.5, ratio))
