"""`everdraft bench structured`: what requests of the API cost beyond their tokens, and whether they get what
they ask for."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import (
    DEMO_DRAFT,
    DEMO_TARGET,
    RESULTS,
    DraftOption,
    TargetOption,
    ThreadsOption,
)
from deploy.commands.console import errors, plain_faults


def structured(
    suite: Annotated[Path, typer.Option(help="Folder `tests` of npm's json-schema-test-suite.")],
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    cases: Annotated[int, typer.Option(help="So many of the suite, evenly; 0: all.", min=0)] = 0,
    answer_tokens: Annotated[int, typer.Option(help="The longest answer.", min=16)] = 160,
    turns: Annotated[int, typer.Option(help="Of requests with and without a form; 0: none.", min=0)] = 12,
    tokens: Annotated[int, typer.Option(help="Of each of their answers.", min=8)] = 48,
    slots: Annotated[int, typer.Option(help="Sequences at once.", min=8)] = 8,
    threads: ThreadsOption = 1,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "structured.json",
) -> None:
    """Structured output: answers that end in their form, with speculation and without, and its cost."""
    import torch

    from benchmarks import structured as bench
    from deploy.demo.report import write_report
    from serving.local import load_engine
    from serving.options import EngineOptions

    torch.set_num_threads(threads)
    with plain_faults():
        listed = list(bench.suite(suite))
    chosen = listed if not cases else [listed[index * len(listed) // cases] for index in range(cases)]
    say = errors().print
    options = EngineOptions(num_slots=slots, max_seq_len=512 + answer_tokens, max_route_drafts=0)
    with load_engine(target, draft, options) as engine:
        found = bench.measure_suite(engine, chosen, answer_tokens, say)
        for name, judged in found.items():
            if name.startswith("temperature"):
                say(name, {key: value for key, value in judged.items() if key != "not_ended"})
        cost = bench.measure_cost(engine, turns, tokens, say) if turns else {}
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "structured", {"threads": threads, "suite": found, "cost": cost}, {})
