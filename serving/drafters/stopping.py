"""Rules for when to stop drafting before the limit, behind one Protocol; all of them lossless.

A rule is asked at two points: before a draw, when it may look at the draft's logits there, and after it, when
the drawn token is already part of the proposal. No rule can remove a token: dropping a token because of what
was drawn would bias the output. The limit itself is the draft length that the drafter was asked for, fixed or
chosen by the controller. Knows no target.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

StoppingName = Literal["controller", "top_prob", "entropy"]
DEFAULT_TOP_PROBABILITY = 0.4
DEFAULT_ENTROPY = 2.0


class StoppingRule(Protocol):
    """Returns for each row whether it stops here. None: no row stops, and no tensor was touched."""

    def before_draw(self, logits_BV: Tensor) -> list[bool] | None:
        """A row that stops draws nothing at this position."""
        ...

    def after_draw(self, logits_BV: Tensor) -> list[bool] | None:
        """A row that stops keeps the token that it drew from these logits."""
        ...


class LimitOnly:
    """Drafts as far as it was asked to: a fixed length, or the controller's."""

    def before_draw(self, logits_BV: Tensor) -> list[bool] | None:
        return None

    def after_draw(self, logits_BV: Tensor) -> list[bool] | None:
        return None


@dataclass(frozen=True)
class TopProbability:
    """The token drawn where the draft was unsure (its likeliest token below `threshold`) is the last one.

    As in Kangaroo (arXiv 2404.18911)."""

    threshold: float = DEFAULT_TOP_PROBABILITY

    def before_draw(self, logits_BV: Tensor) -> list[bool] | None:
        return None

    def after_draw(self, logits_BV: Tensor) -> list[bool] | None:
        stops: list[bool] = (logits_BV.float().softmax(-1).amax(-1) < self.threshold).tolist()
        return stops


@dataclass(frozen=True)
class Entropy:
    """Nothing is drawn where the draft's distribution has more than `threshold` nats of entropy."""

    threshold: float = DEFAULT_ENTROPY

    def before_draw(self, logits_BV: Tensor) -> list[bool] | None:
        logprobs_BV = logits_BV.float().log_softmax(-1)
        entropy_B = -(logprobs_BV.exp() * logprobs_BV.clamp(min=-1e4)).sum(-1)
        stops: list[bool] = (entropy_B > self.threshold).tolist()
        return stops

    def after_draw(self, logits_BV: Tensor) -> list[bool] | None:
        return None


def stopping_rule(name: StoppingName, threshold: float | None = None) -> StoppingRule:
    """The rule of that name; None takes the rule's own threshold."""
    if name == "controller":
        return LimitOnly()
    if name == "top_prob":
        return TopProbability() if threshold is None else TopProbability(threshold)
    return Entropy() if threshold is None else Entropy(threshold)
