"""Records that teach a draft nothing or the wrong thing, made from honest ones.

Pure functions of (record, generator). Knows no learner. Invariant: honest records are not changed.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from buffer.records import GenerationRecord, RoundTrace

Spoil = Callable[[GenerationRecord, np.random.Generator], GenerationRecord]
SpoilTrace = Callable[[RoundTrace, np.random.Generator], RoundTrace]


def _every_round(spoil: SpoilTrace) -> Spoil:
    def spoiled(record: GenerationRecord, rng: np.random.Generator) -> GenerationRecord:
        return replace(record, rounds=tuple(spoil(trace, rng) for trace in record.rounds))

    return spoiled


def shuffled(record: GenerationRecord, rng: np.random.Generator) -> GenerationRecord:
    """What the target said, said at other positions of the record."""
    rows = [(trace, row) for trace in record.rounds for row in range(len(trace.topk_token_ids_EK))]
    order = iter(rng.permutation(len(rows)))
    rounds = []
    for trace in record.rounds:
        drawn = [rows[next(order)] for _ in range(len(trace.topk_token_ids_EK))]
        rounds.append(
            replace(
                trace,
                topk_token_ids_EK=np.stack([other.topk_token_ids_EK[row] for other, row in drawn]),
                topk_logprobs_EK=np.stack([other.topk_logprobs_EK[row] for other, row in drawn]),
            )
        )
    return replace(record, rounds=tuple(rounds))


def _poisoned(trace: RoundTrace, rng: np.random.Generator) -> RoundTrace:
    """The target is said to have been sure of a token that it gave almost no probability."""
    ids_EK = trace.topk_token_ids_EK[:, ::-1].copy()
    return replace(trace, topk_token_ids_EK=ids_EK)


def _of_another_tokenizer(trace: RoundTrace, rng: np.random.Generator) -> RoundTrace:
    """Ids of another vocabulary under this target's name."""
    size = int(trace.topk_token_ids_EK.max()) + 1
    return replace(trace, topk_token_ids_EK=(trace.topk_token_ids_EK + size // 2) % size)


def _tail(trace: RoundTrace, rng: np.random.Generator) -> RoundTrace:
    """Without the likely tokens nearly all mass is in the tail: who learns this matches the tail's mass and
    none of its tokens."""
    half = trace.topk_token_ids_EK.shape[1] // 2
    return replace(
        trace,
        topk_token_ids_EK=trace.topk_token_ids_EK[:, half:],
        topk_logprobs_EK=trace.topk_logprobs_EK[:, half:],
    )


def _shifted(trace: RoundTrace, rng: np.random.Generator) -> RoundTrace:
    """Rows read one position too late, as by the published code."""
    return replace(
        trace,
        topk_token_ids_EK=np.roll(trace.topk_token_ids_EK, 1, axis=0),
        topk_logprobs_EK=np.roll(trace.topk_logprobs_EK, 1, axis=0),
    )


def _inflated(trace: RoundTrace, rng: np.random.Generator) -> RoundTrace:
    """One token kept K times over: it would count K times."""
    return replace(
        trace,
        topk_token_ids_EK=np.repeat(trace.topk_token_ids_EK[:, :1], trace.topk_token_ids_EK.shape[1], 1),
    )


def _overfull(trace: RoundTrace, rng: np.random.Generator) -> RoundTrace:
    return replace(trace, topk_logprobs_EK=np.zeros_like(trace.topk_logprobs_EK))


def _not_a_number(trace: RoundTrace, rng: np.random.Generator) -> RoundTrace:
    return replace(trace, topk_logprobs_EK=np.full_like(trace.topk_logprobs_EK, np.nan))


def _torn(trace: RoundTrace, rng: np.random.Generator) -> RoundTrace:
    """Fewer rows than positions."""
    return replace(trace, topk_token_ids_EK=trace.topk_token_ids_EK[:-1], retemper_E=trace.retemper_E[:-1])


def _misplaced(trace: RoundTrace, rng: np.random.Generator) -> RoundTrace:
    return replace(trace, start=trace.start + 10_000)


BAD_RECORDS: Mapping[str, Spoil] = {
    "shuffled": shuffled,
    "poisoned": _every_round(_poisoned),
    "of another tokenizer": _every_round(_of_another_tokenizer),
    "mass in the tail": _every_round(_tail),
    "one position late": _every_round(_shifted),
    "token kept twice": _every_round(_inflated),
    "probabilities over 1": _every_round(_overfull),
    "NaN": _every_round(_not_a_number),
    "torn": _every_round(_torn),
    "misplaced": _every_round(_misplaced),
    "empty": lambda record, rng: replace(record, rounds=()),
    "stale": lambda record, rng: replace(record, expires_at_s=0.0),
    "foreign": lambda record, rng: replace(record, target_revision="f" * 64),
}
