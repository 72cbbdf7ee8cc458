"""How much of an experiment, its jobs worked out, and what every experiment does with their results.

Knows no learner: a job is recorded what to do by names and settings alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.osd.experiment_cache import ExperimentCache, Report
from benchmarks.osd.jobs import Job, Result, record_all, run_all
from serving.engine.counters import acceptance_rate
from serving.models.loading import ModelPair

WINDOW = 50
"""Records of the moving average, as in the paper."""
SELF = "self"
"""The arm of our loop with a part of the target in the draft's place."""
WHOLE_STREAMS = "whole streams"
ARMS = {
    "domain": ("floor", "ours", SELF, "paper", "offline", "offline_full"),
    "deployed": ("ours", SELF),
    "privacy": ("ours", "memory"),
    "shift": ("replay", "no_replay", "routes", SELF),
    "mixture": ("one", "tags", "router", SELF, f"{SELF}, tags", WHOLE_STREAMS),
}
"""Of an experiment that compares them; each can be asked for alone."""
THINNING = 10
"""Every so many records a point of a series."""

Series = dict[str, list[Any]]
Metrics = dict[str, Any]
Changes = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class ExperimentPlan:
    """How much of everything."""

    cache: ExperimentCache
    domains: tuple[str, ...]
    num_records: int
    num_seeds: int
    num_processes: int
    report: Report
    temperatures: tuple[float, ...] = (0.0, 1.0)
    part: str = "self:2"
    """Of the target, which the arm `self` drafts with."""
    arms: tuple[str, ...] = ()
    """Those of the experiment that are run; none named: all."""
    blocks: tuple[str, ...] = ("whole", "attention")
    """Of the experiment on parts."""
    engine: str = "everdraft"
    """Of the whole deployment: who runs the models."""
    ablations: tuple[str, ...] = ()
    """Settings that are changed, one at a time; none named: all."""

    def arms_of(self, experiment: str) -> tuple[str, ...]:
        """In the experiment's own order."""
        return tuple(arm for arm in ARMS[experiment] if not self.arms or arm in self.arms)

    def draft_of(self, arm: str) -> str:
        """What the arm drafts with; empty: the pair's draft."""
        return self.part if arm == SELF else ""

    def pair_of(self, arm: str) -> ModelPair:
        return self.pair_with(self.draft_of(arm))

    def pair_with(self, draft: str) -> ModelPair:
        """The target with another draft; empty: its own."""
        return replace(self.cache, draft=draft or self.cache.draft).pair()

    def record_answers(self) -> None:
        """Ask the target for everything at once, so that every process finds it."""
        wanted = [(domain, temperature) for temperature in self.temperatures for domain in self.domains]
        record_all(wanted, self.cache, self.num_processes, self.report)

    def work(self, jobs: Iterable[Job]) -> dict[Job, Result]:
        wanted = list(jobs)
        num_lives = len({job.key for job in wanted})
        number = 0

        def on_done(job: Job, result: Result) -> None:
            nonlocal number
            number += 1
            final = ", ".join(f"{name} {measured.acceptance:.3f}" for name, measured in result.final.items())
            self.report(f"{number} of {num_lives}: {job}: {final}")

        return run_all(wanted, self.cache, self.num_processes, on_done)


def label(domain: str, temperature: float) -> str:
    return f"{domain}@{temperature:g}" if temperature else domain


def moving_acceptance(accepted: Sequence[int], attempted: Sequence[int]) -> list[list[float]]:
    """[records so far, accepted over attempted of the last WINDOW], thinned."""
    points = []
    for end in range(WINDOW, len(accepted) + 1, THINNING):
        window = slice(end - WINDOW, end)
        points.append([end, round(acceptance_rate(sum(accepted[window]), sum(attempted[window])), 4)])
    return points


def with_seeds(job: Job, count: int) -> list[Job]:
    return [replace(job, seed=seed) for seed in range(count)]
