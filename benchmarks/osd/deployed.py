"""One domain through the whole deployment: REST, Ray, Redis, the learner's actor, swaps between rounds.

The same requests as the replayed streams, sent by clients; acceptance is what answers say of themselves.
Learner and replicas share the machine, so how many records a draft has seen depends on its speed.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.osd.arms import NUM_DRAFT_TOKENS
from benchmarks.osd.corpus import exchanges
from benchmarks.osd.experiment_cache import ExperimentCache, Report
from benchmarks.osd.plan import moving_acceptance
from buffer.names import DEFAULT_ROUTE
from deploy.demo.corpus import Prompt
from deploy.demo.traffic import Ask, Clients, RequestOutcome, acceptance_of, answers
from deploy.settings_source import load_settings
from deploy.wiring import RunningSystem, open_feed, running_system

NUM_CLIENTS = 8
NUM_HELD_OUT = 64
_QUARTERS = 4


def measure_deployed(
    cache: ExperimentCache,
    domain: str,
    num_records: int,
    report: Report,
    port: int = 8000,
    part: str = "",
    engine: str = "everdraft",
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Stream, and ask the held-out prompts of the floor, between the stream's quarters, and of what was
    learnt, learner at rest. `part`: of the target, which drafts in the draft's place; empty: the draft.
    `engine`: who runs the models."""
    rows = exchanges(cache.data, domain, "stream")[:num_records]
    asks = [_ask(domain, row.question, cache.asking.max_tokens) for row in rows]
    held = exchanges(cache.data, domain, "heldout")[: min(cache.num_held_out, NUM_HELD_OUT)]
    judged = [_ask(domain, row.question, cache.asking.max_tokens, store=False) for row in held]
    with TemporaryDirectory() as folder:
        settings = load_settings(None, {}, _overrides(cache, port, Path(folder), part or cache.draft, engine))
        with running_system(settings, report) as system:
            clients = Clients(system.url, NUM_CLIENTS)
            before, before_s = _timed(clients, judged)
            outcomes: list[RequestOutcome] = []

            def on_outcome(outcome: RequestOutcome) -> None:
                outcomes.append(outcome)
                if len(outcomes) % 200 == 0:
                    report(f"{len(outcomes)} of {len(asks)} answered, draft {outcome.draft_version}")

            during: list[RequestOutcome] = []
            for number in range(_QUARTERS):
                clients.send(
                    asks[number * len(asks) // _QUARTERS : (number + 1) * len(asks) // _QUARTERS], on_outcome
                )
                during += clients.send(judged[number::_QUARTERS])
            _rest(system)
            after, after_s = _timed(clients, judged)
            events = _events(system)
    moving = moving_acceptance(
        [outcome.num_accepted for outcome in outcomes], [outcome.num_attempted for outcome in outcomes]
    )
    return {
        "num_requests": len(outcomes),
        "num_failed": sum(bool(outcome.error) for outcome in [*before, *outcomes, *during, *after]),
        "floor": acceptance_of(before),
        "learnt": acceptance_of(after),
        "answers_unchanged": answers(before) == answers(during) == answers(after),
        "versions_during": sorted({outcome.draft_version for outcome in during}),
        "tokens_per_s": {"floor": _num_tokens(before) / before_s, "learnt": _num_tokens(after) / after_s},
        "events": events,
    }, {"acceptance": moving, "draft_version": [outcome.draft_version for outcome in outcomes]}


def _timed(clients: Clients, asks: list[Ask]) -> tuple[list[RequestOutcome], float]:
    began_s = time.monotonic()
    return clients.send(asks), time.monotonic() - began_s


def _num_tokens(outcomes: Sequence[RequestOutcome]) -> int:
    return sum(len(outcome.token_ids) for outcome in outcomes)


def _overrides(
    cache: ExperimentCache, port: int, folder: Path, draft: str, engine: str
) -> Mapping[str, Mapping[str, Any]]:
    asking = cache.asking
    return {
        "serving": {
            "engine": engine,
            "target": cache.target,
            "draft": draft,
            "max_seq_len": asking.prompt_tokens + asking.max_tokens + 256,
            "num_draft_tokens": NUM_DRAFT_TOKENS,
            "speculation": "model",
            "num_threads": 1,
        },
        "cluster": {"port": port, "state_dir": folder},
    }


def _ask(domain: str, question: str, max_tokens: int, *, store: bool = True) -> Ask:
    prompt = Prompt(domain, question, ({"role": "user", "content": question},), "")
    return Ask(prompt, max_tokens, store=store)


def _rest(system: RunningSystem) -> None:
    if system.learner is not None:
        system.learner.pause()


def _events(system: RunningSystem) -> dict[str, int]:
    """The history of every route, counted by kind."""
    feed, counts = open_feed(system.redis_url, system.target_revision), dict[str, int]()
    try:
        for route in dict.fromkeys([DEFAULT_ROUTE, *feed.routes()]):
            for event in feed.history(route, max_events=1000):
                counts[event.kind] = counts.get(event.kind, 0) + 1
    finally:
        feed.close()
    return counts
