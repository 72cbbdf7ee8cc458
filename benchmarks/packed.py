"""What packed layers make of a target's passes: plain and packed in turn, by tokens, on one model."""

import statistics
from typing import Any

import torch

from serving.engine.cost_measurement import fastest_pass_s
from serving.engine.passes import packed_linear
from serving.engine.passes.packed_linear import pack_linears
from serving.engine.passes.runner import Runner
from serving.models.loading import load_model
from serving.runner_check import prepare_runner

TOKENS = (1, 2, 3, 4, 5, 7, 9)
_MAX_SEQ_LEN = 288


def measure_packed(target: str, turns: int) -> dict[str, Any]:
    """Medians over turns of the fastest pass, in milliseconds, one sequence."""
    model = load_model(target)
    runner = Runner(model, num_slots=1, max_seq_len=_MAX_SEQ_LEN)
    prepare_runner(runner, target)
    packed_bytes, rows = pack_linears(model), packed_linear.ROWS
    passes_s: dict[str, dict[int, list[float]]] = {
        arm: {count: [] for count in TOKENS} for arm in ("plain", "packed")
    }
    try:
        for _ in range(turns):
            for arm, by_tokens in passes_s.items():
                packed_linear.ROWS = range(0) if arm == "plain" else rows
                for count, found in by_tokens.items():
                    found.append(fastest_pass_s(runner, 1, count))
    finally:
        packed_linear.ROWS = rows
    return {"packed_mib": packed_bytes / 2**20, "num_threads": torch.get_num_threads()} | {
        arm: {str(count): 1e3 * statistics.median(found) for count, found in by_tokens.items()}
        for arm, by_tokens in passes_s.items()
    }
