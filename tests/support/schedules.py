"""Random schedules of an engine: who joins, leaves and is swapped when, on which route and parameters.

Plain data, and the hypothesis strategies that draw it.
"""

import math
import random
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from serving.drafters.stopping import StoppingName
from serving.engine import GenerationRequest, SamplingParams
from tests.support.automaton import Automaton

Table = Literal["random", "sharp", "zero", "holes", "huge", "nan", "inf", "target"]
"""What a swap makes of the draft: another table, a flat one, one that excludes tokens, one that breaks."""
DrafterKind = Literal["model", "arbitrary", "none"]
Copies = Literal["ngram", "random", "none"]
"""What rows copy, in turn, instead of drafting: one-hot proposals of n-gram lookup, or of any tokens."""


@dataclass(frozen=True)
class Join:
    turn: int
    request: GenerationRequest


@dataclass(frozen=True)
class Cancel:
    turn: int
    request_id: str


@dataclass(frozen=True)
class Swap:
    turn: int
    draft_version: int
    table: Table
    route: str = "default"
    """Nothing happens where it has no draft of its own at that turn."""


@dataclass(frozen=True)
class Open:
    """From here on the route has a draft of its own, at first a copy of the default route's as loaded."""

    turn: int
    route: str


@dataclass(frozen=True)
class Close:
    turn: int
    route: str


Event = Join | Cancel | Swap | Open | Close


@dataclass(frozen=True)
class Schedule:
    """Events fall at turns of the engine's loop; a turn takes commands, prefills a chunk and runs a round."""

    vocab_size: int
    max_seq_len: int
    num_slots: int
    chunk_tokens: int
    draft_chunk_tokens: int
    num_prefix_blocks: int
    """What the prefix cache holds, in blocks of 2 tokens; 0: no prefix cache."""
    drafter: DrafterKind
    copies: Copies
    stopping: StoppingName
    has_floor: bool
    eos_token_ids: tuple[int, ...]
    draft_lengths: tuple[int, ...]
    """Of the rounds in turn, from the first again when they run out."""
    poisoned: bool
    """Every column that belongs to nobody holds huge values before every turn."""
    seed: int
    rounded: bool
    """The target's logits are whole numbers: ties everywhere."""
    events: tuple[Event, ...]

    @property
    def requests(self) -> list[GenerationRequest]:
        return [event.request for event in self.events if isinstance(event, Join)]

    def stop_ids(self, request: GenerationRequest) -> frozenset[int]:
        eos = () if request.sampling.ignore_eos else self.eos_token_ids
        return frozenset(
            token for token in (*eos, *request.sampling.stop_token_ids) if token < self.vocab_size
        )


_VOCAB_SIZES = st.sampled_from([2, 3, 5, 17, 100, 1000])
_TEMPERATURES = st.sampled_from([0.0, 0.0, 1e-3, 0.1, 0.7, 1.0, 1.0, 5.0])
_TOP_PS = st.sampled_from([1.0, 1.0, 1e-6, 0.25, 0.5, 0.9, 1.0 - 2**-24])
_MIN_PS = st.sampled_from([0.0, 0.0, 1e-9, 0.1, 1.0])
_PENALTIES = st.sampled_from([0.0, 0.0, 0.0, -2.0, 0.25, 2.0])
"""Exact in binary, like the factors of repetition: what ties in whole numbers ties in float32."""
_REPETITIONS = st.sampled_from([1.0, 1.0, 2**-6, 0.5, 2.0, 64.0])
_LENGTHS = st.lists(st.integers(0, 8), min_size=1, max_size=4)
_TABLES = st.sampled_from(["random", "sharp", "zero", "holes", "huge", "nan", "inf", "target"])


def examples(count: int) -> settings:
    """`count` examples in `make test-all`, two fifths of them in `make test`, many times as many by
    `make fuzz`."""
    return settings(
        max_examples=max(1, count * settings().max_examples // 100),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def sampling_params(
    draw: st.DrawFn, vocab_size: int, room: int, eos_token_ids: tuple[int, ...]
) -> SamplingParams:
    """Any parameters of a request that may still emit `room` tokens."""
    max_tokens = draw(st.sampled_from([1, min(room, 12), room, room]))
    tokens = st.integers(0, vocab_size + 1)  # ids that do not exist touch nobody
    stop_token_ids = tuple(draw(st.lists(tokens, max_size=2)))
    ignore_eos = draw(st.booleans())
    stops = {*stop_token_ids, *(() if ignore_eos else eos_token_ids)}
    biases, allowed = draw(_logit_biases(vocab_size))
    left = {*(range(vocab_size) if allowed is None else allowed)}
    left -= {token for token, bias in biases.items() if bias == -math.inf}
    if not left:
        biases, left = {}, {*(allowed or ())}
    min_tokens = draw(st.integers(0, min(max_tokens, 6))) if left - stops else 0
    decides_alone = not min_tokens and not ignore_eos and allowed is None and -math.inf not in biases.values()
    automata = st.builds(Automaton.drawn, st.just(vocab_size), st.integers(0, 9))
    return SamplingParams(
        temperature=draw(_TEMPERATURES),
        top_k=draw(st.sampled_from([0, 0, 1, 2, vocab_size, vocab_size + 1])),
        top_p=draw(_TOP_PS),
        min_p=draw(_MIN_PS),
        seed=draw(st.one_of(st.none(), st.integers(0, 9))),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        num_draft_tokens=draw(st.one_of(st.none(), st.integers(0, 8))),
        presence_penalty=draw(_PENALTIES),
        frequency_penalty=draw(_PENALTIES),
        repetition_penalty=draw(_REPETITIONS),
        logit_bias=biases,
        allowed_token_ids=allowed,
        constraint=draw(st.one_of(st.none(), automata)) if decides_alone else None,
    )


@st.composite
def _logit_biases(draw: st.DrawFn, vocab_size: int) -> tuple[dict[int, float], tuple[int, ...] | None]:
    """`logit_bias` and `allowed_token_ids`; more often than not, none."""
    tokens = st.integers(0, vocab_size - 1)
    biases = st.dictionaries(tokens, st.sampled_from([-math.inf, -100.0, -0.5, 3.0, 100.0]), max_size=3)
    allowed = st.lists(tokens, min_size=1, max_size=6).map(tuple)
    return draw(st.one_of(st.just({}), biases)), draw(st.one_of(st.none(), st.none(), allowed))


@st.composite
def _requests(
    draw: st.DrawFn, index: int, vocab_size: int, max_seq_len: int, eos_token_ids: tuple[int, ...]
) -> GenerationRequest:
    longest = max_seq_len - 1
    prompt_len = draw(st.sampled_from([1, 1, 2, longest // 2, longest - 3, longest]))
    chooser = random.Random(draw(st.integers(0, 2)))  # few, so that prompts begin alike
    return GenerationRequest(
        str(index),
        tuple(chooser.randrange(vocab_size) for _ in range(prompt_len)),
        draw(sampling_params(vocab_size, max_seq_len - prompt_len, eos_token_ids)),
        choice_index=draw(st.integers(0, 2)),
        route=draw(st.sampled_from([None, "r1", "r2", "none of its own"])),
    )


@st.composite
def _openings(draw: st.DrawFn) -> list[Open | Close]:
    """Up to two routes with a draft of their own, for a while."""
    events: list[Open | Close] = []
    for route in ("r1", "r2")[: draw(st.sampled_from([0, 0, 1, 2]))]:
        opened = Open(draw(st.integers(0, 10)), route)
        events.append(opened)
        if draw(st.booleans()):
            events.append(Close(opened.turn + draw(st.integers(1, 12)), route))
    return events


@st.composite
def schedules(draw: st.DrawFn, **fixed: Any) -> Schedule:
    """Any schedule; `fixed` sets fields of it, and `swaps=False` leaves the draft alone."""
    has_swaps = fixed.pop("swaps", True)
    vocab_size, max_seq_len = draw(_VOCAB_SIZES), draw(st.sampled_from([8, 24, 48]))
    eos_token_ids = tuple(draw(st.lists(st.integers(0, vocab_size - 1), max_size=2)))
    turns = st.integers(0, 30)
    events: list[Event] = list(draw(_openings()))
    routes = st.sampled_from(["default", *(event.route for event in events if isinstance(event, Open))])
    for index in range(draw(st.integers(1, 9))):
        joined = Join(draw(turns), draw(_requests(index, vocab_size, max_seq_len, eos_token_ids)))
        events.append(joined)
        if draw(st.integers(0, 3)) == 0:
            events.append(Cancel(joined.turn + draw(st.integers(0, 12)), joined.request.request_id))
    for version in range(1, draw(st.integers(0, 4)) + 1 if has_swaps else 1):
        events.append(Swap(draw(turns), version, draw(_TABLES), draw(routes)))
    drawn = {
        "vocab_size": vocab_size,
        "max_seq_len": max_seq_len,
        "num_slots": draw(st.integers(1, 4)),
        "chunk_tokens": draw(st.sampled_from([1, 3, 7, 64])),
        "draft_chunk_tokens": draw(st.sampled_from([1, 5, 64])),
        "num_prefix_blocks": draw(st.sampled_from([0, 3, 40])),
        "drafter": draw(st.sampled_from(["model", "model", "arbitrary", "none"])),
        "copies": draw(st.sampled_from(["ngram", "random", "none", "none"])),
        "stopping": draw(st.sampled_from(["controller", "controller", "top_prob", "entropy"])),
        "has_floor": draw(st.booleans()),
        "eos_token_ids": eos_token_ids,
        "draft_lengths": tuple(draw(_LENGTHS)),
        "poisoned": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
        "rounded": draw(st.booleans()),
        "events": tuple(sorted(events, key=lambda event: event.turn)),
    }
    return Schedule(**{**drawn, **fixed})
