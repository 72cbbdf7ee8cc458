"""`everdraft bench pair, osd, attacks`: online distillation on real domains, and bad drafts against it."""

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

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
from benchmarks.osd.options import (
    AblationsOption,
    ArmsOption,
    BlocksOption,
    DataOption,
    DomainsOption,
    DraftOrPartOption,
    EngineOption,
    ExperimentOption,
    PromptTokensOption,
    TemperaturesOption,
)
from deploy.commands.console import errors, output, plain_faults

T = TypeVar("T")


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


def osd(
    experiment: ExperimentOption = "domain",
    domain: DomainsOption = None,
    records: Annotated[int, typer.Option(help="Requests streamed of each domain.", min=16)] = 2000,
    seeds: Annotated[int, typer.Option(help="Orders of arrival and starts of the draft.", min=1)] = 3,
    temperature: TemperaturesOption = None,
    data: DataOption = None,
    held_out: Annotated[int, typer.Option(help="Requests of each domain to judge by.", min=16)] = 200,
    prompt_tokens: PromptTokensOption = 96,
    answer_tokens: Annotated[int, typer.Option(help="The longest answer.", min=4)] = 40,
    target: Annotated[str | None, typer.Option(help="Path or hub id; default: trained here, once.")] = None,
    draft: DraftOrPartOption = None,
    part: Annotated[str, typer.Option(help="The target's part that the arm `self` drafts with.")] = "self:2",
    arm: ArmsOption = None,
    block: BlocksOption = None,
    ablation: AblationsOption = None,
    engine: EngineOption = "everdraft",
    compile: CompileOption = "auto",
    jobs: Annotated[int, typer.Option(help="Processes, each of one thread.", min=1)] = 2,
    turns: Annotated[int, typer.Option(help="Of every arm when speed is measured; 0: it is not.", min=0)] = 5,
    report: Annotated[Path | None, typer.Option(help="Where the figures go (JSON).")] = None,
) -> None:
    """Online distillation on real domains: ours, the paper's setting and the offline ceiling."""
    from benchmarks.osd.corpus import DOMAINS, check_domains
    from benchmarks.osd.experiment import run_experiment
    from benchmarks.osd.experiment_cache import ExperimentCache
    from benchmarks.osd.plan import ExperimentPlan
    from benchmarks.osd.recorded_answers import Asking
    from serving.models.target_part import TargetPart

    _quietly_on_one_thread()
    folder = _data_folder(data)
    with plain_faults():
        check_domains(folder, domain or DOMAINS)
        if (target is None) != (draft is None):
            raise typer.BadParameter("--target and --draft belong together: give both, or neither")
        _check_arms(experiment, arm, part, temperature)
        _check_ablations(ablation)
    asking, num_stream = Asking(prompt_tokens, answer_tokens), records
    if target is None or draft is None:
        home = _trained_pair(data)
        target, draft, num_stream = str(home / "target"), str(home / "draft"), max(records, 2000)
    elif TargetPart.named(draft) is not None:
        part, draft = draft, str(_two_layers_of(target))
    cache = ExperimentCache(target, draft, folder, cache_folder(), asking, num_stream, held_out)
    temperatures, blocks = _each(temperature, (0.0, 1.0)), _each(block, ("whole", "attention"))
    wanted, arms, changed, say = _each(domain, DOMAINS), _each(arm, ()), _each(ablation, ()), errors().print
    plan = ExperimentPlan(
        cache, wanted, records, seeds, jobs, say, temperatures, part, arms, blocks, engine, changed
    )
    file = report or RESULTS / f"osd_{experiment}.json"
    run_experiment(experiment, plan, file, output(), turns=turns, compile=compile)


def _quietly_on_one_thread() -> None:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


def _each(asked: list[T] | None, default: tuple[T, ...]) -> tuple[T, ...]:
    """What was asked for, once each."""
    return tuple(dict.fromkeys(asked or default))


def _check_arms(experiment: str, arms: list[str] | None, part: str, temperatures: list[float] | None) -> None:
    from benchmarks.osd.plan import ARMS
    from serving.models.target_part import TargetPart

    if set(temperatures or ()) - {0.0, 1.0}:
        raise typer.BadParameter(f"--temperature {temperatures}: only 0 and 1 are recorded and replayed")
    known = ARMS.get(experiment, ())
    if unknown := sorted(set(arms or ()) - set(known)):
        raise typer.BadParameter(
            f"--arm {unknown[0]} is no arm of {experiment}, which has {', '.join(known) or 'none'}"
        )
    if TargetPart.named(part) is None:
        raise typer.BadParameter(f"--part {part} names no part of the target, as self:2 does")


def _check_ablations(names: list[str] | None) -> None:
    from benchmarks.osd.ablations import ablation_names

    known = ablation_names()
    if unknown := sorted(set(names or ()) - set(known)):
        raise typer.BadParameter(f"--ablation {unknown[0]} is none of {', '.join(known)}")


def attacks(
    target: TargetOption = DEMO_TARGET,
    draft: DraftOption = DEMO_DRAFT,
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

    from benchmarks.osd.attack_views import check_families, metrics, table
    from benchmarks.osd.attacks import run
    from benchmarks.osd.testbed import demo_testbed
    from deploy.demo.report import write_report

    with plain_faults():
        check_families(family)
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)  # every refusal is one, and all of them are in the report
    pair, learnt = pair_and_adapter(target, draft, adapter)
    assert learnt is not None, "the demo's traffic always teaches something"
    with demo_testbed(pair, learnt, demo_settings()) as testbed:
        errors().print("honest records are served first")
        testbed.fill(records)
        outcomes = run(testbed, seeds, family, errors().print)
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
    out = cache_folder() / f"osd-pair-{layers}x{width}"
    with plain_faults():
        train_pair(PairPlan(_data_folder(data), out, target=Shape(layers, width), **others), errors().print)
    return out


def _two_layers_of(target: str) -> Path:
    """A draft model of the target's first two layers, written once."""
    from hashlib import sha256

    from serving.models.loading import load_model, weights_revision
    from serving.models.part_checkpoint import write_draft

    with plain_faults():
        revision = weights_revision(load_model(target))
        folder = cache_folder() / "drafts" / f"two-layers-{sha256(revision.encode()).hexdigest()[:12]}"
        if not folder.exists():
            errors().print(f"writing the first two layers of {target} as a draft model: {folder}")
            write_draft(target, folder, num_layers=2)
    return folder


def _data_folder(data: Path | None) -> Path:
    return data or Path(os.environ.get("EVERDRAFT_DATA") or "data")
