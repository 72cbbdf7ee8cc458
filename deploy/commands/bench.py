"""`everdraft bench`: what this machine makes of it; ratios from one run, modes in turn, medians."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deploy.commands.console import errors, output, plain_faults
from deploy.commands.demo import PAIR

app = typer.Typer(help="Measure everdraft on this machine.", no_args_is_help=True)
RESULTS = Path("benchmarks") / "results"

TargetOption = Annotated[str, typer.Option(help="Path or hub id.")]
DraftOption = Annotated[str, typer.Option(help="Path or hub id.")]
AdapterOption = Annotated[
    Path | None, typer.Option(help="PEFT adapter of the draft; default: learnt here, once.")
]
DataOption = Annotated[
    Path | None,
    typer.Option(help="Folder of gsm8k, spider, mbpp, gpteacher and tldr rows; default: $EVERDRAFT_DATA."),
]
CompileOption = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(help="auto waits for compiled passes where they can be had; on, off."),
]
ThreadsOption = Annotated[int, typer.Option(help="Of one forward pass, the same for all.", min=1)]


@app.command()
def engine(
    target: TargetOption = str(PAIR / "target"),
    draft: DraftOption = str(PAIR / "draft"),
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


@app.command()
def throughput(
    quick: Annotated[
        bool, typer.Option("--quick", help="Greedy, float32, 1 and 8 requests, short prompts.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of .jsonl rows with `prompt`; default: the demo's prompts.")
    ] = None,
    target: TargetOption = str(PAIR / "target"),
    draft: DraftOption = str(PAIR / "draft"),
    adapter: AdapterOption = None,
    threads: ThreadsOption = 1,
    compile: CompileOption = "auto",
    turns: Annotated[int, typer.Option(help="Of every mode, warm-up aside.", min=1)] = 3,
    tokens: Annotated[int, typer.Option(help="Output tokens of every prompt.", min=1)] = 48,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "throughput.json",
    plot: Annotated[Path | None, typer.Option(help="The picture; default: beside the report.")] = None,
) -> None:
    """Tokens a second of our engine and of transformers, on the same work."""
    import torch
    from transformers.utils import logging

    from benchmarks.adapted import check_adapter
    from benchmarks.prompts import check_folder
    from benchmarks.screen import Screen
    from benchmarks.throughput import Plan, figures, full_settings, measure, quick_settings
    from benchmarks.throughput_views import plot_throughput, table
    from deploy.demo.report import write_report

    with plain_faults():
        check_folder(data)
        check_adapter(adapter)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    plan = Plan(
        target=target,
        draft=draft,
        settings=quick_settings() if quick else full_settings(),
        turns=turns,
        num_output_tokens=tokens,
        data=data,
        adapter=adapter,
        cache=_cache_folder(),
        compile=compile,
    )
    report.parent.mkdir(parents=True, exist_ok=True)
    plot = plot or report.with_suffix(".png")
    measured = []
    with Screen(errors(), num_steps=plan.num_steps, num_requests=plan.recipe.num_requests) as screen:
        for one in measure(plan, on_cycle=screen.on_cycle, tell=screen.tell):
            measured.append(one)
            output().print(table(one.rows()), "", sep="\n")
            metrics, series = figures(plan, measured)
            write_report(report, "throughput", metrics, series)  # what is known so far
            plot_throughput(metrics["rows"], plot)
    output().print(f"figures: {report}", f"picture: {plot}", sep="\n")


@app.command()
def overheads(
    target: TargetOption = str(PAIR / "target"),
    draft: DraftOption = str(PAIR / "draft"),
    adapter: AdapterOption = None,
    threads: ThreadsOption = 1,
    pairs: Annotated[int, typer.Option(help="Turns of every comparison.", min=2)] = 16,
    compile: CompileOption = "auto",
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "overheads.json",
) -> None:
    """A round's own time, what capture costs, and a draft that never pays."""
    import torch

    from benchmarks.adapted import adapter_for, check_adapter
    from benchmarks.overheads import Work, measure
    from benchmarks.prompts import demo_prompts
    from deploy.demo.report import write_report
    from serving.models.loading import load_pair

    with plain_faults():
        check_adapter(adapter)
    torch.set_num_threads(threads)
    pair = load_pair(target, draft)
    learnt = adapter_for(pair, adapter, _cache_folder(), lambda cycle: errors().print(str(cycle)))
    if learnt is not None and pair.draft is not None:
        pair = replace(pair, draft=learnt.merged(pair.draft))
    work = Work(pair, demo_prompts(pair.tokenizer, 64), pairs, compile, errors().print)
    metrics = measure(work)
    output().print_json(data=metrics)
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "overheads", {"threads": threads, **metrics}, {})


@app.command()
def prefix(
    target: TargetOption = str(PAIR / "target"),
    draft: DraftOption = str(PAIR / "draft"),
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


@app.command()
def pair(
    data: DataOption = None,
    minutes: Annotated[float, typer.Option(help="Of training the target.", min=0.1)] = 55.0,
    draft_minutes: Annotated[float, typer.Option(help="Of training the draft.", min=0.1)] = 6.0,
    layers: Annotated[int, typer.Option(help="Of the target.", min=1)] = 22,
    width: Annotated[int, typer.Option(help="Of the target; a multiple of 32.", min=32)] = 192,
    threads: Annotated[int, typer.Option(help="Each with its shard of a batch.", min=1)] = 2,
    device: Annotated[
        str, typer.Option(help="cpu or cuda; on a GPU take more layers and one thread.")
    ] = "cpu",
) -> None:
    """Train the pair of `bench osd`, outside the tree; a run that was killed goes on."""
    _trained_pair(
        data,
        (layers, width),
        target_minutes=minutes,
        draft_minutes=draft_minutes,
        num_threads=threads,
        device=device,
    )


@app.command()
def osd(
    experiment: Annotated[
        Literal["domain", "shift", "mixture", "ablations", "cost", "deployed"],
        typer.Option(help="What is measured; deployed: through REST, Ray and Redis."),
    ] = "domain",
    domain: Annotated[
        list[str] | None, typer.Option(help="gsm8k, spider, python, chat; may be given again; default: all.")
    ] = None,
    records: Annotated[int, typer.Option(help="Requests streamed of each domain.", min=16)] = 2000,
    seeds: Annotated[int, typer.Option(help="Orders of arrival and starts of the draft.", min=1)] = 3,
    temperature: Annotated[
        list[float] | None, typer.Option(help="0 or 1; may be given again; default: both.")
    ] = None,
    data: DataOption = None,
    target: Annotated[str | None, typer.Option(help="Path or hub id; default: trained here, once.")] = None,
    draft: Annotated[str | None, typer.Option(help="Path or hub id; default: trained here, once.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes, each of one thread.", min=1)] = 2,
    turns: Annotated[int, typer.Option(help="Of every arm when speed is measured.", min=1)] = 5,
    report: Annotated[Path | None, typer.Option(help="Where the figures go (JSON).")] = None,
) -> None:
    """Online distillation on real domains: ours, the paper's setting and the offline ceiling."""
    import torch
    from transformers.utils import logging

    from benchmarks.osd.corpus import DOMAINS, check_domains
    from benchmarks.osd.plan import Plan
    from benchmarks.osd.story import tell_experiment
    from benchmarks.osd.workshop import Workshop

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = _data_folder(data)
    with plain_faults():
        check_domains(folder, domain or DOMAINS)
        if set(temperature or ()) - {0.0, 1.0}:
            raise typer.BadParameter(f"--temperature {temperature}: only 0 and 1 are recorded and replayed")
        if (target is None) != (draft is None):
            raise typer.BadParameter("--target and --draft belong together: give both, or neither")
    if target is None or draft is None:
        home = _trained_pair(data)
        target, draft = str(home / "target"), str(home / "draft")
    workshop = Workshop(target, draft, folder, _cache_folder())
    temperatures = tuple(dict.fromkeys(temperature or (0.0, 1.0)))
    plan = Plan(workshop, tuple(domain or DOMAINS), records, seeds, jobs, errors().print, temperatures)
    report = report or RESULTS / f"osd_{experiment}.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    tell_experiment(experiment, plan, report, output(), turns=turns)


@app.command()
def attacks(
    target: TargetOption = str(PAIR / "target"),
    draft: DraftOption = str(PAIR / "draft"),
    adapter: AdapterOption = None,
    threads: ThreadsOption = 1,
    seeds: Annotated[int, typer.Option(help="Of every attack.", min=1)] = 4,
    records: Annotated[int, typer.Option(help="Honest ones of every kind of traffic.", min=16)] = 32,
    family: Annotated[list[str] | None, typer.Option(help="Only these; default: all.")] = None,
    report: Annotated[Path, typer.Option(help="Where the figures go (JSON).")] = RESULTS / "attacks.json",
) -> None:
    """Bad drafts, tried on gate, replica and live watch; and good drafts under traffic that shifts."""
    import logging
    from dataclasses import asdict

    import torch

    from benchmarks.adapted import adapter_for, check_adapter
    from benchmarks.osd.attack_views import check_families, metrics, table
    from benchmarks.osd.attacks import run
    from benchmarks.osd.stand import demo_stand
    from deploy.demo.report import write_report
    from serving.models.loading import load_pair

    with plain_faults():
        check_adapter(adapter)
        check_families(family)
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)  # every refusal is one, and all of them are in the report
    pair = load_pair(target, draft)
    learnt = adapter_for(pair, adapter, _cache_folder(), lambda one: errors().print(str(one)))
    assert learnt is not None, "the demo's traffic always teaches something"
    with demo_stand(pair, learnt) as stand:
        errors().print("honest records are served first")
        stand.fill(records)
        outcomes = run(stand, seeds, family, errors().print)
    figures = metrics(outcomes)
    output().print(table(figures))
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, "attacks", figures, {"outcomes": [asdict(outcome) for outcome in outcomes]})


def _trained_pair(data: Path | None, shape: tuple[int, int] = (22, 192), **others: Any) -> Path:
    """The folder of the benchmark's pair, trained first where it is not there yet; `others` of PairPlan."""
    import torch

    from benchmarks.osd.pair import PairPlan, Shape, train_pair

    torch.set_num_threads(1)
    layers, width = shape
    out = _cache_folder() / f"osd-pair-{layers}x{width}"
    with plain_faults():
        train_pair(PairPlan(_data_folder(data), out, target=Shape(layers, width), **others), errors().print)
    return out


def _data_folder(data: Path | None) -> Path:
    return data or Path(os.environ.get("EVERDRAFT_DATA") or "data")


def _cache_folder() -> Path:
    """Where what takes long to work out is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "everdraft"
