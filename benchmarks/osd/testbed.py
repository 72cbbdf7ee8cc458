"""The whole product in one process, small enough to be attacked hundreds of times.

Real parts everywhere: engine, recorder, stores, learner, gate, watch, and the replica's own watcher with its
validation. They take turns, so nothing depends on timing. Knows no attack. Invariant: every deployment starts
from the same incumbent, and leaves the engine on the floor.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.adapted import Adapter
from benchmarks.osd.arms import trainable
from benchmarks.prompts import domain_prompts
from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.names import DEFAULT_ROUTE
from buffer.records import AdapterEvent, AdapterManifest, GenerationRecord, ServingStatus
from buffer.store import StreamKey
from deploy.demo.corpus import DOMAINS
from learner.draft import AdapterState, TrainableDraft, export_weights, import_weights
from learner.draw import is_held_out
from learner.judging.evaluation import RecordScore
from learner.judging.judge import Judge
from learner.loop import Learner
from learner.settings import LearnerSettings
from learner.tracking.tracker import NullTracker
from learner.trainer import Trainer
from serving.adapter_watcher import AdapterWatcher
from serving.engine.counters import acceptance_rate
from serving.engine.request import Generation, GenerationRequest, SamplingParams
from serving.local import LocalEngine, build_engine
from serving.models.adapter import sha256_of
from serving.models.loading import ModelPair
from serving.options import EngineOptions
from serving.recorder import Recorder, RecordPlace
from serving.served_drafts import ServedDrafts

INCUMBENT = 1
"""draft_version that serves when a deployment is opened."""
NOW_S = 1_000_000.0
TTL_S = 1_000.0
PROMPT_TOKENS, MAX_TOKENS = 64, 48
WEAKENED = 0.75
"""Of the learnt change, the part that the incumbent keeps."""
TESTBED_SETTINGS = {
    "live_records_per_cycle": 16,
    "warmup_steps": 0,
    "replay_share": 0.0,
    "passes_over_fresh": 2.0,
    "max_routes": 0,
}
"""Quick, one draft for all, and a candidate learns from what it is given only."""


class Diary(NullTracker):
    """What the learner reported to its tracker of its decisions."""

    def __init__(self) -> None:
        self.decisions: list[str] = []

    def log_decision(
        self, route: str, kind: str, draft_version: int, reason: str, num_records_seen: int
    ) -> None:
        self.decisions.append(f"{kind}: {reason}")


@dataclass(frozen=True)
class ServedTurn:
    """What a few requests brought."""

    num_rounds: int
    """Of single sequences: what one client would see, the strictest count there is."""
    num_attempted: int
    num_accepted: int


@dataclass(frozen=True)
class Testbed:
    """What all deployments share. `prompts`, endless, by kind of traffic."""

    __test__ = False
    """Not one of pytest's classes, whose names begin alike."""

    pair: ModelPair
    engine: LocalEngine
    settings: LearnerSettings
    incumbent: Adapter
    prompts: Mapping[str, Iterator[list[int]]]
    max_tokens: int = 48
    records: dict[str, list[GenerationRecord]] = field(default_factory=dict)
    """Honest ones, by kind of traffic, as the incumbent served them."""

    def fill(self, num_records: int) -> None:
        """Serve so many requests of every kind with the incumbent."""
        with self.deployment() as deployment:
            for kind in self.prompts:
                deployment.serve(kind, num_records)
                self.records[kind] = deployment.take()

    def trainable(self) -> TrainableDraft:
        return trainable(self.pair, self.settings)

    @property
    def incumbent_state(self) -> AdapterState:
        return import_weights(self.incumbent.weights)

    def manifest(self, weights: bytes, draft_version: int, draft: TrainableDraft) -> AdapterManifest:
        """Of an adapter that fits in every respect."""
        return AdapterManifest(
            route=DEFAULT_ROUTE,
            draft_version=draft_version,
            parent_version=draft_version - 1,
            draft_id=self.pair.draft_id,
            draft_revision=self.pair.draft_revision,
            target_revision=self.pair.target_revision,
            rank=draft.rank,
            alpha=draft.alpha,
            target_modules=draft.target_modules,
            adapter_config_json=draft.config_json,
            sha256=sha256_of(weights),
            num_bytes=len(weights),
            created_at_s=NOW_S,
        )

    @contextmanager
    def deployment(
        self, drafts: ServedDrafts | None = None, /, **changes: Any
    ) -> "Iterator[InProcessDeployment]":
        """A learner, a store, a feed and a replica's watcher of their own; `changes` are learner settings.
        `drafts` take the place of the engine's own, as far as the replica can see."""
        with TemporaryDirectory() as folder:
            settings = self.settings.model_copy(update={"checkpoint_folder": folder, **changes})
            deployment = InProcessDeployment(self, settings, drafts or self.engine.drafts)
            try:
                yield deployment
            finally:
                deployment.leave()


class InProcessDeployment:
    """One deployment. Its clock moves only when something is served or it is set."""

    judge_type = Judge
    """A test puts a blind one here, to see that attacks are seen."""

    def __init__(self, testbed: Testbed, settings: LearnerSettings, drafts: ServedDrafts | None) -> None:
        self.testbed = testbed
        self.now_s = NOW_S
        self.store = MemoryRecordStore(clock=lambda: self.now_s)
        self.feed = MemoryAdapterFeed(clock=lambda: self.now_s)
        self.diary = Diary()
        self.draft = testbed.trainable()
        self.settings = settings
        self.publish(testbed.incumbent.weights, INCUMBENT)
        self.learner = self.learner_again()
        self.replica = AdapterWatcher(
            drafts,
            self.feed,
            replica_id="replica",
            status=lambda: ServingStatus("replica", self.now_s, {}, ()),
            watch_interval_s=1.0,
            status_interval_s=1.0,
        )
        self.turn()
        self._num_requests = 0

    def learner_again(self) -> Learner:
        """A learner on this deployment's checkpoint, as after a crash."""
        learner = Learner(
            self.draft,
            self.store,
            self.feed,
            self.settings,
            target_revision=self.testbed.pair.target_revision,
            tracker_for=lambda run_id: self.diary,
            now_s=lambda: self.now_s,
        )
        if self.judge_type is not Judge:
            default = learner._routes.default
            default.judge = self.judge_type(self.settings, default.trainer.score)
        return learner

    def offer(self, candidate: AdapterState) -> None:
        """Judged next, as if training had made it."""
        trainer = self.learner._routes.default.trainer
        trainer.reset(None)
        trainer.trained = trainer.candidate = dict(candidate)

    @property
    def key(self) -> StreamKey:
        return StreamKey(self.testbed.pair.target_revision, DEFAULT_ROUTE)

    @property
    def pointed_version(self) -> int:
        latest = self.feed.latest(DEFAULT_ROUTE)
        return latest.draft_version if latest else 0

    def publish(self, weights: bytes, draft_version: int) -> AdapterManifest:
        manifest = replace(self.testbed.manifest(weights, draft_version, self.draft), created_at_s=self.now_s)
        self.feed.publish(manifest, weights)
        return manifest

    def turn(self) -> None:
        """The replica looks at the feed, the learner at everything, the replica again."""
        self.replica.follow()
        self.learner.run_cycle()
        self.replica.follow()

    def give(self, records: Sequence[GenerationRecord], held_out: bool | None = None) -> None:
        """Records arrive as if just served, each under an id of its own on the wanted side of the split."""
        self.now_s += 1.0
        for record in records:
            name = self._name(held_out)
            fresh = replace(record, record_id=name, request_id=name)
            if record.expires_at_s > NOW_S:
                fresh = replace(fresh, created_at_s=self.now_s, expires_at_s=self.now_s + TTL_S)
            self.store.append(self.key, [fresh])

    def serve(self, kind: str, num_requests: int) -> ServedTurn:
        """Requests through the engine, their records into the store; a quarter at temperature 1."""
        self.now_s += 1.0
        testbed, prompts = self.testbed, islice(self.testbed.prompts[kind], num_requests)
        handles = [
            testbed.engine.submit(
                GenerationRequest(
                    self._name(None),
                    tuple(prompt),
                    SamplingParams(temperature=float(number % 4 == 3), max_tokens=testbed.max_tokens),
                    capture=True,
                )
            )
            for number, prompt in enumerate(prompts)
        ]
        generations = [handle.result() for handle in handles]
        self.served_last: list[GenerationRecord] = []
        self._record(generations)
        return ServedTurn(
            sum(generation.num_rounds for generation in generations),
            sum(generation.num_attempted for generation in generations),
            sum(generation.num_accepted for generation in generations),
        )

    def take(self) -> list[GenerationRecord]:
        """Everything that waits in the store."""
        return [delivery.record for delivery in self.store.read_new(self.key, "taken", 10_000)]

    def score(self, state: AdapterState, records: Sequence[GenerationRecord]) -> list[RecordScore]:
        """Of the draft with the weights `state`."""
        found = Trainer(self.draft, self.settings).score(state, records)
        return [score for score in found if score is not None]

    def events(self, *kinds: str) -> list[AdapterEvent]:
        return [event for event in self.feed.history(DEFAULT_ROUTE) if event.kind in kinds]

    def leave(self) -> None:
        """The engine is as it was before: on the floor."""
        drafts = self.testbed.engine.drafts
        assert drafts is not None
        drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, None))

    def submit(self, key: StreamKey, record: Any, num_bytes: int, /) -> None:
        """The recorder's way into the store: nobody waits here."""
        built: GenerationRecord = record() if callable(record) else record
        self.served_last.append(built)
        self.store.append(key, [built])

    def _record(self, generations: Sequence[Generation]) -> None:
        recorder = Recorder(
            {"replay": RecordPlace(self, TTL_S)},
            target_revision=self.testbed.pair.target_revision,
            replica_id="replica",
            capture_rate=1.0,
            clock=lambda: self.now_s,
        )
        for generation in generations:
            recorder.record(generation, "replay")

    def _name(self, held_out: bool | None) -> str:
        """The next free id; on the wanted side of the split, if one is wanted."""
        while True:
            self._num_requests += 1
            name = f"request-{self._num_requests}"
            if held_out is None or is_held_out(name, self.settings.held_out_share) == held_out:
                return name


@contextmanager
def demo_testbed(pair: ModelPair, learnt: Adapter, settings: LearnerSettings) -> Iterator[Testbed]:
    """On the demo's pair and traffic. The incumbent is a weakened copy of what was learnt, so that there is
    a draft that is truly better."""
    settings = settings.model_copy(update=TESTBED_SETTINGS)
    room = PROMPT_TOKENS + MAX_TOKENS
    with build_engine(
        pair,
        options=EngineOptions(
            num_slots=8, max_seq_len=room, prefix_cache_mib=0, num_draft_tokens=4, speculation="model"
        ),
    ) as engine:
        engine.seed(0)
        traffic = {domain: domain_prompts(pair.tokenizer, domain, PROMPT_TOKENS) for domain in DOMAINS}
        yield Testbed(pair, engine, settings, weakened(learnt, WEAKENED), traffic, MAX_TOKENS)


def acceptance(turns: Sequence[ServedTurn]) -> float:
    return acceptance_rate(
        sum(turn.num_accepted for turn in turns), sum(turn.num_attempted for turn in turns)
    )


def scaled(state: AdapterState, factor: float) -> AdapterState:
    """The same change of the draft, smaller or larger: every second factor times `factor`."""
    return {key: weight * factor if "lora_B" in key else weight for key, weight in state.items()}


def weakened(adapter: Adapter, factor: float) -> Adapter:
    """An adapter that has learnt only part of the way, so that better ones exist."""
    return Adapter(export_weights(scaled(import_weights(adapter.weights), factor)), adapter.config_json)
