"""What the target answers to each request, and its rows along the answer, recorded once by the real engine.

Greedy and seeded answers do not depend on any draft (a seed is a promise), so one recording serves every arm,
seed and ablation. Invariant: one row a recorded token, under the same capture that serving uses.

Legend: N recorded tokens of a request, K kept entries.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.osd.corpus import CorpusExchange
from benchmarks.prompts import said, token_ids
from buffer.names import DEFAULT_ROUTE
from serving.engine.request import Generation, GenerationRequest, SamplingParams
from serving.local import build_engine
from serving.models.loading import ModelPair
from serving.options import EngineOptions

_RAGGED = (
    "prompt_token_ids",
    "token_ids_N",
    "topk_token_ids_NK",
    "topk_logprobs_NK",
    "emitted_logprob_N",
    "prompt_embedding_H",
)
_SLOTS = 32


@dataclass(frozen=True, eq=False)
class RecordedAnswer:
    """One request and what the target said."""

    request_id: str
    domain: str
    kind: str
    temperature: float
    """0 or 1."""
    seed: int | None
    """Of the shared noise; None when greedy."""
    stopped: bool
    """Whether the last token ended the text; else the token limit did."""
    prompt_token_ids: NDArray[np.int32]
    token_ids_N: NDArray[np.int32]
    topk_token_ids_NK: NDArray[np.int32]
    topk_logprobs_NK: NDArray[np.float16]
    emitted_logprob_N: NDArray[np.float32]
    prompt_embedding_H: NDArray[np.float16]
    """The target's mean hidden state over the prompt."""
    arrival: int = 0
    """How often the same request came before."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_N)


@dataclass(frozen=True)
class Asking:
    """How requests are put: the longest prompt and answer, in tokens. A longer question loses its beginning,
    the chat template nothing."""

    prompt_tokens: int = 96
    max_tokens: int = 40
    cut: str = "question"
    """Names what is cut, for what was recorded when it was the whole prompt."""


def record_answers(
    pair: ModelPair,
    exchanges: Sequence[CorpusExchange],
    temperature: float,
    asking: Asking,
) -> list[RecordedAnswer]:
    """Ask the target alone, through the engine, for every request. It embeds the prompts that it routes."""
    recorded: list[RecordedAnswer] = []
    alone = replace(pair, draft=None)
    room = asking.prompt_tokens + asking.max_tokens
    options = EngineOptions(num_slots=_SLOTS, max_seq_len=room, speculation="off")
    with build_engine(alone, options=options, router=lambda embedding_H: DEFAULT_ROUTE) as engine:
        for start in range(0, len(exchanges), 4 * _SLOTS):
            part = exchanges[start : start + 4 * _SLOTS]
            asked = [
                _request(pair, row, number, temperature, asking) for number, row in enumerate(part, start)
            ]
            handles = [engine.submit(request) for request in asked]
            recorded += [_recorded(row, handle.result()) for row, handle in zip(part, handles, strict=True)]
    return recorded


def recorded_once(
    file: Path,
    pair: ModelPair,
    exchanges: Callable[[], Sequence[CorpusExchange]],
    temperature: float,
    asking: Asking,
) -> list[RecordedAnswer]:
    """From `file`; without it the exchanges are read, recorded now and kept there."""
    if not file.exists():
        save(file, record_answers(pair, exchanges(), temperature, asking))
    return load(file)


def save(file: Path, recorded: Sequence[RecordedAnswer]) -> None:
    """As .npz: ragged arrays end to end; appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.concatenate([getattr(one, name) for one in recorded]) for name in _RAGGED}
    arrays["prompt_lengths"] = np.array([len(one.prompt_token_ids) for one in recorded])
    arrays["told_lengths"] = np.array([one.num_tokens for one in recorded])
    arrays["widths"] = np.array([len(one.prompt_embedding_H) for one in recorded])
    heads = [
        [one.request_id, one.domain, one.kind, one.temperature, one.seed, one.stopped] for one in recorded
    ]
    aside = file.with_suffix(".part.npz")
    with aside.open("wb") as opened:
        np.savez(opened, allow_pickle=False, heads=np.array(json.dumps(heads)), **arrays)
    aside.replace(file)


def load(file: Path) -> list[RecordedAnswer]:
    with np.load(file) as kept:
        arrays = {name: kept[name] for name in kept.files}
    heads = json.loads(str(arrays["heads"]))
    lengths = {"prompt_token_ids": "prompt_lengths", "prompt_embedding_H": "widths"}
    columns = [
        np.split(arrays[name], np.cumsum(arrays[lengths.get(name, "told_lengths")])[:-1]) for name in _RAGGED
    ]
    return [RecordedAnswer(*head, *parts) for head, *parts in zip(heads, *columns, strict=True)]


def _request(
    pair: ModelPair, row: CorpusExchange, number: int, temperature: float, asking: Asking
) -> GenerationRequest:
    assert pair.tokenizer is not None
    asked = fitted_prompt(pair.tokenizer, row.question, asking.prompt_tokens)
    seed = number if temperature else None
    sampling = SamplingParams(temperature=temperature, seed=seed, max_tokens=asking.max_tokens)
    name = f"{row.domain}-{number}" + (f"@{temperature:g}" if temperature else "")
    return GenerationRequest(name, tuple(asked), sampling, capture=True)


def fitted_prompt(tokenizer: Any, question: str, max_tokens: int) -> list[int]:
    """The question in the chat template, without as many of its first tokens as it takes to fit. Raises
    ValueError where the template alone is too long."""
    words = list(tokenizer.encode(question, add_special_tokens=False))
    while len(asked := token_ids(tokenizer, [said("user", question)])) > max_tokens:
        if not words:
            raise ValueError(
                f"the chat template alone takes {len(asked)} tokens, more than prompt_tokens={max_tokens}"
            )
        words = words[len(asked) - max_tokens :]
        question = tokenizer.decode(words)
    return asked


def _recorded(row: CorpusExchange, generation: Generation) -> RecordedAnswer:
    rounds, embedding_H = generation.captured_rounds, generation.prompt_embedding_H
    assert embedding_H is not None, "a chat prompt has more than one token"
    sampling = generation.sampling
    return RecordedAnswer(
        generation.request_id,
        row.domain,
        row.kind,
        sampling.temperature,
        sampling.seed,
        generation.finish_reason == "stop",
        np.array(generation.prompt_token_ids, np.int32),
        np.array(generation.output_token_ids, np.int32),
        np.concatenate([captured.topk_token_ids_EK for captured in rounds]),
        np.concatenate([captured.topk_logprobs_EK for captured in rounds]),
        np.concatenate([captured.emitted_target_logprobs_C for captured in rounds]),
        embedding_H,
    )


def shuffled(recorded: Sequence[RecordedAnswer], seed: int, num_records: int) -> list[RecordedAnswer]:
    """A seed's own order of arrival; where there are too few they arrive again, in another order."""
    rng = np.random.default_rng(seed)
    arrived: list[RecordedAnswer] = []
    for arrival in range(-(-num_records // max(1, len(recorded)))):
        arrived += [replace(recorded[index], arrival=arrival) for index in rng.permutation(len(recorded))]
    return arrived[:num_records]


def interleaved(streams: Sequence[Sequence[RecordedAnswer]]) -> Iterator[RecordedAnswer]:
    """One of each in turn, as far as the shortest goes."""
    for row in zip(*streams, strict=False):
        yield from row
