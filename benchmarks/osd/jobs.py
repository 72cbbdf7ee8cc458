"""One learning life as a job: what streams in, who learns how, what came of it; several at a time, kept.

Invariant: a job's result follows from the job and the cache alone, so a run that was killed goes on and an
experiment may take what another worked out.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.adapted import Adapter
from benchmarks.osd import arms
from benchmarks.osd.arms import NUM_DRAFT_TOKENS, ArmOutcome, Material, Routing, settings_of
from benchmarks.osd.experiment_cache import ExperimentCache, Report
from benchmarks.osd.held_out import HeldOut, HeldOutAcceptance
from benchmarks.osd.kept_rows import with_kept
from benchmarks.osd.recorded_answers import RecordedAnswer, interleaved, shuffled
from buffer.names import DEFAULT_ROUTE
from learner.draft import export_weights
from learner.settings import LearnerSettings
from serving.engine.capture import TOP_K

Arm = Literal["floor", "ours", "memory", "paper", "offline", "through_engine"]
Order = Literal["after one another", "in turn"]


@dataclass(frozen=True)
class Job:
    """`num_records` of each domain, in this order of domains, by an arm with these changes of settings."""

    arm: Arm
    domains: tuple[str, ...]
    temperature: float = 0.0
    seed: int = 0
    num_records: int = 2000
    order: Order = "after one another"
    settings: tuple[tuple[str, Any], ...] = ()
    evaluate_every: int = 200
    routing: Routing = "none"
    num_kept: int = TOP_K
    """Entries of the target's rows that records keep."""
    draft: str = ""
    """What drafts in place of the cache's draft, as `self:2`."""

    @property
    def learner(self) -> LearnerSettings:
        """All settings, defaults too."""
        return settings_of(self.arm, {"seed": self.seed, **dict(self.settings)})

    @property
    def key(self) -> str:
        """Of the job and of every setting, changed or not: another default is another life."""
        named = asdict(self) | {"settings": self.learner.model_dump()}
        return sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:20]

    def __str__(self) -> str:
        changes = ", ".join(f"{name}={value}" for name, value in self.settings)
        where = "+".join(self.domains) + (f"@{self.temperature:g}" if self.temperature else "")
        by = f" by {self.draft}" if self.draft else ""
        return f"{self.arm}{by} on {where}, seed {self.seed}" + (f" ({changes})" if changes else "")


@dataclass(frozen=True)
class Result:
    """An outcome as it is kept."""

    accepted: list[int]
    attempted: list[int]
    held_out: dict[str, list[tuple[int, float]]]
    looks_s: list[float]
    """Learner seconds at each look at held-out prompts."""
    swaps: list[int]
    learner_s: float
    num_steps: int
    facts: dict[str, Any]
    final: dict[str, HeldOutAcceptance] = field(default_factory=dict)
    """By domain, on held-out prompts, with the draft of `default`."""
    adapter: str = ""
    """Folder of what serves `default` at the end; empty: the floor."""

    @classmethod
    def read(cls, folder: Path) -> "Result":
        kept = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        kept["final"] = {domain: HeldOutAcceptance(**measured) for domain, measured in kept["final"].items()}
        return cls(**kept)


def run(job: Job, cache: ExperimentCache) -> Result:
    """Do it now, or read what was kept."""
    folder = cache.folder() / "runs" / job.key
    if (folder / "result.json").exists():
        return Result.read(folder)
    pair, settings = replace(cache, draft=job.draft or cache.draft).pair(), job.learner
    replay = cache.replay(NUM_DRAFT_TOKENS)
    held_out = {
        domain: HeldOut(cache.held_out(domain, job.temperature), replay)
        for domain in dict.fromkeys(job.domains)
    }
    stream = _stream(job, cache)
    if job.num_kept != TOP_K:
        stream = [with_kept(pair, one, job.num_kept) for one in stream]
    material = Material(pair, stream, held_out, job.evaluate_every, job.routing)
    outcome: ArmOutcome = getattr(arms, job.arm)(material, settings)
    return _keep(folder, job, outcome, material, settings)


def run_all(
    jobs: Iterable[Job],
    cache: ExperimentCache,
    num_processes: int,
    on_done: Callable[[Job, Result], None] = lambda job, result: None,
) -> dict[Job, Result]:
    """Every job once, several at a time; those that come to the same settings are one."""
    wanted = list(jobs)
    once = {job.key: job for job in wanted}
    with ProcessPoolExecutor(num_processes, get_context("spawn"), initializer=_one_thread) as pool:
        running = {pool.submit(run, job, cache): job for job in once.values()}
        results = {}
        for future in as_completed(running):
            job = running[future]
            results[job.key] = future.result()
            on_done(job, results[job.key])
    return {job: results[job.key] for job in wanted}


def record_all(
    wanted: Sequence[tuple[str, float]], cache: ExperimentCache, num_processes: int, report: Report
) -> None:
    """The recorded requests of these domains and temperatures, several at a time."""
    with ProcessPoolExecutor(num_processes, get_context("spawn"), initializer=_one_thread) as pool:
        running = {pool.submit(_record, cache, *one): one for one in wanted}
        for future in as_completed(running):
            domain, temperature = running[future]
            report(f"{domain} at temperature {temperature:g}: {future.result()} requests recorded")


def _record(cache: ExperimentCache, domain: str, temperature: float) -> int:
    held_out = cache.held_out(domain, temperature)
    return len(held_out) + len(cache.stream(domain, temperature))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _stream(job: Job, cache: ExperimentCache) -> Sequence[RecordedAnswer]:
    streams = [
        shuffled(cache.stream(domain, job.temperature), job.seed, job.num_records) for domain in job.domains
    ]
    if job.order == "in turn":
        return list(interleaved(streams))
    return list(chain(*streams))


def _keep(
    folder: Path, job: Job, outcome: ArmOutcome, material: Material, settings: LearnerSettings
) -> Result:
    folder.mkdir(parents=True, exist_ok=True)
    draft = arms.trainable(material.pair, settings)
    state = outcome.states[DEFAULT_ROUTE]
    draft.load(state)
    if state is not None:
        Adapter(export_weights(state), draft.config_json).save(folder)
    result = Result(
        accepted=outcome.accepted,
        attempted=outcome.attempted,
        held_out=outcome.held_out,
        looks_s=outcome.looks_s,
        swaps=outcome.swaps,
        learner_s=outcome.learner_s,
        num_steps=outcome.num_steps,
        facts=json.loads(json.dumps(outcome.facts, default=str)),
        final={domain: prompts.measure(draft) for domain, prompts in material.held_out.items()},
        adapter=str(folder) if state is not None else "",
    )
    (folder / "job.json").write_text(json.dumps(asdict(job), indent=1), encoding="utf-8")
    aside = folder / "result.part"
    aside.write_text(json.dumps(asdict(result)), encoding="utf-8")
    aside.replace(folder / "result.json")
    return result
