"""Two checkouts of everdraft on the same work, in turn: what a change cost those who do not use it.

Each checkout runs in a process of its own, both are up all the time, and one works at a time.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from benchmarks.overheads import lower_bound

ARMS = ("off", "fixed", "adaptive", "ngram")
CLIENTS = (1, 8)
PROMPTS_PER_TURN = 8
NUM_TOKENS = 64

_CHILD = """
import json, sys, time
from serving.engine import SamplingParams
from serving.local import load_engine
from serving.options import EngineOptions
target, draft, threads, compile = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
OPTIONS = {
    "off": {"speculation": "off"},
    "fixed": {"speculation": "model", "num_draft_tokens": 4},
    "adaptive": {"speculation": "model"},
    "ngram": {"speculation": "ngram"},
}
engines = {}
def engine_of(arm, clients):
    if (arm, clients) not in engines:
        given = {"max_seq_len": 256, "compile": compile, "prefix_cache_mib": 0, **OPTIONS[arm]}
        engines[arm, clients] = load_engine(target, draft, EngineOptions(num_slots=clients, **given))
    return engines[arm, clients]
answers, sys.stdout = sys.stdout, sys.stderr
print("ready", file=answers, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    prompts, clients = asked["prompts"], asked["clients"]
    engine = engine_of(asked["arm"], clients)
    sampling = SamplingParams(temperature=0.0, max_tokens=asked["num_tokens"], ignore_eos=True)
    began_s, outputs = time.perf_counter(), []
    for start in range(0, len(prompts), clients):
        found = engine.generate(prompts[start : start + clients], sampling)
        outputs += [list(map(int, one.output_token_ids)) for one in found]
    wall_s = time.perf_counter() - began_s
    answer = {"tokens_per_s": sum(map(len, outputs)) / wall_s, "outputs": outputs}
    print(json.dumps(answer), file=answers, flush=True)
"""
"""Says nothing that one of the two does not know."""


class Checkout:
    """One of the two, as a process."""

    def __init__(self, child: subprocess.Popen[str], source: IO[str], sink: IO[str]) -> None:
        self._child, self._source, self._sink = child, source, sink

    def wait(self) -> None:
        self._line()

    def run(self, **asked: Any) -> dict[str, Any]:
        self._sink.write(json.dumps(asked) + "\n")
        self._sink.flush()
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def _line(self) -> str:
        line = self._source.readline()
        if not line:
            raise RuntimeError(f"a checkout's process ended with {self._child.wait()}; see above")
        return line


@contextmanager
def started(folder: Path, target: str, draft: str, threads: int, compile: str) -> Iterator[Checkout]:
    command = [sys.executable, "-c", _CHILD, target, draft, str(threads), compile]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            yield Checkout(child, child.stdout, child.stdin)
        finally:
            child.kill()


def compare(
    now: Checkout,
    base: Checkout,
    prompts: Iterator[list[int]],
    num_pairs: int,
    report: Callable[[str], None],
    arms: Sequence[str] = ARMS,
) -> dict[str, Any]:
    """By arm and requests at once: tokens a second of `now` over those of `base`, pair by pair, the order
    changing from pair to pair; and the share of answers that are the same, token for token."""
    found: dict[str, Any] = {}
    for clients in CLIENTS:
        for arm in arms:
            ratios, same = [], []
            for number in range(num_pairs + 1):
                asked = list(islice(prompts, PROMPTS_PER_TURN))
                order = [now, base] if number % 2 else [base, now]
                each = {
                    checkout: checkout.run(arm=arm, clients=clients, prompts=asked, num_tokens=NUM_TOKENS)
                    for checkout in order
                }
                one, other = each[now], each[base]
                same += [a == b for a, b in zip(one["outputs"], other["outputs"], strict=True)]
                if number:  # the first is warm-up
                    ratios.append(one["tokens_per_s"] / other["tokens_per_s"])
            found[f"{arm}, {clients} at once"] = row = {
                "ratio_median": statistics.median(ratios),
                "ratio_lower_95": lower_bound(ratios),
                "identical": statistics.fmean(same),
                "ratios": ratios,
            }
            report(
                f"{arm}, {clients} at once: {row['ratio_median']:.3f} of the base, at least "
                f"{row['ratio_lower_95']:.3f}; {row['identical']:.0%} of answers the same"
            )
    return found
