"""Many generations of one sampled request through the real engine, against the distribution of all its
outputs.

The engine is played by a script, so a case gives the same outputs every time it is run.
"""

import math
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from serving.drafters.stopping import StoppingName
from serving.engine import GenerationRequest, SamplingParams
from tests.support.automaton import Automaton
from tests.support.chi_square import FALSE_ALARM_RATE, fit_p_value
from tests.support.lossless_checks import target_of
from tests.support.reference import output_distribution
from tests.support.rule_checks import MIN_EXPECTED
from tests.support.scheduled_engine import play
from tests.support.schedules import Copies, DrafterKind, Event, Join, Open, Schedule, Swap, Table
from tests.support.table_model import TableModel

_TABLES: tuple[Table, ...] = ("random", "sharp", "holes")


@dataclass(frozen=True)
class DistributionCase:
    """Requests with the same prompt and parameters, between batch mates and through swaps."""

    sampling: SamplingParams
    vocab_size: int = 4
    prompt: tuple[int, ...] = (1, 0, 1, 1, 0)
    draft_lengths: tuple[int, ...] = (3,)
    swap_every: int = 0
    """Turns from a swap to the next; 0: none."""
    mates: tuple[SamplingParams, ...] = ()
    """One of them, in turn, beside each sampled request."""
    routes: tuple[str | None, ...] = (None,)
    """Of the sampled requests, in turn; each but None has a draft of its own, with distributions of its
    own."""
    drafter: DrafterKind = "model"
    copies: Copies = "none"
    stopping: StoppingName = "controller"
    num_prefix_blocks: int = 0
    seed: int = 1
    num_samples: int = 3000
    num_slots: int = 16


MATES = (
    SamplingParams(temperature=0.0, max_tokens=5),
    SamplingParams(seed=4, max_tokens=4),
    SamplingParams(temperature=0.3, top_k=2, max_tokens=2, num_draft_tokens=0),
)

DISTRIBUTION_CASES = {
    "drafted": DistributionCase(SamplingParams(max_tokens=3), draft_lengths=(1, 3, 2), num_samples=4000),
    "arbitrary drafts": DistributionCase(SamplingParams(temperature=1.5, max_tokens=3), drafter="arbitrary"),
    "copies beside drafts": DistributionCase(SamplingParams(temperature=1.2, max_tokens=3), copies="random"),
    "stopping after an unsure draw": DistributionCase(
        SamplingParams(max_tokens=3), stopping="top_prob", num_samples=3000
    ),
    "stopping before an unsure draw": DistributionCase(
        SamplingParams(max_tokens=3), stopping="entropy", num_samples=3000
    ),
    "mates, swaps, changing lengths": DistributionCase(
        SamplingParams(temperature=0.8, max_tokens=3),
        draft_lengths=(2, 0, 1, 8),
        swap_every=3,
        num_prefix_blocks=4,
        mates=MATES,
        num_slots=8,
        num_samples=2500,
    ),
    "drafts of three routes in one batch": DistributionCase(
        SamplingParams(max_tokens=3),
        draft_lengths=(1, 3, 2),
        routes=(None, "r1", "r2"),
        copies="random",
        num_samples=4000,
    ),
    "cut distributions": DistributionCase(
        SamplingParams(top_k=3, top_p=0.85, min_p=0.02, max_tokens=3), mates=MATES[2:]
    ),
    "penalties": DistributionCase(
        SamplingParams(
            presence_penalty=1.5,
            frequency_penalty=-1.0,
            repetition_penalty=1.7,
            logit_bias={2: 1.0},
            max_tokens=3,
        ),
        draft_lengths=(1, 2),
        num_samples=4000,
    ),
    "a constraint that follows the drafts": DistributionCase(
        SamplingParams(max_tokens=4, constraint=Automaton(((1, 2, -1, 0), (-1, 0, 2, 1), (0, -1, 1, -1)))),
        draft_lengths=(1, 3, 2),
        copies="random",
        mates=MATES,
        num_samples=4000,
    ),
    "stop ids inside drafts": DistributionCase(
        SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=(1, 3)), swap_every=20, draft_lengths=(4,)
    ),
}
"""What the suite always runs."""


@st.composite
def distribution_cases(draw: st.DrawFn) -> DistributionCase:
    """Any case whose outputs are few enough to enumerate."""
    vocab_size, max_tokens = draw(st.sampled_from([(2, 5), (3, 3), (4, 3), (9, 2)]))
    bans = -math.inf if vocab_size > 2 else -2.0  # of two, one may be a stop that is held back
    return DistributionCase(
        SamplingParams(
            temperature=draw(st.sampled_from([0.5, 1.0, 1.0, 5.0])),
            top_k=draw(st.sampled_from([0, 0, 2])),
            top_p=draw(st.sampled_from([1.0, 1.0, 0.8])),
            min_p=draw(st.sampled_from([0.0, 0.0, 0.05])),
            max_tokens=max_tokens,
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.6])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.0, 2.0])),
            logit_bias=draw(st.sampled_from([(), ((0, 2.0),), ((vocab_size - 1, bans),)])),
            min_tokens=draw(st.integers(0, 2)),
            stop_token_ids=(0,) if draw(st.booleans()) else (),
            num_draft_tokens=draw(st.sampled_from([None, None, 1, 2])),
        ),
        vocab_size=vocab_size,
        draft_lengths=tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))),
        swap_every=draw(st.sampled_from([0, 2, 11])),
        mates=MATES if draw(st.booleans()) else (),
        drafter=draw(st.sampled_from(["model", "model", "arbitrary"])),
        stopping=draw(st.sampled_from(["controller", "controller", "top_prob", "entropy"])),
        copies=draw(st.sampled_from(["none", "none", "random", "ngram"])),
        routes=draw(st.sampled_from([(None,), (None, "r1"), ("r1", "r2", None)])),
        seed=draw(st.integers(0, 2**16)),
        num_samples=1500,
        num_slots=draw(st.sampled_from([8, 16])),
    )


def check_distribution(
    case: DistributionCase, false_alarm_rate: float = FALSE_ALARM_RATE, **options: Any
) -> None:
    """The sampled outputs follow the target's distribution."""
    schedule = _schedule(case)
    target = target_of(schedule)
    draft = TableModel(case.vocab_size, seed=case.seed + 100, sharpness=1.5)
    generations = play(schedule, target, draft, **options)
    distribution = output_distribution(target, schedule.requests[0], schedule.stop_ids(schedule.requests[0]))
    outputs = [
        tuple(generation.output_token_ids)
        for request_id, generation in generations.items()
        if request_id.startswith("sampled")
    ]
    assert len(outputs) == case.num_samples
    p_value = fit_p_value(outputs, distribution, MIN_EXPECTED)
    assert p_value > false_alarm_rate, (
        f"the outputs do not follow the target's distribution: p = {p_value:.2g}"
    )


def _schedule(case: DistributionCase) -> Schedule:
    events: list[Event] = []
    for number, route in enumerate(case.routes):
        if route is not None:
            events += [Open(0, route), Swap(0, 1, _TABLES[number % len(_TABLES)], route)]
    for index in range(case.num_samples):
        route = case.routes[index % len(case.routes)]
        events.append(Join(0, GenerationRequest(f"sampled-{index}", case.prompt, case.sampling, route=route)))
        if case.mates:
            mate = case.mates[index % len(case.mates)]
            events.append(Join(0, GenerationRequest(f"mate-{index}", case.prompt[: 1 + index % 5], mate)))
    if case.swap_every:
        turns = range(1, case.num_samples, case.swap_every)
        events += [Swap(turn, turn, _TABLES[turn % len(_TABLES)]) for turn in turns]
    return Schedule(
        vocab_size=case.vocab_size,
        max_seq_len=24,
        num_slots=case.num_slots,
        chunk_tokens=64,
        draft_chunk_tokens=64,
        num_prefix_blocks=case.num_prefix_blocks,
        drafter=case.drafter,
        copies=case.copies,
        stopping=case.stopping,
        has_floor=False,
        eos_token_ids=(),
        draft_lengths=case.draft_lengths,
        poisoned=False,
        seed=case.seed,
        rounded=False,
        events=tuple(events),
    )
