"""What `everdraft demo` shows, in order: traffic domain after domain, mixed traffic, then the measurement.

Everything runs for real: requests go through the REST endpoint while the learner learns and drafts are
swapped in. The measurement comes last, with the learner paused, on prompts that nothing was trained on. Every
part ends when its time is used (`plan.DemoPlan`), and what was not done is said.
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from buffer.errors import StoreUnavailableError
from buffer.names import DEFAULT_ROUTE
from buffer.records import ServingStatus
from buffer.store import AdapterFeed, RecordStore
from deploy.demo.comparison import Comparison, Identity, compare, identity
from deploy.demo.corpus import DOMAINS, Prompt, prompts
from deploy.demo.load import Load, load_between, processor_times
from deploy.demo.plan import DemoPlan, MeasuringPlan, Timekeeper, TimeLimit, TrafficPlan
from deploy.demo.screen import DemoScreen
from deploy.demo.self_draft import DraftCosts, SelfDraft, SelfDraftArm, records_in
from deploy.demo.traffic import Ask, Clients, RequestOutcome, top_two_gap
from deploy.wiring import RunningSystem
from learner.trainer import limit_threads
from serving.compiling import COMPILING
from serving.models.loading import load_outline
from serving.options import EngineOptions

SEED = 0
NUM_CLIENTS = 8
SAMPLED_SHARE, SAMPLED_TEMPERATURE = 0.25, 0.7
"""A quarter of the traffic is sampled, the rest greedy."""
LOOK_S = 1.0
"""Between two looks at the drafts' history."""


@dataclass(frozen=True)
class Phase:
    """What came of one phase of traffic."""

    name: str
    num_requests: int
    num_planned: int
    num_promotions: int
    """Drafts promoted meanwhile."""


@dataclass
class DemoResult:
    """What happened, as it happens."""

    phases: list[Phase] = field(default_factory=list)
    traffic: list[RequestOutcome] = field(default_factory=list)
    comparisons: dict[int, Comparison] = field(default_factory=dict)
    """By number of clients."""
    identity: Identity = field(default_factory=lambda: Identity(0, 0, 0))
    passes: list[str] = field(default_factory=list)
    """What ran the models' passes when measuring began, and when it ended."""
    loads: dict[str, Load] = field(default_factory=dict)
    """What the processor did while `learning` and while `measuring`."""
    self_draft: SelfDraft | None = None
    draft_costs: DraftCosts | None = None
    """Of the draft model."""
    caveats: list[str] = field(default_factory=list)
    """What did not go as planned, in sentences."""

    @property
    def outcomes(self) -> list[RequestOutcome]:
        """Of all requests there were."""
        measured = [outcome for comparison in self.comparisons.values() for outcome in comparison.outcomes]
        return [*self.traffic, *measured]


class DemoSession:
    """One demo on a running system."""

    def __init__(
        self,
        system: RunningSystem,
        feed: AdapterFeed,
        screen: DemoScreen,
        plan: DemoPlan,
        timekeeper: Timekeeper,
        store: RecordStore | None = None,
    ) -> None:
        """`store`: the records that the traffic leaves; None: the arm `self` is left out."""
        self._system, self._feed, self._screen, self._store = system, feed, screen, store
        self._plan, self._timekeeper = plan, timekeeper
        self.result = DemoResult()
        if joined := system.settings.cluster.ray_address:
            self.result.caveats.append(f"the replicas, under Ray at {joined}, count as other processes here")

    def run(self) -> DemoResult:
        """Replay, learn, measure; the learner goes on afterwards."""
        self._await_learner()
        before = processor_times()
        for domain in DOMAINS:
            self._replay(domain, (domain,), self._plan.domain)
        self._replay("mixed", DOMAINS, self._plan.mixed)
        self.result.loads["learning"] = load_between(before, processor_times())
        try:
            self._pause_learner()
            with self._self_draft() as arm:
                limit = self._timekeeper.begin(self._plan.compiled_passes_s)
                self.result.passes.append(await_compiled_passes(self._feed, limit, self._screen.narrate))
                if arm is not None:
                    limit.wait_until(lambda: not arm.is_compiling)
                self._measure()
                self.result.passes.append(passes_of(self._feed.statuses()))
        finally:
            if self._system.learner is not None:
                self._system.learner.resume()
        return self.result

    def _await_learner(self) -> None:
        learner = self._system.learner
        if learner is None:
            return
        limit = self._timekeeper.begin(self._plan.learner_start_s)
        if not limit.wait_until(lambda: learner.snapshot()["state"] != "away"):
            self.result.caveats.append(f"the learner was not ready {limit.budget_s:.0f} s after the replica")

    def _replay(self, name: str, domains: tuple[str, ...], plan: TrafficPlan) -> None:
        """One phase of traffic; the screen hears of every answer, and of every draft about once a second."""
        self._screen.begin(name, plan.num_requests)
        # Drawn as they are sent: reading the library for all of them takes seconds, and few may fit.
        asks = islice(traffic(domains, self._plan.max_tokens), plan.num_requests)
        num_promoted_before = self._num_promoted()
        limit = self._timekeeper.begin(plan.budget_s)
        with self._looking():
            outcomes = self._clients(NUM_CLIENTS).send(asks, partial(self._screen.add, name), limit.left_s)
        self.result.traffic += outcomes
        promoted = self._num_promoted() - num_promoted_before
        self.result.phases.append(Phase(name, len(outcomes), plan.num_requests, promoted))

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Look at drafts and learner beside the block: a learner short of time answers late, and clients that
        waited for it would send nothing meanwhile."""
        done = threading.Event()

        def look() -> None:
            while True:
                with suppress(StoreUnavailableError):
                    self._screen.show_events(self._feed.history(DEFAULT_ROUTE, max_events=1000))
                self._system.note_learner()
                if done.wait(LOOK_S):
                    return

        thread = threading.Thread(target=look, name="everdraft-demo-look", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _num_promoted(self) -> int:
        events = self._feed.history(DEFAULT_ROUTE, max_events=10_000)
        return sum(event.kind == "promoted" for event in events)

    def _pause_learner(self) -> None:
        learner = self._system.learner
        if learner is None:
            return
        self._screen.narrate("pausing the learner, to measure without it")
        limit = self._timekeeper.begin(self._plan.learner_pause_s)
        learner.pause()
        if not limit.wait_until(lambda: learner.snapshot()["state"] == "paused"):
            self.result.caveats.append(
                f"the learner did not pause within {limit.budget_s:.0f} s: it may have worked while measuring"
            )

    def _measure(self) -> None:
        before = processor_times()
        held_out = {domain: prompts(domain, "heldout", seed=SEED) for domain in DOMAINS}
        for plan in self._plan.measuring:
            self.result.comparisons[plan.num_clients] = self._compare(plan, held_out)
        self.result.loads["measuring"] = load_between(before, processor_times())
        self._screen.narrate("comparing every answer with that of the target alone")
        outcomes = [outcome for part in self.result.comparisons.values() for outcome in part.outcomes]
        limit = self._timekeeper.begin(self._plan.near_ties_s)
        self.result.identity = identity(outcomes, partial(top_two_gap, self._system.url), limit)

    @contextmanager
    def _self_draft(self) -> Iterator[SelfDraftArm | None]:
        """The arm `self`, which learns from the records of the traffic, now over, while passes are
        compiled."""
        plan, settings = self._plan.self_draft, self._system.settings
        if plan is None or self._store is None or self._system.learner is None:
            yield None
            return
        self._screen.narrate(f"a part of the target, {plan.part}, learns from records of the same traffic")
        limit_threads(settings.serving.num_threads or 1)
        arm = SelfDraftArm(
            settings.serving.target,
            plan.part,
            records_in(self._store, self._system.target_revision),
            settings.learner,
            EngineOptions.of(settings.serving, export_queue_bytes=0),
        )
        with closing(arm):
            outline = load_outline(str(settings.serving.draft), dtype=settings.serving.dtype)
            learner_s = float(self._system.learner.snapshot().get("learner_s", 0.0))
            self.result.draft_costs = DraftCosts.of(outline, self._feed.latest(DEFAULT_ROUTE), learner_s)
            self.result.self_draft = arm.result
            arm.learn(plan.num_records, self._timekeeper.begin(plan.learning_s))
            yield arm
            held_out = {domain: prompts(domain, "heldout", seed=SEED + 1) for domain in DOMAINS}
            self._screen.narrate(f"measuring {plan.part}, in this process")
            arm.measure(held_out, self._plan.max_tokens, self._timekeeper.begin(plan.measuring_s))

    def _compare(self, plan: MeasuringPlan, held_out: dict[str, Iterator[Prompt]]) -> Comparison:
        clients = "1 client" if plan.num_clients == 1 else f"{plan.num_clients} clients"
        return compare(
            self._clients(plan.num_clients),
            self._feed,
            held_out,
            plan,
            max_tokens=self._plan.max_tokens,
            limit=self._timekeeper.begin(plan.budget_s),
            narrate=lambda words: self._screen.narrate(f"measuring, {clients}, {words}"),
        )

    def _clients(self, num_clients: int) -> Clients:
        return Clients(self._system.url, num_clients, clock=self._timekeeper.clock)


def await_compiled_passes(feed: AdapterFeed, limit: TimeLimit, narrate: Callable[[str], None]) -> str:
    """What runs the passes once no replica compiles any more, or once the time for that is used."""
    if _is_settled(feed):
        return passes_of(feed.statuses())
    narrate(f"waiting for compiled passes, {limit.budget_s:.0f} s at most")
    if limit.wait_until(lambda: _is_settled(feed)):
        return passes_of(feed.statuses())
    return f"{passes_of(feed.statuses())}, not ready after another {limit.budget_s:.0f} s"


def passes_of(statuses: Sequence[ServingStatus]) -> str:
    """What runs the replicas' passes, for people."""
    states = sorted({status.passes or "eager" for status in statuses})
    return ", ".join(states) or "unknown, since no replica reports"


def _is_settled(feed: AdapterFeed) -> bool:
    """Whether every replica has the passes that it will keep."""
    statuses = feed.statuses()
    return bool(statuses) and all(status.passes != COMPILING for status in statuses)


def traffic(domains: tuple[str, ...], max_tokens: int) -> Iterator[Ask]:
    """Endless asks, drawn from the domains alike, from the split that nothing was trained on."""
    chooser = random.Random(f"{SEED}:{','.join(domains)}")
    streams = {domain: prompts(domain, "replay", seed=len(domains)) for domain in domains}
    while True:
        warm = chooser.random() < SAMPLED_SHARE
        prompt = next(streams[chooser.choice(domains)])
        yield Ask(prompt, max_tokens, temperature=SAMPLED_TEMPERATURE if warm else 0.0)
