"""The arms: how a draft may learn from a stream of told requests, and what each was worth as it went.

`ours` is the product's own learner, gate included, fed through the product's store; `paper` is the setting
of Online Speculative Decoding, ungated; `offline` distils everything that `ours` may learn from until nothing
is gained, with the same trainable parameters, as the ceiling. Knows no engine: rounds are replayed.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.osd.held_out import HeldOut
from benchmarks.osd.replay import Replay, Replayed, chunks
from benchmarks.osd.told import Told
from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.records import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.store import StreamKey
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
UNHURRIED = {"max_busy_share": 1.0, "quiet_after_publish_s": 0.0, "max_record_age_s": 24 * 3600.0}
"""Nothing else runs here, so the learner need not rest."""


@dataclass(frozen=True)
class Material:
    """What every arm is given."""

    pair: ModelPair
    stream: Sequence[Told]
    held_out: Mapping[str, HeldOut]
    """By domain."""
    evaluate_every: int = 200


@dataclass
class Outcome:
    """What came of an arm."""

    accepted: list[int] = field(default_factory=list)
    """By request, as it would have been served."""
    attempted: list[int] = field(default_factory=list)
    held_out: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """By domain: (requests so far, acceptance on held-out prompts)."""
    swaps: list[int] = field(default_factory=list)
    """Requests so far when another draft began to serve."""
    learner_s: float = 0.0
    num_steps: int = 0
    num_positions: int = 0
    """Target rows that losses looked at, repeats included."""
    facts: dict[str, object] = field(default_factory=dict)
    state: AdapterState | None = None
    """What serves at the end; None: the floor."""

    def served(self, replayed: Sequence[Replayed]) -> None:
        self.accepted += [one.num_accepted for one in replayed]
        self.attempted += [one.num_attempted for one in replayed]

    def evaluate(self, held_out: Mapping[str, HeldOut], draft: TrainableDraft) -> None:
        for domain, prompts in held_out.items():
            value = prompts.acceptance(draft)
            self.held_out.setdefault(domain, []).append((len(self.accepted), value))


def settings_of(arm: str, overrides: Mapping[str, Any]) -> LearnerSettings:
    """The product's defaults, or the paper's setting, and what an experiment changes; never resting."""
    start = paper_setting() if arm == "paper" else LearnerSettings()
    return LearnerSettings.model_validate({**start.model_dump(), **UNHURRIED, **overrides})


def trainable(pair: ModelPair, settings: LearnerSettings) -> TrainableDraft:
    assert pair.draft is not None
    own = copy.deepcopy(pair.draft).float()  # learning changes its base in place
    return build_draft(own, settings, draft_id=pair.draft_id, draft_revision=pair.draft_revision)


def floor(material: Material, settings: LearnerSettings) -> Outcome:
    """The draft as it is."""
    return _without_learning(material, trainable(material.pair, settings), Outcome())


def ours(
    material: Material, settings: LearnerSettings, on_turn: Callable[[Outcome], None] = lambda outcome: None
) -> Outcome:
    """Serve a few, learn when it is due, follow the feed: the product's loop."""
    outcome, replay = Outcome(), _replay(material)
    served, version = trainable(material.pair, settings), FLOOR_VERSION
    store, feed = MemoryRecordStore(), MemoryAdapterFeed()
    key = StreamKey(material.pair.target_revision, DEFAULT_ROUTE)
    with TemporaryDirectory() as folder:
        learner = Learner(
            trainable(material.pair, settings),
            store,
            feed,
            settings.model_copy(update={"checkpoint_folder": folder}),
            target_revision=material.pair.target_revision,
        )
        outcome.evaluate(material.held_out, served)
        for part in chunks(material.stream, REQUESTS_PER_TURN):
            replayed = replay.play(served, version, part)
            outcome.served(replayed)
            store.append(key, [one.record for one in replayed])
            began_s = time.thread_time()
            learner.run_cycle()
            outcome.learner_s += time.thread_time() - began_s
            manifest = feed.latest(DEFAULT_ROUTE)
            now = FLOOR_VERSION if manifest is None else manifest.draft_version
            if now != version:
                version = now
                outcome.state = import_weights(feed.weights(DEFAULT_ROUTE, now)) if now else None
                served.load(outcome.state)
                outcome.swaps.append(len(outcome.accepted))
            _evaluate_now_and_then(material, outcome, served)
            on_turn(outcome)
        outcome.facts = learner.snapshot()
        outcome.num_steps = learner.snapshot()["num_steps"]
    return outcome


def paper(
    material: Material, settings: LearnerSettings, on_turn: Callable[[Outcome], None] = lambda outcome: None
) -> Outcome:
    """A step every few requests on those alone; every step serves, whatever it did."""
    outcome, replay = Outcome(), _replay(material)
    trainer = Trainer(trainable(material.pair, settings), settings)
    outcome.evaluate(material.held_out, trainer.draft)
    for number, part in enumerate(chunks(material.stream, REQUESTS_PER_TURN)):
        replayed = replay.play(trainer.draft, number, part)
        outcome.served(replayed)
        began_s = time.thread_time()
        step = trainer.step([one.record for one in replayed])
        outcome.learner_s += time.thread_time() - began_s
        outcome.num_positions += step.num_positions
        _evaluate_now_and_then(material, outcome, trainer.draft)
        on_turn(outcome)
    outcome.num_steps, outcome.state = trainer.num_steps, trainer.draft.state()
    return outcome


def offline(
    material: Material,
    settings: LearnerSettings,
    *,
    max_epochs: int = 12,
    on_turn: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Passes over all that `ours` may learn from; the rate halves where a pass gains nothing on the records
    that `ours` holds out, and the third time ends it."""
    outcome, replay, rng = Outcome(), _replay(material), np.random.default_rng(settings.seed)
    trainer = Trainer(trainable(material.pair, settings), settings)
    optimizer, objective = build_optimizer(trainer.draft), objective_of(settings)
    records = [replay.bare_record(one) for one in material.stream]
    share = settings.held_out_share
    learnt = [record for record in records if not is_held_out(record.request_id, share)]
    kept = [record for record in records if is_held_out(record.request_id, share)]
    best, best_state, num_stalls = -1.0, trainer.draft.state(), 0
    for _ in range(max_epochs):
        began_s = time.thread_time()
        order = rng.permutation(len(learnt))
        for start in range(0, len(order), settings.records_per_step):
            drawn = [learnt[index] for index in order[start : start + settings.records_per_step]]
            step = distill_step(trainer.draft, optimizer, trainer.batches(drawn), objective)
            outcome.num_positions, outcome.num_steps = (
                outcome.num_positions + step.num_positions,
                outcome.num_steps + 1,
            )
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
        on_turn(outcome)
    trainer.draft.load(best_state)
    outcome.state = best_state
    return _without_learning(material, trainer.draft, outcome)


def _without_learning(material: Material, draft: TrainableDraft, outcome: Outcome) -> Outcome:
    replay = _replay(material)
    outcome.evaluate(material.held_out, draft)
    for part in chunks(material.stream, 8 * REQUESTS_PER_TURN):
        outcome.served(replay.play(draft, FLOOR_VERSION, part))
    outcome.evaluate(material.held_out, draft)
    return outcome


def _replay(material: Material) -> Replay:
    return Replay(material.pair.target_revision, NUM_DRAFT_TOKENS)


def _evaluate_now_and_then(material: Material, outcome: Outcome, draft: TrainableDraft) -> None:
    count, every = len(outcome.accepted), material.evaluate_every
    if count == len(material.stream) or count // every > (count - REQUESTS_PER_TURN) // every:
        outcome.evaluate(material.held_out, draft)
