"""The demo keeps to its time and says what it could not do: a real server, a real pair, a clock made of work.

The clock does not look at the time: an answer takes one second of it, however long it took.
"""

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from buffer.memory_store import MemoryAdapterFeed
from buffer.names import DEFAULT_ROUTE
from buffer.records import ServingStatus
from deploy.commands.demo import PAIR, SERVING
from deploy.demo.comparison import ARMS, compare
from deploy.demo.corpus import DOMAINS, prompts
from deploy.demo.figures import metrics_of
from deploy.demo.plan import DemoPlan, MeasuringPlan, Timekeeper, TrafficPlan
from deploy.demo.screen import DemoScreen
from deploy.demo.session import DemoResult, DemoSession, await_compiled_passes
from deploy.demo.summary import summarise
from deploy.demo.traffic import Clients
from deploy.settings import Settings
from deploy.wiring import RunningSystem
from serving.compiling import COMPILING
from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server
from tests.support.tiny_adapters import tiny_adapter

MAX_TOKENS = 2
_SETTINGS = Settings.model_validate({"serving": {"target": str(PAIR / "target")}})
PLAN = DemoPlan(
    max_tokens=MAX_TOKENS,
    domain=TrafficPlan(num_requests=3, budget_s=100.0),
    mixed=TrafficPlan(num_requests=3, budget_s=100.0),
    measuring=(MeasuringPlan(num_clients=1, max_turns=2, prompts_per_turn=1, budget_s=100.0),),
)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    settings = ServingSettings.model_validate(
        {
            **SERVING,
            "target": str(PAIR / "target"),
            "draft": str(PAIR / "draft"),
            "compile": "off",
            "num_draft_tokens": 2,  # the controller may find that drafting does not pay on this machine
            "watch_interval_s": 0.01,
            "status_interval_s": 0.02,
        }
    )
    with live_server(settings) as live:
        yield live


class WorkClock:
    """A second for every answer that the engine has given."""

    def __init__(self, live: LiveServer) -> None:
        self._engine = live.parts.engine

    def __call__(self) -> float:
        return self._engine.stats().num_output_tokens / MAX_TOKENS


def _tell(live: LiveServer, plan: DemoPlan) -> tuple[DemoResult, str]:
    """The result, and what a person without a terminal reads."""
    written = io.StringIO()
    console = Console(file=written, soft_wrap=True, width=80)
    screen = DemoScreen(console)
    system = RunningSystem(_SETTINGS, live.url, "redis://unused", None, "target")
    result = DemoSession(system, live.feed, screen, plan, Timekeeper(WorkClock(live))).run()
    summarise(console, screen, result, metrics_of(result, live.feed, wall_s=1.0))
    return result, written.getvalue()


def test_without_a_promoted_draft_only_what_there_is_is_measured(server: LiveServer) -> None:
    result, told = _tell(server, PLAN)
    assert [(phase.name, phase.num_requests) for phase in result.phases] == [
        (name, 3) for name in (*DOMAINS, "mixed")
    ]
    comparison = result.comparisons[1]
    assert comparison.arms == ("no_speculation", "floor") and not comparison.shortage
    assert {comparison.num_pairs(domain) for domain in DOMAINS} == {2}
    assert comparison.ratios(*DOMAINS) == [] and comparison.tokens_per_s("sql", "floor")
    assert "adapted against no speculation was not measured: no draft was promoted\n" in told
    assert result.identity.num_compared == 2 * len(DOMAINS) and result.identity.fraction == 1.0
    assert not any(outcome.error for outcome in result.outcomes)
    assert result.passes == ["eager (compile: off)"] * 2


def test_a_phase_ends_with_its_budget_and_measuring_shrinks_to_what_fits(server: LiveServer) -> None:
    _publish(server)
    plan = replace(
        PLAN,
        domain=TrafficPlan(num_requests=100, budget_s=4.0),
        # A turn of one prompt takes 15 answers, one of two, which fits twice, 30; no third one fits.
        measuring=(MeasuringPlan(num_clients=1, max_turns=9, prompts_per_turn=2, budget_s=80.0),),
    )
    result, told = _tell(server, plan)
    for phase in result.phases[: len(DOMAINS)]:
        # Up to eight requests are under way when the time is used; the next phase has so much less.
        assert phase.num_requests <= 4 + 8
        assert phase.num_requests < phase.num_planned == 100
    assert sum(phase.num_requests for phase in result.phases[: len(DOMAINS)]) <= len(DOMAINS) * 4 + 8
    comparison = result.comparisons[1]
    assert comparison.arms == ARMS and comparison.num_turns == 3
    assert {len(comparison.ratios(domain)) for domain in DOMAINS} == {3}
    sizes = {(turn.number, len(turn.outcomes)) for turn in comparison.turns}
    assert sizes == {(0, 1), (1, 2), (2, 2)}
    assert comparison.shortage == "its 80 s were used" and "3 turns of 3 arms (its 80 s were used)" in told
    assert {outcome.draft_version for outcome in comparison.outcomes if outcome.num_attempted} == {0, 1}
    assert server.feed.pinned(DEFAULT_ROUTE) is None


def test_a_first_turn_that_does_not_fit_leaves_what_every_arm_answered(
    server: LiveServer,
) -> None:
    _publish(server)
    budgets = MeasuringPlan(num_clients=1, max_turns=9, prompts_per_turn=1, budget_s=12.0)
    result, told = _tell(server, replace(PLAN, measuring=(budgets,)))
    comparison = result.comparisons[1]
    assert [comparison.num_pairs(domain) for domain in DOMAINS] == [1, 1, 0, 0, 0]
    assert "not measured: maths, sql, chat (its 12 s were used)" in told
    assert len(comparison.outcomes) == 12


def test_a_pin_that_no_replica_follows_ends_the_measurement_with_its_reason() -> None:
    feed, now_s = MemoryAdapterFeed(), [0.0]

    def sleep(duration_s: float) -> None:
        now_s[0] += duration_s

    limit = Timekeeper(lambda: now_s[0], sleep).begin(5.0)
    clients = Clients("http://127.0.0.1:9", 1)
    plan = MeasuringPlan(num_clients=1, max_turns=1, prompts_per_turn=1, budget_s=5.0)
    held_out = {"sql": prompts("sql", "heldout")}
    comparison = compare(clients, feed, held_out, plan, max_tokens=2, limit=limit, narrate=str)
    assert comparison.shortage == "no replica served draft v0 in time"
    assert 5.0 <= now_s[0] < 5.2 and feed.pinned(DEFAULT_ROUTE) is None


@pytest.mark.parametrize(
    ("later", "told", "waited_s"),
    [
        ("compiled", "compiled", 3.0),
        ("eager (compiling failed: no space)", "eager (compiling failed: no space)", 3.0),
        (COMPILING, f"{COMPILING}, not ready after another 40 s", 40.0),
    ],
)
def test_measuring_waits_for_compiled_passes_or_says_why_there_are_none(
    later: str, told: str, waited_s: float
) -> None:
    feed, now_s = MemoryAdapterFeed(), [0.0]

    def report(passes: str) -> None:
        feed.report(ServingStatus("r0", at_s=time.time(), serving_versions={}, counts=(), passes=passes))

    def sleep(duration_s: float) -> None:
        now_s[0] += duration_s
        if now_s[0] >= 3.0:
            report(later)

    report(COMPILING)
    limit = Timekeeper(lambda: now_s[0], sleep).begin(40.0)
    assert await_compiled_passes(feed, limit, lambda words: None) == told
    assert waited_s <= now_s[0] < waited_s + 0.2


def test_nothing_is_waited_for_where_passes_are_settled() -> None:
    feed = MemoryAdapterFeed()
    feed.report(ServingStatus("r0", at_s=time.time(), serving_versions={}, counts=(), passes="compiled"))
    said: list[str] = []
    limit = Timekeeper(lambda: 0.0).begin(40.0)
    assert await_compiled_passes(feed, limit, said.append) == "compiled" and not said


def test_a_part_that_overran_takes_the_time_from_the_next_and_one_that_did_not_gives_none() -> None:
    now_s = [100.0]
    timekeeper = Timekeeper(lambda: now_s[0])
    assert timekeeper.begin(10.0).left_s == 10.0
    now_s[0] = 104.0
    assert timekeeper.begin(10.0).left_s == 10.0
    now_s[0] = 117.0
    assert timekeeper.begin(10.0).left_s == 7.0
    now_s[0] = 150.0
    assert timekeeper.begin(10.0).left_s == 0.0


def test_all_parts_together_take_under_six_minutes() -> None:
    assert 240.0 <= DemoPlan().total_s(len(DOMAINS)) <= 340.0


def test_turns_shrink_to_what_the_first_one_says_fits_but_never_under_a_prompt_a_client() -> None:
    plan = MeasuringPlan(num_clients=1, max_turns=5, prompts_per_turn=3, budget_s=55.0)
    assert plan.prompts_in(50.0, 4.0) == 3
    assert plan.prompts_in(40.0, 9.0) == 2
    assert plan.prompts_in(40.0, 30.0) == 1
    crowd = MeasuringPlan(num_clients=8, max_turns=2, prompts_per_turn=8, budget_s=35.0)
    assert crowd.prompts_in(10.0, 30.0) == 8


def _publish(live: LiveServer) -> None:
    """A draft to measure, once."""
    if live.feed.latest(DEFAULT_ROUTE) is None:
        revision = live.parts.engine.pair.target_revision
        draft = str(PAIR / "draft")
        live.feed.publish(*tiny_adapter(draft, draft_version=1, target_revision=revision, size=0.01))


class _LateLearner:
    """A learner that answers its second question only after clients have had a number of answers."""

    def __init__(self, live: LiveServer) -> None:
        self._clock, self._num_asked = WorkClock(live), 0
        self.num_answers_meanwhile = 0.0

    def snapshot(self) -> dict[str, Any]:
        self._num_asked += 1
        began, deadline_s = self._clock(), time.monotonic() + 30.0
        while self._num_asked == 2 and self.num_answers_meanwhile < 12 and time.monotonic() < deadline_s:
            time.sleep(0.01)
            self.num_answers_meanwhile = self._clock() - began
        return {"state": "paused"}

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass


def test_a_learner_that_answers_late_keeps_no_client_waiting(server: LiveServer, tmp_path: Path) -> None:
    learner: Any = _LateLearner(server)
    settings = _SETTINGS.model_copy(
        update={"cluster": _SETTINGS.cluster.model_copy(update={"state_dir": tmp_path})}
    )
    # Eight requests are under way when the learner is asked: more than that are sent meanwhile.
    plan = replace(PLAN, domain=TrafficPlan(num_requests=30, budget_s=30.0), measuring=())
    system = RunningSystem(settings, server.url, "redis://unused", learner, "target")
    DemoSession(
        system, server.feed, DemoScreen(Console(file=io.StringIO())), plan, Timekeeper(WorkClock(server))
    ).run()
    assert learner.num_answers_meanwhile >= 12
