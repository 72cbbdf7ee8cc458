"""How long the forwards themselves take, and the speed-up that they would allow.

Passes are timed as a round runs them, the draft's before the target's, so that each finds the processor's
cache as it would; nothing of the engine's own work is in these figures.

B sequences, G draft tokens.
"""

import statistics
from dataclasses import dataclass

from serving.compiling import CompileChoice, Compiling
from serving.engine.cost_measurement import pass_s
from serving.engine.cost_table import interpolate
from serving.engine.passes.packed_linear import pack_linears
from serving.engine.passes.pass_compiler import CompileError
from serving.engine.passes.runner import Runner
from serving.local import draft_runner
from serving.models.loading import ModelPair
from serving.models.target_part import own_copy
from serving.runner_check import prepare_runner

LENGTHS = (0, 1, 2, 4, 8)
REPEATS = 15


@dataclass(frozen=True)
class ForwardTimes:
    """Seconds at one batch size and context, by number of draft tokens."""

    num_draft_tokens: tuple[int, ...]
    target_pass_s: tuple[float, ...]
    """One target pass over G + 1 tokens of every sequence."""
    draft_pass_s: tuple[float, ...]
    """One draft pass, the mean of the G before that target pass; 0 where G is 0."""

    def predicted_speedup(
        self, block_efficiency: float, num_draft_tokens: float, num_draft_passes: float
    ) -> float:
        """Over one token a target pass: block_efficiency x T(B, 1) / (T(B, G + 1) + P x D(B)), linear
        between measured lengths. The P passes are G where the model drafts all, less where some is copied."""
        lengths = self.num_draft_tokens
        drafting_s = num_draft_passes * interpolate(lengths, self._draft_s(), num_draft_passes)
        round_s = interpolate(lengths, self.target_pass_s, num_draft_tokens) + drafting_s
        return block_efficiency * self.target_pass_s[0] / round_s

    def _draft_s(self) -> tuple[float, ...]:
        """Below one draft token a pass costs what the first does."""
        return (self.draft_pass_s[1], *self.draft_pass_s[1:])


@dataclass(frozen=True)
class PassRunners:
    """Both models over caches of their own, with the passes that engines on them run."""

    target: Runner
    draft: Runner
    passes: str
    """What runs them: compiled, or eager and why."""


def pass_runners(pair: ModelPair, *, num_slots: int, max_seq_len: int, compile: CompileChoice) -> PassRunners:
    """Waits for the compiler; engines of the same shape then find what it left."""
    assert pair.draft is not None
    pack_linears(pair.target)
    target = Runner(pair.target, num_slots=num_slots, max_seq_len=max_seq_len)
    draft = draft_runner(own_copy(pair.draft), target)
    prepare_runner(target, pair.target_id)
    prepare_runner(draft, pair.draft_id)
    try:
        state = Compiling(target, draft, "off" if compile == "off" else "on").state
    except CompileError as error:
        if compile == "on":
            raise
        state = f"eager ({error})"
    return PassRunners(target, draft, state)


def measure_forwards(
    runners: PassRunners, *, batch_size: int, context_tokens: int, repeats: int = REPEATS
) -> ForwardTimes:
    """Medians; every length takes its turn."""
    target_s: dict[int, list[float]] = {length: [] for length in LENGTHS}
    draft_s: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for turn in range(repeats + 1):
        for length in LENGTHS:
            drafting_s = sum(
                pass_s(runners.draft, batch_size, 1, context_tokens + position) for position in range(length)
            )
            verifying_s = pass_s(runners.target, batch_size, length + 1, context_tokens)
            if turn:  # the first one warms up
                draft_s[length].append(drafting_s / max(1, length))
                target_s[length].append(verifying_s)
    return ForwardTimes(
        LENGTHS,
        tuple(statistics.median(target_s[length]) for length in LENGTHS),
        tuple(statistics.median(draft_s[length]) for length in LENGTHS),
    )
