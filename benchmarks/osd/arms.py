"""The arms: how a draft may learn from a stream of recorded requests, and what each was worth as it went.

`ours` is the product's own learner, gate included, fed through the product's store; `paper` is the setting
of Online Speculative Decoding, ungated; `offline` distils everything that `ours` may learn from until nothing
is gained, with the same trainable parameters, as the ceiling. Knows no engine: rounds are replayed.
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from benchmarks.adapted import Recipe, adapt
from benchmarks.osd.held_out import HeldOut
from benchmarks.osd.recorded_answers import RecordedAnswer
from benchmarks.osd.replay import RECORD_TTL_S, Replay, Replayed, chunks
from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.records import GenerationRecord
from buffer.store import StreamKey
from buffer.two_stores import TwoStores
from learner.distill import build_optimizer, distill_step
from learner.draft import AdapterState, TrainableDraft, build_draft, import_weights
from learner.draw import is_held_out
from learner.loop import Learner
from learner.settings import LearnerSettings, paper_setting
from learner.trainer import Trainer, objective_of
from serving.models.loading import ModelPair

NUM_DRAFT_TOKENS = 5
"""The paper's."""
REQUESTS_PER_TURN = 8
"""Serving and learning take turns; the paper's update interval."""
MAX_EPOCHS = 12
MEMORY_TTL_S = 3600.0
REQUESTS_PER_HOUR = 500
"""Of the arm `memory`: a stream of 2,000 takes four hours, and the learner knows the last one."""
Routing = Literal["none", "tags", "router"]
"""Whether requests carry their domain as a tag, or the router must find out."""
UNHURRIED = {"max_busy_share": 1.0, "quiet_after_publish_s": 0.0, "max_record_age_s": 24 * 3600.0}
"""Nothing else runs here, so the learner need not rest."""


@dataclass(frozen=True)
class Material:
    """What every arm is given."""

    pair: ModelPair
    stream: Sequence[RecordedAnswer]
    held_out: Mapping[str, HeldOut]
    """By domain."""
    evaluate_every: int = 200
    routing: Routing = "none"


@dataclass
class ArmOutcome:
    """What came of an arm."""

    accepted: list[int] = field(default_factory=list)
    """By request, as it would have been served."""
    attempted: list[int] = field(default_factory=list)
    held_out: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """By domain: (requests so far, acceptance on held-out prompts)."""
    looks_s: list[float] = field(default_factory=list)
    """Learner seconds at each look at held-out prompts."""
    swaps: list[int] = field(default_factory=list)
    """Requests so far when another draft began to serve."""
    learner_s: float = 0.0
    num_steps: int = 0
    facts: dict[str, object] = field(default_factory=dict)
    states: dict[str, AdapterState | None] = field(default_factory=lambda: {DEFAULT_ROUTE: None})
    """By route, what serves at the end; None: the floor."""

    def served(self, replayed: Sequence[Replayed]) -> None:
        self.accepted += [one.num_accepted for one in replayed]
        self.attempted += [one.num_attempted for one in replayed]

    def evaluate(self, held_out: Mapping[str, HeldOut], draft: TrainableDraft) -> None:
        self.looked({domain: prompts.acceptance(draft) for domain, prompts in held_out.items()})

    def looked(self, acceptance: Mapping[str, float]) -> None:
        """A look at held-out prompts, by domain."""
        self.looks_s.append(self.learner_s)
        for domain, value in acceptance.items():
            self.held_out.setdefault(domain, []).append((len(self.accepted), value))


def settings_of(arm: str, overrides: Mapping[str, Any]) -> LearnerSettings:
    """The product's defaults, or the paper's setting, and what an experiment changes; never resting."""
    start = paper_setting() if arm == "paper" else LearnerSettings()
    return LearnerSettings.model_validate({**start.model_dump(), **UNHURRIED, **overrides})


def trainable(pair: ModelPair, settings: LearnerSettings) -> TrainableDraft:
    assert pair.draft is not None
    own = copy.deepcopy(pair.draft).float()  # learning changes its base in place
    return build_draft(own, settings, draft_id=pair.draft_id, draft_revision=pair.draft_revision)


def floor(material: Material, settings: LearnerSettings) -> ArmOutcome:
    """The draft as it is."""
    return _without_learning(material, trainable(material.pair, settings), ArmOutcome())


def ours(material: Material, settings: LearnerSettings) -> ArmOutcome:
    """Serve a few, learn when it is due, follow the feed: the product's loop."""
    return _online(material, settings, ArmOutcome(), time.time, ttl_s=RECORD_TTL_S)


def memory(material: Material, settings: LearnerSettings) -> ArmOutcome:
    """As `ours`, in capture mode `memory`: records lie in the store that persists nothing, and expire after
    an hour of traffic, in which REQUESTS_PER_HOUR come."""
    outcome, began_s = ArmOutcome(), time.time()

    def clock() -> float:
        return began_s + 3600.0 * len(outcome.accepted) / REQUESTS_PER_HOUR

    return _online(material, settings, outcome, clock, ttl_s=MEMORY_TTL_S, in_memory=True)


def _online(
    material: Material,
    settings: LearnerSettings,
    outcome: ArmOutcome,
    clock: Callable[[], float],
    *,
    ttl_s: float,
    in_memory: bool = False,
) -> ArmOutcome:
    replay = _replay(material)
    if material.routing == "none":
        settings = settings.model_copy(update={"max_routes": 0})
    store = TwoStores(MemoryRecordStore(clock=clock), MemoryRecordStore(clock=clock))
    feed = MemoryAdapterFeed(clock=clock)
    serving = _Serving(trainable(material.pair, settings), feed, material.routing)
    revision = material.pair.target_revision
    with TemporaryDirectory() as folder:
        learner = Learner(
            trainable(material.pair, settings),
            store,
            feed,
            settings.model_copy(update={"checkpoint_folder": folder}),
            target_revision=revision,
            now_s=clock,
        )
        serving.evaluate(outcome, material)
        for part in chunks(material.stream, REQUESTS_PER_TURN):
            for route, asked in serving.by_route(part).items():
                draft, by = serving.draft_of(route), serving.answering(route)
                replayed = replay.play(draft, serving.version(by), asked, route, by)
                kept = [_living(one.record, clock(), ttl_s) for one in replayed]
                outcome.served(replayed)
                store.append(StreamKey(revision, route, in_memory), kept)
            began_s = time.thread_time()
            while learner.run_cycle():
                pass
            outcome.learner_s += time.thread_time() - began_s
            outcome.swaps += [len(outcome.accepted)] * serving.follow()
            if _is_time(material, outcome):
                serving.evaluate(outcome, material)
        outcome.facts, outcome.num_steps = learner.snapshot(), learner.snapshot()["num_steps"]
        outcome.facts["held_out_routes"] = {
            domain: serving.routes_of(prompts.recorded) for domain, prompts in material.held_out.items()
        }
    outcome.states = serving.states
    return outcome


def _living(record: GenerationRecord, now_s: float, ttl_s: float) -> GenerationRecord:
    return replace(record, created_at_s=now_s, expires_at_s=now_s + ttl_s)


class _Serving:
    """What replicas do, as far as acceptance goes: a draft a route, that of `default` for the rest."""

    def __init__(self, draft: TrainableDraft, feed: MemoryAdapterFeed, routing: Routing) -> None:
        self._draft, self._feed, self._routing = draft, feed, routing
        self._versions: dict[str, int] = {}
        self.states: dict[str, AdapterState | None] = {DEFAULT_ROUTE: None}

    def by_route(self, part: Sequence[RecordedAnswer]) -> dict[str, list[RecordedAnswer]]:
        found: dict[str, list[RecordedAnswer]] = {}
        for one in part:
            found.setdefault(self.route_of(one), []).append(one)
        return found

    def route_of(self, recorded: RecordedAnswer) -> str:
        if self._routing == "tags":
            return recorded.domain
        table = self._feed.route_table() if self._routing == "router" else None
        return DEFAULT_ROUTE if table is None else table.route_of(recorded.prompt_embedding_H)

    def routes_of(self, recorded: Sequence[RecordedAnswer]) -> Counter[str]:
        """How many of the requests each route would get."""
        return Counter(map(self.route_of, recorded))

    def version(self, route: str) -> int:
        """That serves, of the route's own draft."""
        return self._versions.get(route, FLOOR_VERSION)

    def draft_of(self, route: str) -> TrainableDraft:
        """The draft that answers for the route, loaded."""
        self._draft.load(self.states[self.answering(route)])
        return self._draft

    def follow(self) -> int:
        """Serve what the feed points to. Returns how many routes changed."""
        num_changed = 0
        for route in [DEFAULT_ROUTE, *self._feed.routes()]:
            manifest = self._feed.latest(route)
            version = FLOOR_VERSION if manifest is None else manifest.draft_version
            if version == self._versions.get(route, FLOOR_VERSION):
                continue
            num_changed += 1
            self._versions[route] = version
            self.states[route] = import_weights(self._feed.weights(route, version)) if version else None
        return num_changed

    def evaluate(self, outcome: ArmOutcome, material: Material) -> None:
        """Each domain with the draft that most of its requests would meet."""
        found = {}
        for domain, prompts in material.held_out.items():
            ((route, _),) = self.routes_of(prompts.recorded).most_common(1)
            found[domain] = prompts.acceptance(self.draft_of(route))
        outcome.looked(found)

    def answering(self, route: str) -> str:
        """The route whose draft it is."""
        return route if self._versions.get(route, FLOOR_VERSION) else DEFAULT_ROUTE


def through_engine(material: Material, settings: LearnerSettings) -> ArmOutcome:
    """As `ours`, but nothing is replayed: requests run in the real engine, and records hold what it captured,
    positions after a rejection too."""
    stream, outcome = material.stream, ArmOutcome()
    recipe = Recipe(
        num_requests=len(stream),
        requests_per_cycle=REQUESTS_PER_TURN,
        num_slots=REQUESTS_PER_TURN,
        num_draft_tokens=NUM_DRAFT_TOKENS,
        speculation="model",
        max_tokens=max(one.num_tokens for one in stream),
        prompt_tokens=max(len(one.prompt_token_ids) for one in stream),
        sampled_share=0.0,
        time_limit_s=math.inf,
        seed=settings.seed,
    )
    prompts = (one.prompt_token_ids.tolist() for one in stream)
    adaptation = adapt(material.pair, prompts, settings, recipe)
    draft = trainable(material.pair, settings)
    if adaptation.adapter is not None:
        draft.load(import_weights(adaptation.adapter.weights))
        outcome.states = {DEFAULT_ROUTE: draft.state()}
    for cycle in adaptation.history:
        outcome.accepted.append(cycle.num_accepted)
        outcome.attempted.append(cycle.num_attempted)
    outcome.learner_s = adaptation.learner_s
    outcome.evaluate(material.held_out, draft)
    return outcome


def paper(material: Material, settings: LearnerSettings) -> ArmOutcome:
    """A step every few requests on those alone; every step serves, whatever it did."""
    outcome, replay = ArmOutcome(), _replay(material)
    trainer = Trainer(trainable(material.pair, settings), settings)
    outcome.evaluate(material.held_out, trainer.draft)
    for number, part in enumerate(chunks(material.stream, REQUESTS_PER_TURN)):
        replayed = replay.play(trainer.draft, number, part)
        outcome.served(replayed)
        began_s = time.thread_time()
        trainer.step([one.record for one in replayed])
        outcome.learner_s += time.thread_time() - began_s
        if _is_time(material, outcome):
            outcome.evaluate(material.held_out, trainer.draft)
    outcome.num_steps, outcome.states = trainer.num_steps, {DEFAULT_ROUTE: trainer.draft.state()}
    return outcome


def offline(material: Material, settings: LearnerSettings) -> ArmOutcome:
    """Passes over all that `ours` may learn from; the rate halves where a pass gains nothing on the records
    that `ours` holds out, and the third time ends it."""
    outcome, replay, rng = ArmOutcome(), _replay(material), np.random.default_rng(settings.seed)
    trainer = Trainer(trainable(material.pair, settings), settings)
    optimizer, objective = build_optimizer(trainer.draft), objective_of(settings)
    records = [replay.bare_record(one) for one in material.stream]
    share = settings.held_out_share
    learnt = [record for record in records if not is_held_out(record.request_id, share)]
    kept = [record for record in records if is_held_out(record.request_id, share)]
    best, best_state, num_stalls = -1.0, trainer.draft.state(), 0
    for _ in range(MAX_EPOCHS):
        began_s = time.thread_time()
        order = rng.permutation(len(learnt))
        for start in range(0, len(order), settings.records_per_step):
            drawn = [learnt[index] for index in order[start : start + settings.records_per_step]]
            distill_step(trainer.draft, optimizer, trainer.batches(drawn), objective)
            outcome.num_steps += 1
        scores = trainer.score(trainer.draft.state(), kept)
        value = float(np.mean([score.acceptance for score in scores if score is not None]))
        outcome.learner_s += time.thread_time() - began_s
        if value > best + 0.001:
            best, best_state = value, trainer.draft.state()
        else:
            num_stalls += 1
            if num_stalls == 3:
                break
            objective = replace(objective, learning_rate=objective.learning_rate / 2)
    trainer.draft.load(best_state)
    outcome.states = {DEFAULT_ROUTE: best_state}
    return _without_learning(material, trainer.draft, outcome)


def _without_learning(material: Material, draft: TrainableDraft, outcome: ArmOutcome) -> ArmOutcome:
    replay = _replay(material)
    for part in chunks(material.stream, 8 * REQUESTS_PER_TURN):
        outcome.served(replay.play(draft, FLOOR_VERSION, part))
    outcome.evaluate(material.held_out, draft)
    return outcome


def _replay(material: Material) -> Replay:
    return Replay(material.pair.target_revision, NUM_DRAFT_TOKENS)


def _is_time(material: Material, outcome: ArmOutcome) -> bool:
    """To look at held-out prompts: every so many requests, and at the end."""
    count, every = len(outcome.accepted), material.evaluate_every
    return count == len(material.stream) or count // every > (count - REQUESTS_PER_TURN) // every
