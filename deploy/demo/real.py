"""`everdraft demo --real`: a pretrained model, drafting for itself, learns from a few requests on two cores.

The same service as any; what is asked, and what came of it. The text is compared with transformers' own.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from buffer.names import DEFAULT_ROUTE
from buffer.store import AdapterFeed
from deploy.demo.corpus import Prompt, prompts
from deploy.demo.question_rows import DataError, check_folder, rows
from deploy.demo.screen import DemoScreen
from deploy.demo.traffic import Ask, Clients, RequestOutcome, acceptance_of, answers
from deploy.wiring import RunningSystem

DOMAINS = ("sql", "code")
NUM_REQUESTS, NUM_HELD_OUT, NUM_COMPARED = 150, 12, 6
NUM_CLIENTS, MAX_TOKENS, PAIRS = 2, 48, 3
STREAM = "requests"

SERVING: dict[str, Any] = {
    "draft": "self:auto",
    "num_slots": 4,
    "max_seq_len": 768,
    "num_threads": 1,
    "compile": "off",
    "max_route_drafts": 0,
}
LEARNER: dict[str, Any] = {"max_routes": 0, "min_records_per_cycle": 12, "gate_min_records": 4}


@dataclass
class RealResult:
    """What came of it."""

    part: str
    passes: str = ""
    outcomes: list[RequestOutcome] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    before: float = 0.0
    """Acceptance on held-out prompts, as served: with what is copied from the prompt, where it pays."""
    after: float = 0.0
    drafted_before: float = 0.0
    """Draft tokens that were judged, by output token."""
    drafted_after: float = 0.0
    speed_ratios: list[float] = field(default_factory=list)
    """Tokens a second of the controller's choice over no speculation, on the held-out prompts, in turn."""
    num_compared: int = 0
    num_identical: int = 0
    """Of the answers compared with transformers' greedy ones."""
    is_unchanged: bool = False
    """Whether held-out answers before, after and without speculation are the same."""


def read_prompts(data: Path | None) -> Iterator[Prompt]:
    """Of the demo's corpus, endless, or of the rows with `prompt` of .jsonl files. Raises DataError."""
    if data is None:
        streams = [prompts(domain, "replay") for domain in DOMAINS]
        while True:
            for stream in streams:
                yield next(stream)
    for file in check_folder(data):
        for number, row in enumerate(rows(file)):
            yield Prompt(file.stem, f"{file.stem}-{number}", ({"role": "user", "content": row.question},), "")


def run_real(
    system: RunningSystem, feed: AdapterFeed, screen: DemoScreen, asked: Sequence[Prompt]
) -> RealResult:
    """Ask held-out prompts, then the stream while a draft learns, then the held-out prompts again."""
    result = RealResult(system.settings.serving.draft or "")
    held, stream = asked[:NUM_HELD_OUT], asked[NUM_HELD_OUT : NUM_HELD_OUT + NUM_REQUESTS]
    clients = Clients(system.url, NUM_CLIENTS)
    screen.narrate("asking held-out prompts, before anything is learnt")
    before = clients.send([Ask(prompt, MAX_TOKENS, store=False) for prompt in held])
    screen.begin(STREAM, len(stream))

    def on_outcome(outcome: RequestOutcome) -> None:
        screen.add(STREAM, outcome)
        result.outcomes.append(outcome)
        screen.show_events(feed.history(DEFAULT_ROUTE))

    clients.send([Ask(prompt, MAX_TOKENS) for prompt in stream], on_outcome)
    result.events = list(feed.history(DEFAULT_ROUTE))
    screen.show_events(result.events)
    if system.learner is not None:
        system.learner.pause()
    screen.narrate("asking the held-out prompts again, with and without speculation, in turn")
    one = Clients(system.url, 1)
    after: list[list[RequestOutcome]] = []
    alone: list[list[RequestOutcome]] = []
    for pair in range(PAIRS):
        asks = {
            "chosen": [Ask(prompt, MAX_TOKENS, store=False) for prompt in held],
            "off": [Ask(prompt, MAX_TOKENS, num_draft_tokens=0, store=False) for prompt in held],
        }
        rates: dict[str, float] = {}
        for name in ("chosen", "off") if pair % 2 == 0 else ("off", "chosen"):
            began_s = time.perf_counter()
            outcomes = one.send(asks[name])
            rates[name] = sum(len(each.token_ids) for each in outcomes) / (time.perf_counter() - began_s)
            (after if name == "chosen" else alone).append(outcomes)
        result.speed_ratios.append(rates["chosen"] / rates["off"])
    texts = [answers(outcomes) for outcomes in (before, *after, *alone)]
    result.is_unchanged = all(text == texts[0] for text in texts)
    result.before, result.after = acceptance_of(before), acceptance_of(after[-1])
    result.drafted_before, result.drafted_after = _drafted(before), _drafted(after[-1])
    screen.narrate("comparing answers with transformers' own")
    _compare(result, system.settings.serving.target, before[:NUM_COMPARED])
    statuses = feed.statuses()
    result.passes = statuses[0].passes if statuses else ""
    return result


@torch.inference_mode()
def _compare(result: RealResult, target: str, outcomes: Sequence[RequestOutcome]) -> None:
    """transformers' greedy answers to the same prompts."""
    from serving.models.loading import load_pair

    pair = load_pair(target)
    model: Any = pair.target
    assert pair.tokenizer is not None
    for outcome in outcomes:
        given = pair.tokenizer.apply_chat_template(
            list(outcome.ask.prompt.messages),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        said = model.generate(**given, max_new_tokens=MAX_TOKENS, do_sample=False)
        own = [int(token) for token in said[0, given["input_ids"].shape[1] :]]
        result.num_compared += 1
        served = list(outcome.token_ids)
        result.num_identical += own[: len(served)] == served and bool(served)


def metrics_of(result: RealResult, wall_s: float) -> dict[str, Any]:
    judged = [event.evidence for event in result.events if event.kind == "promoted"]
    return {
        "part": result.part,
        "passes": result.passes,
        "wall_s": wall_s,
        "num_requests": len(result.outcomes),
        "num_failed": sum(bool(outcome.error) for outcome in result.outcomes),
        "num_promotions": sum(event.kind == "promoted" for event in result.events),
        "draft_acceptance_before": judged[0]["acceptance_incumbent"] if judged else None,
        "draft_acceptance_after": judged[-1]["acceptance_candidate"] if judged else None,
        "acceptance_before": result.before,
        "acceptance_after": result.after,
        "drafted_per_token_before": result.drafted_before,
        "drafted_per_token_after": result.drafted_after,
        "speed_over_no_speculation": statistics.median(result.speed_ratios),
        "num_compared": result.num_compared,
        "num_identical": result.num_identical,
        "held_out_answers_unchanged": result.is_unchanged,
    }


def summary_lines(metrics: dict[str, Any]) -> list[str]:
    return [
        f"{metrics['num_requests']} requests, {metrics['num_failed']} failed, "
        f"{metrics['num_promotions']} drafts promoted, {metrics['wall_s'] / 60:.1f} minutes in all",
        f"text: {metrics['num_identical']} of {metrics['num_compared']} answers are transformers' own, token "
        "for token; held-out answers before, after and without speculation "
        + ("are the same" if metrics["held_out_answers_unchanged"] else "DIFFER"),
        _learnt(metrics),
        f"the controller has {metrics['drafted_per_token_after']:.2f} draft tokens judged by output token "
        f"({metrics['drafted_per_token_before']:.2f} before) and serves at "
        f"{metrics['speed_over_no_speculation']:.2f} of the speed without speculation",
    ]


def _learnt(metrics: dict[str, Any]) -> str:
    before, after = metrics["draft_acceptance_before"], metrics["draft_acceptance_after"]
    if after is None:
        return f"the gate let no draft in: {metrics['part']} drafts as it was fitted"
    part = metrics["part"]
    return f"acceptance of the draft, as the gate judged: {before:.2f} fitted, {after:.2f} learnt ({part})"


def _drafted(outcomes: Sequence[RequestOutcome]) -> float:
    num_tokens = sum(len(outcome.token_ids) for outcome in outcomes)
    return sum(outcome.num_attempted for outcome in outcomes) / max(1, num_tokens)


def asked_for(data: Path | None) -> list[Prompt]:
    """Distinct prompts, held out and streamed. Raises DataError for too few."""
    found: dict[str, Prompt] = {}
    for prompt in islice(read_prompts(data), 20 * (NUM_HELD_OUT + NUM_REQUESTS)):
        found.setdefault(prompt.messages[-1]["content"], prompt)
        if len(found) == NUM_HELD_OUT + NUM_REQUESTS:
            return list(found.values())
    if len(found) < 2 * NUM_HELD_OUT:
        raise DataError(
            f"--data {data} has {len(found)} different prompts, at least {2 * NUM_HELD_OUT} are needed"
        )
    return list(found.values())
