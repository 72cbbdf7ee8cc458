"""What `everdraft demo` shows, in order: traffic domain after domain, mixed traffic, then the measurement.

Everything runs for real: requests go through the REST endpoint while the learner learns and drafts are
swapped in. The measurement comes last, with the learner paused, on prompts that nothing was trained on.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from buffer.records import DEFAULT_ROUTE
from buffer.store import AdapterFeed
from deploy.demo.comparison import ARMS, Comparison, Identity, compare, identity
from deploy.demo.corpus import DOMAINS, Prompt, prompts
from deploy.demo.plot import moving_acceptance, plot_acceptance, swaps
from deploy.demo.screen import Screen
from deploy.demo.traffic import Ask, Clients, Outcome
from deploy.wiring import RunningSystem, open_feed

SEED = 0
NUM_CLIENTS = 8
MAX_TOKENS = 96
REQUESTS_PER_DOMAIN, SECONDS_PER_DOMAIN = 320, 25.0
MIXED_REQUESTS, MIXED_SECONDS = 700, 60.0
SAMPLED_SHARE, SAMPLED_TEMPERATURE = 0.25, 0.7
"""A quarter of the traffic is sampled, the rest greedy."""
TURNS, PROMPTS_PER_TURN = 4, 3
TURNS_AT_8, PROMPTS_PER_TURN_AT_8 = 2, 8
PAUSE_TIMEOUT_S = 20.0


@dataclass
class Story:
    """What happened, as it happens."""

    phases: list[tuple[str, int]] = field(default_factory=list)
    traffic: list[Outcome] = field(default_factory=list)
    comparisons: dict[int, Comparison] = field(default_factory=dict)
    """By number of clients."""
    identity: Identity = field(default_factory=lambda: Identity(0, 0, 0))
    metrics: dict[str, Any] = field(default_factory=dict)


def tell(system: RunningSystem, screen: Screen, *, began_s: float) -> Story:
    """Replay, learn, measure. `began_s`: monotonic time at which the demo began."""
    story = Story()
    feed = open_feed(system.redis_url, system.target_revision)
    try:
        for domain in DOMAINS:
            asks = list(islice(_traffic([domain]), REQUESTS_PER_DOMAIN))
            _replay(story, system, feed, screen, domain, asks, SECONDS_PER_DOMAIN)
        asks = list(islice(_traffic(DOMAINS), MIXED_REQUESTS))
        _replay(story, system, feed, screen, "mixed", asks, MIXED_SECONDS)
        _pause_learner(system, screen)
        _measure(story, system, feed, screen.narrate)
        story.metrics = _metrics(story, feed, time.monotonic() - began_s)
    finally:
        if system.learner is not None:
            system.learner.resume()
        feed.close()
    return story


def save_plot(story: Story, file: Path) -> None:
    plot_acceptance(story.traffic, story.phases, file)


def series(story: Story) -> dict[str, list[Any]]:
    """What the plot shows, as numbers."""
    return {
        "acceptance_moving_average": [
            None if rate is None else round(rate, 4) for rate in moving_acceptance(story.traffic)
        ],
        "domain": [outcome.domain for outcome in story.traffic],
        "draft_version": [outcome.draft_version for outcome in story.traffic],
        "swaps": [list(swap) for swap in swaps(story.traffic)],
        "phases": [list(phase) for phase in story.phases],
    }


def _traffic(domains: tuple[str, ...] | list[str]) -> Iterator[Ask]:
    """Endless asks, drawn from the domains alike, from the split that nothing was trained on."""
    chooser = random.Random(f"{SEED}:{','.join(domains)}")
    streams = {domain: prompts(domain, "replay", seed=len(domains)) for domain in domains}
    while True:
        warm = chooser.random() < SAMPLED_SHARE
        prompt = next(streams[chooser.choice(domains)])
        yield Ask(prompt, MAX_TOKENS, temperature=SAMPLED_TEMPERATURE if warm else 0.0)


def _replay(
    story: Story,
    system: RunningSystem,
    feed: AdapterFeed,
    screen: Screen,
    name: str,
    asks: list[Ask],
    time_limit_s: float,
) -> None:
    """One phase of traffic; the screen hears of every answer, and of every draft about once a second."""
    screen.begin(name)
    looked_s = 0.0

    def on_outcome(outcome: Outcome) -> None:
        nonlocal looked_s
        screen.add(name, outcome)
        if time.monotonic() - looked_s > 1.0:
            looked_s = time.monotonic()
            screen.show_events(feed.history(DEFAULT_ROUTE, max_events=1000))
            system.note_learner()

    outcomes = Clients(system.url, NUM_CLIENTS).send(asks, on_outcome, time_limit_s)
    story.traffic += outcomes
    story.phases.append((name, len(outcomes)))


def _pause_learner(system: RunningSystem, screen: Screen) -> None:
    if system.learner is None:
        return
    screen.narrate("pausing the learner, to measure without it")
    system.learner.pause()
    deadline_s = time.monotonic() + PAUSE_TIMEOUT_S
    while system.learner.snapshot()["state"] != "paused" and time.monotonic() < deadline_s:
        time.sleep(0.1)


def _measure(story: Story, system: RunningSystem, feed: AdapterFeed, narrate: Callable[[str], None]) -> None:
    held_out = {domain: prompts(domain, "heldout", seed=SEED) for domain in DOMAINS}
    for num_clients, turns, count in (
        (1, TURNS, PROMPTS_PER_TURN),
        (NUM_CLIENTS, TURNS_AT_8, PROMPTS_PER_TURN_AT_8),
    ):
        shares = [_share(held_out, count) for _ in range(turns)]
        story.comparisons[num_clients] = compare(
            system.url, feed, shares, num_clients=num_clients, max_tokens=MAX_TOKENS, narrate=narrate
        )
    narrate("comparing every answer with that of the target alone")
    outcomes = [outcome for comparison in story.comparisons.values() for outcome in comparison.outcomes]
    story.identity = identity(system.url, outcomes)


def _share(held_out: dict[str, Iterator[Prompt]], count: int) -> dict[str, list[Prompt]]:
    return {domain: list(islice(stream, count)) for domain, stream in held_out.items()}


def _metrics(story: Story, feed: AdapterFeed, wall_s: float) -> dict[str, Any]:
    """The report's figures; those by domain are dictionaries."""
    statuses = feed.statuses()
    events = feed.history(DEFAULT_ROUTE, max_events=10_000)
    alone, crowd = story.comparisons[1], story.comparisons[NUM_CLIENTS]
    outcomes = [*story.traffic, *alone.outcomes, *crowd.outcomes]
    metrics: dict[str, Any] = {
        "num_requests": len(outcomes),
        "num_failed_requests": sum(bool(outcome.error) for outcome in outcomes),
        "num_promotions": sum(event.kind == "promoted" for event in events),
        "num_refusals": sum(event.kind == "refused" for event in events),
        "num_rollbacks": sum(event.kind == "rolled_back" for event in events),
        "num_swaps_under_load": sum(status.num_swaps_under_load for status in statuses),
        "swap_pause_s_max": max((status.swap_pause_s_max for status in statuses), default=0.0),
        "round_s_median": max((status.round_s_median for status in statuses), default=0.0),
        "num_dropped_records": sum(status.num_dropped_records for status in statuses),
        "greedy_identical_fraction": story.identity.fraction,
        "num_greedy_compared": story.identity.num_compared,
        "num_greedy_near_ties": story.identity.num_near_ties,
        "demo_wall_s": wall_s,
    }
    for arm in ("floor", "adapted"):
        metrics[f"acceptance_rate_{arm}"] = {d: alone.acceptance_rate(d, arm) for d in DOMAINS}
    for suffix, comparison in (("", alone), (f"_{NUM_CLIENTS}_clients", crowd)):
        for arm in ARMS:
            metrics[f"tokens_per_s_{arm}{suffix}"] = {d: comparison.tokens_per_s(d, arm) for d in DOMAINS}
    return metrics
