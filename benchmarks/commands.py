"""`everdraft bench`: what this machine makes of it; ratios from one run, modes in turn, medians.

The command line finds `app` by an entry point. A command imports what it measures when it runs, so that
`--help` is quick.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import api_commands, engine_commands, load_commands
from benchmarks.chaos import commands as chaos_commands
from benchmarks.options import (
    DEMO_DRAFT,
    DEMO_TARGET,
    RESULTS,
    AdapterOption,
    CompileOption,
    DraftOption,
    ModesOption,
    PromptsOption,
    TargetOption,
    ThreadsOption,
    cache_folder,
    demo_settings,
    pair_and_adapter,
)
from benchmarks.osd import commands as osd_commands
from deploy.commands.console import errors, output, plain_faults

app = typer.Typer(help="Measure everdraft on this machine.", no_args_is_help=True)


def engine(
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option()] = "float32",
    threads: ThreadsOption = 1,
    repeats: Annotated[int, typer.Option(help="Turns of every arm.", min=1)] = 7,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "engine.json",
) -> None:
    """Passes and rounds of the engine, in this process: no Ray, Redis or HTTP."""
    import torch

    from benchmarks.engine import measure, table
    from deploy.demo.report import write_report

    torch.set_num_threads(threads)
    metrics = measure(target, draft, device=device, dtype=dtype, repeats=repeats)
    output().print(table(metrics))
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "engine", {"threads": threads, **metrics}, {})


def throughput(
    quick: Annotated[
        bool, typer.Option("--quick", help="Greedy, float32, 1 and 8 requests, short prompts.")
    ] = False,
    data: PromptsOption = None,
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    adapter: AdapterOption = None,
    threads: ThreadsOption = 1,
    compile: CompileOption = "auto",
    turns: Annotated[int, typer.Option(help="Of every mode, warm-up aside.", min=1)] = 3,
    tokens: Annotated[int, typer.Option(help="Output tokens of every prompt.", min=1)] = 48,
    mode: ModesOption = None,
    prompts: Annotated[int, typer.Option(help="Of every turn.", min=1)] = 20,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "throughput.json",
    plot: Annotated[Path | None, typer.Option(help="The picture; default: beside the report.")] = None,
) -> None:
    """Tokens a second of our engine and of transformers, on the same work."""
    import torch
    from transformers.utils import logging

    from benchmarks.adapted import check_adapter
    from benchmarks.screen import ProgressScreen
    from benchmarks.throughput import ThroughputPlan, figures, full_settings, measure, quick_settings
    from benchmarks.throughput_views import plot_throughput, table
    from deploy.demo.question_rows import check_folder
    from deploy.demo.report import write_report

    modes = _modes(mode)
    with plain_faults():
        check_folder(data)
        check_adapter(adapter)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    plan = ThroughputPlan(
        target=target,
        draft=draft,
        settings=quick_settings() if quick else full_settings(),
        turns=turns,
        num_output_tokens=tokens,
        data=data,
        adapter=adapter,
        cache=cache_folder(),
        learner=demo_settings(),
        compile=compile,
        prompts_per_turn=prompts,
        modes=modes,
    )
    report.parent.mkdir(parents=True, exist_ok=True)
    plot = plot or report.with_suffix(".png")
    measured = []
    with ProgressScreen(errors(), num_steps=plan.num_steps, num_requests=plan.recipe.num_requests) as screen:
        for one in measure(plan, on_cycle=screen.on_cycle, report=screen.report):
            measured.append(one)
            output().print(table(one.rows()), "", sep="\n")
            metrics, series = figures(plan, measured)
            write_report(report, "throughput", metrics, series)  # what is known so far
            plot_throughput(metrics["rows"], plot)
    output().print(f"figures: {report}", f"picture: {plot}", sep="\n")


def _modes(asked: list[str] | None) -> tuple[str, ...]:
    """In their order, with the one that the others are compared with."""
    from benchmarks.modes import MODES, REFERENCE

    if unknown := sorted(set(asked or ()) - set(MODES)):
        raise typer.BadParameter(f"--mode {unknown[0]} is none of {', '.join(MODES)}")
    return tuple(mode for mode in MODES if not asked or mode in (*asked, REFERENCE))


def overheads(
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    adapter: AdapterOption = None,
    threads: ThreadsOption = 1,
    pairs: Annotated[int, typer.Option(help="Turns of every comparison.", min=2)] = 16,
    compile: CompileOption = "auto",
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "overheads.json",
) -> None:
    """A round's own time, what capture costs, and a draft that never pays."""
    import torch

    from benchmarks.overheads import Work, measure
    from benchmarks.prompts import demo_prompts
    from deploy.demo.report import write_report

    torch.set_num_threads(threads)
    pair, learnt = pair_and_adapter(target, draft, adapter)
    if learnt is not None and pair.draft is not None:
        pair = replace(pair, draft=learnt.merged(pair.draft))
    work = Work(pair, demo_prompts(pair.tokenizer, 64), pairs, compile, errors().print)
    metrics = measure(work)
    output().print_json(data=metrics)
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "overheads", {"threads": threads, **metrics}, {})


def prefix(
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
    threads: ThreadsOption = 1,
    system_tokens: Annotated[int, typer.Option(help="What the prompts share.", min=1)] = 800,
    turns: Annotated[int, typer.Option(help="Of both arms, warm-up aside.", min=1)] = 15,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "prefix.json",
) -> None:
    """Time to the first token after a shared system prompt, with and without prefix reuse."""
    import torch

    from benchmarks.prefix import measure_modes, table
    from deploy.demo.report import write_report
    from serving.models.loading import load_pair

    torch.set_num_threads(threads)
    metrics = measure_modes(load_pair(target, draft), system_tokens=system_tokens, repeats=turns)
    output().print(table(metrics))
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "prefix", {"threads": threads, "turns": turns, **metrics}, {})


def fit(
    target: TargetOption = DEMO_TARGET,
    data: Annotated[
        Path | None, typer.Option(help="Folder of .jsonl rows with `prompt`; default: the demo's prompts.")
    ] = None,
    threads: ThreadsOption = 1,
    exit_layer: Annotated[
        list[int] | None, typer.Option(help="May be given again; default: 1.", min=0)
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many the target answers.", min=1)] = 48,
    tokens: Annotated[int, typer.Option(help="Of an answer at most.", min=1)] = 48,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "fit.json",
) -> None:
    """What a part of the target guesses before any learning: as its layers are, and fitted."""
    import torch

    from benchmarks.fit import measure, prompts_for
    from deploy.demo.report import write_report
    from serving.models.loading import load_pair

    torch.set_num_threads(threads)
    with plain_faults():
        pair = load_pair(target)
        if pair.tokenizer is None:
            raise typer.BadParameter(f"--target {target} has no tokenizer, so there is nothing to ask it")
        asked = prompts_for(pair, data)
    metrics = measure(pair, asked, exit_layers=exit_layer or [1], num_prompts=prompts, max_tokens=tokens)
    output().print_json(data=metrics)
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "fit", metrics, {})


app.command()(engine)
app.command()(throughput)
app.command()(overheads)
app.command()(engine_commands.revisions)
app.command()(engine_commands.swaps)
app.command()(engine_commands.engines)
app.command()(engine_commands.memory)
app.command()(engine_commands.packed)
app.command()(api_commands.structured)
app.command()(chaos_commands.chaos)
app.command()(load_commands.load)
app.command("lm-eval")(engine_commands.lm_eval)
app.command()(prefix)
app.command()(fit)
app.command()(osd_commands.pair)
app.command()(osd_commands.osd)
app.command()(osd_commands.attacks)
