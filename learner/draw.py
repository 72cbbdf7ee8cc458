"""Chooses the records of a training step: fresh and replayed, by route, never a held-out one.

Knows no tensors. Invariant: whether a record is held out depends on its request id alone, so all
segments and choices of a request, in any process, at any time, fall on the same side.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from buffer.records import GenerationRecord
from buffer.store import RecordStore, StreamKey


def is_held_out(request_id: str, held_out_share: float) -> bool:
    """Stable across processes and versions of Python."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "big") < held_out_share * 2**64


def num_steps(num_fresh: int, fresh_per_step: int, passes: float, max_steps: int) -> int:
    """Steps that `passes` over the fresh records take; at least 1 if there are any."""
    return min(max_steps, max(1, round(passes * num_fresh / fresh_per_step))) if num_fresh else 0


def fresh_draws(
    fresh: Sequence[GenerationRecord], per_step: int, steps: int, rng: np.random.Generator
) -> Iterator[list[GenerationRecord]]:
    """`steps` draws of `per_step` records (fewer if there are fewer), in shuffled passes over them."""
    waiting: list[int] = []
    per_step = min(per_step, len(fresh))
    for _ in range(steps):
        while len(waiting) < per_step:
            waiting += rng.permutation(len(fresh)).tolist()
        chosen, waiting = waiting[:per_step], waiting[per_step:]
        yield [fresh[index] for index in chosen]


def replay_draw(
    store: RecordStore,
    keys: Sequence[StreamKey],
    num_records: int,
    held_out_share: float,
    rng: np.random.Generator,
) -> list[GenerationRecord]:
    """About `num_records` kept records, an equal share of every route, held-out ones left out."""
    drawn: list[GenerationRecord] = []
    if not keys or num_records == 0:
        return drawn
    order = rng.permutation(len(keys))
    for place, index in enumerate(order):
        share = num_records // len(keys) + (place < num_records % len(keys))
        if share == 0:
            continue
        wanted = int(np.ceil(share / (1 - held_out_share))) + 1
        kept = store.draw_replay(keys[index], wanted, int(rng.integers(2**31)))
        drawn += [item for item in kept if not is_held_out(item.request_id, held_out_share)][:share]
    return drawn
