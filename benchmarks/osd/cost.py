"""What learning costs: the learner's seconds for a point of acceptance, what serving loses meanwhile, and the
paper's cost model against measured speed.

Pairs are taken in turn. Knows no HTTP, Ray or Redis: engine and learner are two processes of one machine.
"""

import os
import statistics
import time
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from typing import Any

import torch

from benchmarks.engine_modes import EngineMode
from benchmarks.forwards import ForwardTimes, measure_forwards, pass_runners
from benchmarks.osd.arms import NUM_DRAFT_TOKENS, settings_of, trainable
from benchmarks.osd.experiment_cache import ExperimentCache
from benchmarks.osd.jobs import Job, Result
from benchmarks.osd.plan import Changes, ExperimentPlan
from benchmarks.osd.speed import adapted
from learner.settings import LearnerSettings
from learner.trainer import Trainer
from serving.engine.counters import acceptance_rate, expected_block_efficiency
from serving.local import build_engine
from serving.options import EngineOptions

NUM_TOKENS = 48
NUM_PROMPTS = 16
LENGTHS = (1, 2, 4, 6)
STATIONARY_ROUNDS = 3
"""The stream again and again, each time in another order: long enough to converge."""
NEVER_STOPS: Changes = (("max_rest_records", 0),)


def measure(plan: ExperimentPlan, turns: int = 5) -> dict[str, Any]:
    """The price of learning, and what stopping saves, in every domain; serving beside the learner and the
    cost model in the first."""
    lives = {
        (domain, arm): Job(arm, (domain,), num_records=plan.num_records)
        for domain in plan.domains
        for arm in ("ours", "floor")
    }
    own = {(domain, arm): replace(job, draft=plan.part) for (domain, arm), job in lives.items()}
    long = {
        (domain, arm): Job(
            "ours", (domain,), num_records=STATIONARY_ROUNDS * plan.num_records, settings=settings
        )
        for domain in plan.domains
        for arm, settings in (("stops", ()), ("never_stops", NEVER_STOPS))
    }
    domain = plan.domains[0]
    results = plan.work([*lives.values(), *own.values(), *long.values()])
    folder = results[lives[domain, "ours"]].adapter
    return {
        "learning": {
            name: _price(plan, results[lives[name, "ours"]], results[lives[name, "floor"]], name)
            for name in plan.domains
        },
        "learning_of_the_part": {
            name: _price(plan, results[own[name, "ours"]], results[own[name, "floor"]], name)
            for name in plan.domains
        },
        "stopping": {
            name: _stopped(results[long[name, "stops"]], results[long[name, "never_stops"]], name)
            for name in plan.domains
        },
        "serving_beside_the_learner": _beside(plan, domain, folder, turns),
        "cost_model": _model(plan, domain, folder, turns),
    }


def _price(plan: ExperimentPlan, ours: Result, floor: Result, domain: str) -> dict[str, float]:
    recorded = plan.cache.stream(domain, 0.0)[: plan.num_records]
    points = 100 * (ours.final[domain].acceptance - floor.final[domain].acceptance)
    return {
        "points_of_acceptance": points,
        "learner_s": ours.learner_s,
        "learner_s_per_point": ours.learner_s / points,
        "recorded_tokens_per_point": sum(one.num_tokens for one in recorded) / points,
        "num_steps": ours.num_steps,
        "num_swaps": len(ours.swaps),
    }


def _stopped(stops: Result, never: Result, domain: str) -> dict[str, Any]:
    """What stopping by itself saves on a stream that never changes, and what it costs."""
    return {
        "num_records": len(stops.accepted),
        "learner_s": stops.learner_s,
        "learner_s_never_stopping": never.learner_s,
        "seconds_saved": 1 - stops.learner_s / never.learner_s,
        "acceptance_rate": stops.final[domain].acceptance,
        "acceptance_lost": never.final[domain].acceptance - stops.final[domain].acceptance,
        "curve": stops.held_out[domain],
        "curve_never_stopping": never.held_out[domain],
    }


def _beside(plan: ExperimentPlan, domain: str, folder: str, turns: int) -> dict[str, Any]:
    """Tokens a second with the learner at work beside (its own niceness and busy share), over without."""
    context = get_context("spawn")
    at_work = context.Event()
    process = context.Process(target=_learn_while, args=(plan.cache, domain, at_work), daemon=True)
    process.start()
    pair, found = plan.cache.pair(), {}
    prompts = [one.prompt_token_ids.tolist() for one in plan.cache.held_out(domain, 0.0)[:NUM_PROMPTS]]
    try:
        for clients in (1, 8):
            engine = build_engine(
                replace(pair, draft=adapted(pair, folder)),
                options=EngineOptions(num_slots=8, max_seq_len=192, compile="auto"),
            )
            mode, ratios = EngineMode(engine, cap=None), []
            for turn in range(turns + 1):
                rates = []
                for busy in (False, True):
                    (at_work.set if busy else at_work.clear)()
                    plan.report(f"{clients} clients, learner {'at work' if busy else 'at rest'}, turn {turn}")
                    outcome = mode.generate(
                        prompts, concurrency=clients, num_tokens=NUM_TOKENS, temperature=0.0
                    )
                    rates.append(outcome.tokens_per_s)
                if turn:
                    ratios.append(rates[1] / rates[0])
            mode.close()
            found[f"clients_{clients}"] = {"ratio": statistics.median(ratios), "ratios": ratios}
    finally:
        process.terminate()
        process.join()
    return found


def _learn_while(cache: ExperimentCache, domain: str, at_work: Event) -> None:
    """The learner's process: steps on recorded records while the event is set, resting as the product
    does."""
    settings = LearnerSettings(seed=0)
    os.nice(settings.niceness)
    torch.set_num_threads(settings.num_threads)
    replay = cache.replay(NUM_DRAFT_TOKENS)
    recorded = cache.stream(domain, 0.0)[:256]
    trainer = Trainer(trainable(cache.pair(), settings_of("ours", {})), settings)
    records = [replay.bare_record(one) for one in recorded]

    def rest(step_s: float) -> bool:
        time.sleep(step_s * (1 / settings.max_busy_share - 1))
        return at_work.is_set()

    while True:
        at_work.wait()
        trainer.train(records, [], rest)


def _model(plan: ExperimentPlan, domain: str, folder: str, turns: int) -> dict[str, Any]:
    """Fixed draft lengths: speed-up as measured, by the paper's formula, and by ours."""
    pair = plan.cache.pair()
    room = 192
    runners = pass_runners(pair, num_slots=1, max_seq_len=room, compile="auto")
    forwards = measure_forwards(runners, batch_size=1, context_tokens=room // 2)
    prompts = [one.prompt_token_ids.tolist() for one in plan.cache.held_out(domain, 0.0)[:NUM_PROMPTS]]

    def mode(length: int) -> EngineMode:
        draft = adapted(pair, folder)
        engine = build_engine(
            replace(pair, draft=draft),
            options=EngineOptions(
                num_slots=1,
                max_seq_len=room,
                num_draft_tokens=length or None,
                speculation="model",
                compile="auto",
                prefix_cache_mib=0,
            ),
        )
        return EngineMode(engine, cap=None if length else 0, ignore_eos=False)

    modes = {length: mode(length) for length in (0, *LENGTHS)}
    outcomes: dict[int, list[Any]] = {length: [] for length in modes}
    for turn in range(turns + 1):
        for length, one in modes.items():
            plan.report(f"draft length {length}, turn {turn}")
            outcome = one.generate(prompts, concurrency=1, num_tokens=NUM_TOKENS, temperature=0.0)
            if turn:
                outcomes[length].append(outcome)
    for one in modes.values():
        one.close()
    price = forwards.draft_pass_s[1] / forwards.target_pass_s[0]
    return {"draft_price": price} | {
        str(length): _compared(outcomes[0], outcomes[length], length, price, forwards) for length in LENGTHS
    }


def _compared(
    off: list[Any], own: list[Any], length: int, price: float, forwards: ForwardTimes
) -> dict[str, float]:
    rounds = own[-1].rounds
    rate = acceptance_rate(rounds.num_accepted, rounds.num_attempted)
    per_round = own[-1].num_tokens / rounds.num_rounds
    drafted = rounds.num_drafted / rounds.num_rounds
    return {
        "acceptance_rate": rate,
        "block_efficiency": per_round,
        "measured": statistics.median(a.wall_s / b.wall_s for a, b in zip(off, own, strict=True)),
        "paper_model": paper_speedup(rate, length, price),
        "our_model": forwards.predicted_speedup(per_round, drafted, drafted),
    }


def paper_speedup(acceptance: float, num_draft_tokens: int, price: float) -> float:
    """Leviathan's and the paper's: tokens a round under independent acceptance, over c gamma + 1."""
    per_round = expected_block_efficiency([acceptance] * num_draft_tokens)
    return per_round / (price * num_draft_tokens + 1)
