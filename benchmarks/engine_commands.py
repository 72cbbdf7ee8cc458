"""`everdraft bench engines, swaps, revisions, memory, packed, lm-eval`: engines, in turn or by plan."""

import os
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks.options import (
    DEMO_DRAFT,
    DEMO_TARGET,
    RESULTS,
    AdapterOption,
    CompileOption,
    DraftOption,
    TargetOption,
    ThreadsOption,
    cache_folder,
    demo_settings,
    pair_and_adapter,
)
from deploy.commands.console import errors, output, plain_faults


def engines(
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    adapter: AdapterOption = None,
    threads: ThreadsOption = 1,
    compile: CompileOption = "on",
    clients: Annotated[
        list[int] | None, typer.Option(help="Requests at once; again for more; default: 1, 8, 16.")
    ] = None,
    turns: Annotated[int, typer.Option(help="Of every arm, warm-up aside.", min=1)] = 3,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "engines.json",
) -> None:
    """Our engine and vLLM on the same work, in turn; runs in the environment of `make setup-vllm`."""
    import torch

    from benchmarks.adapted import check_adapter
    from benchmarks.engines import ARMS, EnginesPlan, measure_engines
    from benchmarks.screen import ProgressScreen
    from deploy.demo.report import write_report
    from serving.engines.async_llm.plugin import require_vllm

    with plain_faults():
        check_adapter(adapter)
        require_vllm()
    torch.set_num_threads(threads)
    plan = EnginesPlan(
        target,
        draft,
        cache_folder(),
        clients=tuple(dict.fromkeys(clients or (1, 8, 16))),
        turns=turns,
        threads=threads,
        compile=compile,
        adapter=adapter,
        learner=demo_settings(),
    )
    steps = len(plan.clients) * (turns + 1) * len(ARMS)
    with ProgressScreen(errors(), num_steps=steps, num_requests=1000) as screen:
        metrics = measure_engines(plan, screen.on_cycle, screen.report)
    for count, rows in metrics["by_clients"].items():
        for arm, row in rows.items():
            output().print(
                f"{count:>2} at once  {arm:<19} {row['tokens_per_s']:7.0f} tokens/s, "
                f"{row['over_own_off']:.2f} of its engine without a draft, {row['over_vllm_off']:.2f} of "
                f"vLLM's; accepted {row['acceptance_rate']:.2f}"
            )
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "engines", {"threads": threads, **metrics}, {})
    output().print(f"figures: {report}")


def swaps(
    engine: Annotated[
        Literal["everdraft", "vllm"], typer.Option(help="vllm: in the environment of `make setup-vllm`.")
    ] = "everdraft",
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    adapter: AdapterOption = None,
    threads: ThreadsOption = 1,
    compile: CompileOption = "on",
    num_swaps: Annotated[int, typer.Option("--swaps", help="There and back, in turn.", min=2)] = 20,
    pairs: Annotated[int, typer.Option(help="Turns of capture, with and without.", min=2)] = 16,
    report: Annotated[Path | None, typer.Option(help="Where the figures go (JSON).")] = None,
) -> None:
    """What clients of a running engine notice of a swap, and what capture costs them."""
    import torch

    from benchmarks.engines import EnginesPlan, load_one
    from benchmarks.overheads import Work, capture_cost
    from benchmarks.prompts import demo_prompts
    from benchmarks.swaps import NUM_STREAMS, measure_swaps
    from deploy.demo.report import write_report

    torch.set_num_threads(threads)
    pair, learnt = pair_and_adapter(target, draft, adapter)
    if learnt is None:
        raise typer.BadParameter("nothing could be learnt, so there is no version to swap to")
    plan = EnginesPlan(target, draft, cache_folder(), (NUM_STREAMS,), threads=threads, compile=compile)
    prompts = demo_prompts(pair.tokenizer, 64)
    running = load_one(plan, engine, "draft")
    try:
        metrics = {
            "passes": running.passes,
            "swaps": measure_swaps(running, learnt, prompts, num_swaps=num_swaps, num_tokens=160),
            "capture": capture_cost(
                Work(pair, prompts, pairs, compile, errors().print), running, NUM_STREAMS
            ),
        }
    finally:
        running.close()
    output().print_json(data=metrics)
    report = report or RESULTS / f"swaps_{engine}.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "swaps", {"engine": engine, "threads": threads, **metrics}, {})


def revisions(
    base: Annotated[Path, typer.Option(help="Checkout of another revision.", exists=True, file_okay=False)],
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    adapter: AdapterOption = None,
    threads: ThreadsOption = 1,
    compile: CompileOption = "on",
    pairs: Annotated[int, typer.Option(help="Turns of every comparison.", min=2)] = 12,
    arm: Annotated[
        list[str] | None, typer.Option(help="off, fixed, adaptive, ngram; again for more; default: all.")
    ] = None,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "revisions.json",
) -> None:
    """Tokens a second and answers of this checkout over those of another one, in turn."""
    from contextlib import ExitStack
    from tempfile import TemporaryDirectory

    from transformers import AutoTokenizer

    from benchmarks.prompts import demo_prompts
    from benchmarks.revisions import ARMS, compare, started
    from deploy.demo.report import write_report

    arms = tuple(dict.fromkeys(arm or ARMS))
    if unknown := sorted(set(arms) - set(ARMS)):
        raise typer.BadParameter(f"--arm {unknown[0]} is none of {', '.join(ARMS)}")
    pair, learnt = pair_and_adapter(target, draft, adapter)
    with ExitStack() as parts:
        if learnt is not None and pair.draft is not None:
            merged: Any = learnt.merged(pair.draft)
            draft = parts.enter_context(TemporaryDirectory())
            merged.save_pretrained(draft)
            AutoTokenizer.from_pretrained(target).save_pretrained(draft)
        now, other = (
            parts.enter_context(
                started(folder.resolve(), str(Path(target).resolve()), draft, threads, compile)
            )
            for folder in (Path.cwd(), base)
        )
        now.wait()
        other.wait()
        metrics = compare(now, other, demo_prompts(pair.tokenizer, 64), pairs, errors().print, arms)
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "revisions", {"threads": threads, "num_pairs": pairs, **metrics}, {})
    output().print(f"figures: {report}")


def memory(
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    slots: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 2,
    tokens: Annotated[int, typer.Option(help="Of each request, prompt and answer.", min=32)] = 256,
    requests: Annotated[int, typer.Option(min=1)] = 24,
    port: Annotated[int, typer.Option(help="Of the endpoint.")] = 8000,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "memory.json",
) -> None:
    """The memory plan against what replica and learner hold, in a whole service under load."""
    from benchmarks.memory import measure_memory
    from deploy.demo.report import write_report

    say = errors().print
    found = measure_memory(
        target, draft, num_slots=slots, max_seq_len=tokens, num_requests=requests, port=port, report=say
    )
    for name in ("replica", "learner"):
        row = found[name]
        output().print(
            f"{name}: {row['planned_mib']:,.0f} MiB planned, {row['measured_mib']:,.0f} MiB held "
            f"({row['planned_over_measured']:.2f})"
        )
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "memory", {"slots": slots, "tokens": tokens, "requests": requests, **found}, {})


def packed(
    target: TargetOption = DEMO_TARGET,
    threads: ThreadsOption = 1,
    turns: Annotated[int, typer.Option(help="Of plain and packed.", min=1)] = 5,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "packed.json",
) -> None:
    """A target's passes with its large layers as loaded, and packed."""
    import torch

    from benchmarks.packed import measure_packed
    from deploy.demo.report import write_report

    torch.set_num_threads(threads)
    found = measure_packed(target, turns)
    for arm in ("plain", "packed"):
        output().print(arm, *(f"{count}: {ms:.1f} ms" for count, ms in found[arm].items()), sep="  ")
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "packed", found, {})


def lm_eval(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of .jsonl rows with `prompt` and `response`; default: $EVERDRAFT_DATA."),
    ] = None,
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    rows: Annotated[int, typer.Option(help="Of both tasks.", min=1)] = 40,
    program: Annotated[
        str | None, typer.Option(help="lm-eval's; default: `lm_eval` (extra lm-eval of everdraft-bench).")
    ] = None,
    port: Annotated[int, typer.Option(help="Of the endpoint.")] = 8000,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "lm_eval.json",
) -> None:
    """lm-eval's scores on a whole service, with speculation off and on; fails where they differ."""
    from benchmarks.lm_eval import LmEvalPlan, measure_lm_eval
    from deploy.demo.report import write_report

    found = program or shutil.which("lm_eval")
    if found is None:
        raise typer.BadParameter("no lm_eval here: pip install 'everdraft-bench[lm-eval]', or give --program")
    folder = data or Path(os.environ.get("EVERDRAFT_DATA") or "data")
    if not folder.is_dir():
        raise typer.BadParameter(f"--data {folder} is no folder; nothing was measured")
    plan = LmEvalPlan(target, draft, folder, found, num_rows=rows, port=port)
    with plain_faults():
        metrics = measure_lm_eval(plan, errors().print)
    output().print_json(data=metrics)
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "lm_eval", metrics, {})
    if not (metrics["scores_equal"] and metrics["answers_equal"]):
        errors().print("speculation changed what lm-eval found")
        raise typer.Exit(1)
