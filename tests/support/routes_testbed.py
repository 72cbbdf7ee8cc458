"""Two topics under one target, whose behaviour no one draft can follow, and a learner over them.

After each token a topic has its own next one, whatever was before: a draft that does not know the topic can
at best guess between the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.records import AdapterEvent, GenerationRecord, RecordSampling
from buffer.store import StreamKey
from learner.draft import import_weights
from learner.judging.draft_selection import FLOOR, ExistingDraft
from learner.loop import Learner
from tests.support.record_factory import RecordFactory
from tests.support.tiny_learner import VOCAB_SIZE, quick_settings, tiny_draft, tiny_pair

TOPICS = ("law", "verse")
SAMPLING = RecordSampling()
ROUTES = {"route_min_records": 60, "route_review_records": 60, "route_idle_s": 600.0, "gate_min_records": 4}
Records = list[GenerationRecord]


class Clock:
    now_s = 2_000.0

    def __call__(self) -> float:
        return self.now_s


class RoutesTestbed:
    """Store, feed and a learner that can be killed and built again, under a clock that is set by hand."""

    def __init__(self, folder: Path, *, isolated_routes: Sequence[str] = (), **changes: object) -> None:
        self.isolated_routes = isolated_routes
        self.clock = Clock()
        self.store, self.feed = MemoryRecordStore(clock=self.clock), MemoryAdapterFeed(clock=self.clock)
        self._settings = {**ROUTES, "checkpoint_folder": str(folder), **changes}
        self.free_bytes = float("inf")
        self.learner = self.build()

    def build(self) -> Learner:
        settings = quick_settings(**self._settings)
        return Learner(
            tiny_draft(),
            self.store,
            self.feed,
            settings,
            target_revision="target-1",
            now_s=self.clock,
            free_bytes=lambda: self.free_bytes,
            isolated_routes=self.isolated_routes,
        )

    def serve(self, *records: GenerationRecord) -> None:
        for record in records:
            self.store.append(StreamKey("target-1", record.route), [record])

    def learn(self) -> None:
        while self.learner.run_cycle():
            pass

    def live(self, traffic: Mapping[str, Records], per_turn: int = 25) -> None:
        """Serve and learn in turns, a share of each topic a turn."""
        for start in range(0, max(len(records) for records in traffic.values()), per_turn):
            for records in traffic.values():
                self.serve(*records[start : start + per_turn])
            self.learn()

    def open_routes(self) -> set[str]:
        return set(self.learner.snapshot()["routes"]) - {"default"}

    def events(self, route: str, kind: str) -> list[AdapterEvent]:
        return [event for event in self.feed.history(route) if event.kind == kind]

    def draft(self, route: str) -> ExistingDraft:
        manifest = self.feed.latest(route)
        if manifest is None:
            return FLOOR
        state = import_weights(self.feed.weights(route, manifest.draft_version))
        return ExistingDraft(route, manifest.draft_version, state)


class Topic(nn.Module):
    """A target that says `token * 7 + step` nine times in ten."""

    config = SimpleNamespace(vocab_size=VOCAB_SIZE)

    def __init__(self, step: int) -> None:
        super().__init__()
        following_V = (torch.arange(VOCAB_SIZE) * 7 + step) % VOCAB_SIZE
        probs_VV = torch.full((VOCAB_SIZE, VOCAB_SIZE), 0.1 / VOCAB_SIZE)
        probs_VV[torch.arange(VOCAB_SIZE), following_V] += 0.9
        self.logits_VV = probs_VV.log()

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits_VV[input_ids])


def factory(topic: str) -> RecordFactory:
    place = TOPICS.index(topic)
    return RecordFactory(Topic(3 + 11 * place), tiny_pair()[1], route=topic, clock_s=Clock.now_s, seed=place)


def two_topics() -> dict[str, Records]:
    """250 records a topic, each with its prompt's place: topics lie apart."""
    rng, found = np.random.default_rng(0), {}
    for kind, topic in enumerate(TOPICS):
        records = factory(topic).records(250, SAMPLING, max_tokens=6)
        prompts = 10.0 + 8.0 * np.eye(8)[kind] + rng.normal(size=(len(records), 8))
        found[topic] = [
            replace(record, prompt_embedding_H=prompt_H.astype(np.float16))
            for record, prompt_H in zip(records, prompts, strict=True)
        ]
    return found


def untagged(traffic: Mapping[str, Records]) -> dict[str, Records]:
    return {
        topic: [replace(record, route="default") for record in records] for topic, records in traffic.items()
    }
