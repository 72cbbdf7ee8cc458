"""Chooses the part of a target that drafts, where the operator says `self:auto`.

The speed of a part follows from what its passes cost here, which is measured, and from its acceptance once it
has learnt: what learning has shown for this target's parts, or, of parts that have not learnt yet, what it
showed on another model. The choice is made once, at start: another part is another draft, with a floor and
adapters of its own. Run as a program it answers one question on stdin, so that the memory of the target that
it loads is gone afterwards.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from buffer.names import DEFAULT_ROUTE
from buffer.redis_feed import RedisAdapterFeed
from buffer.store import AdapterFeed
from serving.engine.cost_measurement import measure_costs
from serving.engine.counters import expected_block_efficiency
from serving.engine.draft_length import MAX_DRAFT_TOKENS
from serving.engine.passes.kv_shape import KvShape
from serving.engine.passes.packed_linear import pack_linears
from serving.engine.passes.runner import Runner
from serving.local import draft_runner
from serving.models.loading import load_model, weights_revision
from serving.models.target_part import TargetPart
from serving.runner_check import prepare_runner

LEARNT = {0: 0.70, 1: 0.74, 2: 0.74, 4: 0.79, 7: 0.83}
"""Acceptance by exit layer after 600 records of one kind, of whole blocks on a target of 22 layers; see
docs/self-drafting.md."""
ACCEPTANCE = "acceptance_candidate"
"""Of the evidence that a draft was promoted for."""
COVERED = 0.99
"""Of that, what a smaller head keeps."""
WORTH_A_CHANGE = 1.15
"""Two measurements of one part on a busy machine differ by so much."""
_KEPT_OF, _LEAST_KEPT = 4, 4096
"""Fewer tokens cover too little of what any traffic says."""
_CONTEXT_TOKENS = 128
_REPEATS = 15


@dataclass(frozen=True)
class Candidate:
    """A part, and what is expected of it: one request, greedy."""

    part: str
    draft_pass_share: float
    """Of the time that a pass of the target over one token takes."""
    acceptance: float
    num_draft_tokens: int
    """The draft length of the greatest speed."""
    speedup: float
    """Over no speculation."""


def candidates(target: nn.Module) -> Iterator[TargetPart]:
    """Whole blocks, of which learning has shown most, though attention alone was as good at some exits; with
    the whole head, and, where the vocabulary is large, with a smaller one."""
    shape = KvShape.of(target)
    heads = dict.fromkeys((None, smaller_head(shape.vocab_size)))
    for exit_layer in LEARNT:
        if exit_layer < shape.num_layers:
            yield from (TargetPart(exit_layer, kept_tokens=head) for head in heads)


def smaller_head(vocab_size: int) -> int | None:
    """How many tokens a smaller head keeps: a quarter, or what covers most of an answer; None where that
    saves nothing."""
    kept = max(vocab_size // _KEPT_OF, _LEAST_KEPT)
    return kept if 2 * kept <= vocab_size else None


def choose(target: nn.Module, shown: Mapping[str, float]) -> list[Candidate]:
    """Every part that was looked at, the one to draft with first. `shown`: acceptance that learning has
    shown, by part; one of these stays unless another promises `WORTH_A_CHANGE` times its speed, because
    another begins to learn again. Raises UnsupportedModelError.

    A pass is measured of the shallowest part, of the deepest, and of one with a smaller head; between them
    its time is linear in the layers."""
    parts = list(candidates(target))
    deepest = max(parts, key=lambda part: part.exit_layer)
    smaller = next((part for part in parts if part.kept_tokens is not None), parts[0])
    pack_linears(target)
    runner = Runner(target, num_slots=1, max_seq_len=2 * _CONTEXT_TOKENS)
    prepare_runner(runner, "target")
    target_s, shallow_s = _seconds(runner, parts[0])
    layer_s = (_seconds(runner, deepest)[1] - shallow_s) / max(1, deepest.exit_layer)
    saved_s = shallow_s - _seconds(runner, smaller)[1]
    found = []
    for part in parts:
        draft_s = shallow_s + part.exit_layer * layer_s - (saved_s if part.kept_tokens else 0.0)
        found.append(_candidate(part, target_s, draft_s, expected_acceptance(part, shown)))

    def merit(candidate: Candidate) -> float:
        return candidate.speedup * (WORTH_A_CHANGE if candidate.part in shown else 1.0)

    return sorted(found, key=merit, reverse=True)


def _seconds(target: Runner, part: TargetPart) -> tuple[list[float], float]:
    """Of a pass of the target that verifies 0, 1, … draft tokens, and of a pass of the part."""
    draft = draft_runner(part.build(target.model), target)
    prepare_runner(draft, str(part))
    costs = measure_costs(
        target,
        draft,
        max_draft_tokens=MAX_DRAFT_TOKENS,
        context_tokens=_CONTEXT_TOKENS,
        repeats=_REPEATS,
    )
    return costs.seconds_by_length(1, MAX_DRAFT_TOKENS)[0], costs.draft_pass_s[0]


def expected_acceptance(part: TargetPart, shown: Mapping[str, float]) -> float:
    """What learning has shown for the part itself; else what it showed elsewhere, moved, in log-odds, by as
    much as this target's other parts differ from there."""
    if str(part) in shown:
        return shown[str(part)]
    offsets = [
        _log_odds(acceptance) - _log_odds(_elsewhere(other))
        for name, acceptance in shown.items()
        if (other := TargetPart.named(name)) is not None
    ]
    offset = sum(offsets) / len(offsets) if offsets else 0.0
    return 1.0 / (1.0 + math.exp(-_log_odds(_elsewhere(part)) - offset))


def _candidate(part: TargetPart, target_s: Sequence[float], draft_s: float, acceptance: float) -> Candidate:
    speeds = {
        length: expected_block_efficiency([acceptance] * length)
        * target_s[0]
        / (target_s[length] + length * draft_s)
        for length in range(1, MAX_DRAFT_TOKENS + 1)
    }
    best = max(speeds, key=lambda length: speeds[length])
    return Candidate(str(part), draft_s / target_s[0], acceptance, best, speeds[best])


def _elsewhere(part: TargetPart) -> float:
    """Between the exits that were measured, the next one below."""
    exit_layer = max(layer for layer in LEARNT if layer <= part.exit_layer)
    return LEARNT[exit_layer] * (1.0 if part.kept_tokens is None else COVERED)


def _log_odds(share: float) -> float:
    share = min(0.99, max(0.01, share))
    return math.log(share / (1.0 - share))


def shown_by(feed: AdapterFeed) -> dict[str, float]:
    """By part, the acceptance for which its newest kept draft of the default route was promoted."""
    return {
        manifest.draft_id: manifest.evidence[ACCEPTANCE]
        for manifest in feed.versions(DEFAULT_ROUTE)
        if ACCEPTANCE in manifest.evidence
    }


def main(question: Mapping[str, str]) -> list[dict[str, Any]]:
    """`question`: target, device, dtype, redis_url. The answer: candidates as plain data."""
    target = load_model(question["target"], device=question["device"], dtype=question["dtype"])
    with closing(RedisAdapterFeed(question["redis_url"], weights_revision(target))) as feed:
        shown = shown_by(feed)
    return [asdict(candidate) for candidate in choose(target, shown)]


if __name__ == "__main__":
    answer = main(json.load(sys.stdin))
    print(json.dumps(answer))
