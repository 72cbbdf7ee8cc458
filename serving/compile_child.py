"""Compiles one package and exits: `python -m serving.compile_child PATH < spec.json`.

The model has the shape of the spec and random weights. A lock beside the package lets only one process
compile it; the package is written atomically.
"""

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from serving.engine.passes.compiled_pass import compile_pass
from serving.engine.passes.grouped_attention import NAME, use_grouped_attention
from serving.engine.passes.hidden_states import hidden_states_of
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPass
from serving.models.context_limit import hold_frequencies
from serving.models.target_part import reshape

_NUM_SLOTS = 4


def main(path: Path, spec: dict[str, Any]) -> None:
    """Write the package to `path`, unless another process did meanwhile."""
    os.nice(10)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        unfinished = path.with_suffix(f".{os.getpid()}.pt2")
        try:
            _compile(unfinished, spec)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def _compile(path: Path, spec: dict[str, Any]) -> None:
    torch.set_num_threads(spec["num_threads"])
    config = AutoConfig.for_model(**spec["config"])
    model = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, spec["dtype"]), attn_implementation="sdpa"
    ).eval()
    reshape(model)
    hold_frequencies(model)
    if spec["attention"] == NAME:
        use_grouped_attention(model)
    if spec.get("states"):
        model = hidden_states_of(model)
    runner = Runner(model, num_slots=_NUM_SLOTS, max_seq_len=spec["max_seq_len"])
    compile_pass(SlotPass(model, runner.max_seq_len), runner.cache.rows(0, _NUM_SLOTS), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.load(sys.stdin))
