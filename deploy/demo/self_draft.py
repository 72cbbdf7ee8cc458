"""The demo's arm `self`: what a part of the target would have learnt from the same traffic, from nothing.

The product's learner, gate included, reads some of the records that the replica left, in their order, after
the draft model's learner has been paused; each record is scored before it is learnt from. Then an engine in
this process answers held-out prompts with the part and without, in turn. Nothing is asked of the service.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.names import DEFAULT_ROUTE
from buffer.records import AdapterManifest, GenerationRecord
from buffer.store import RecordStore, StreamKey
from deploy.demo.corpus import Prompt
from deploy.demo.plan import TimeLimit
from learner.draft import TrainableDraft, build_draft
from learner.judging.evaluation import score_records
from learner.loop import Learner
from learner.settings import LearnerSettings
from serving.compiling import COMPILING
from serving.engine import SamplingParams
from serving.engine.counters import acceptance_rate
from serving.local import LocalEngine, load_engine
from serving.memory_plan import ModelSize
from serving.models.loading import load_pair
from serving.options import EngineOptions

_CHUNK = 16
"""Records between two looks at the time and at what serves."""
_ANOTHER_DRAFT = "draft model"
ALONE = {"max_busy_share": 1.0, "quiet_after_publish_s": 0.0, "max_routes": 0, "tracking_uri": ""}
"""No request waits for this learner."""


@dataclass(frozen=True)
class DraftCosts:
    """What a draft takes."""

    weights_bytes: int
    """Of one set of its own weights; a replica holds two, live and floor."""
    column_bytes: int
    """Its own keys and values of one token."""
    adapter_bytes: int
    """Of the version that serves at the end; 0 if none was promoted."""
    learner_s: float
    """Of computing, on one core."""

    @classmethod
    def of(cls, draft: nn.Module, latest: AdapterManifest | None, learner_s: float) -> "DraftCosts":
        size = ModelSize.of(draft)
        adapter_bytes = 0 if latest is None else latest.num_bytes
        return cls(size.weights_bytes, size.column_bytes, adapter_bytes, learner_s)


@dataclass
class SelfDraft:
    """What came of the arm."""

    part: str
    num_kept: int = 0
    """Records that the traffic left."""
    costs: DraftCosts | None = None
    acceptance: list[tuple[int, float]] = field(default_factory=list)
    """(number of the record in the traffic, expected acceptance under the version that served then)."""
    num_promotions: int = 0
    passes: str = ""
    rates: dict[str, float] = field(default_factory=dict)
    """Acceptance on held-out prompts, by domain."""
    ratios: dict[str, list[float]] = field(default_factory=dict)
    """Tokens a second over no speculation, of pairs, by domain."""
    num_compared: int = 0
    num_identical: int = 0
    """Of the greedy answers compared, those that equal the target's own."""

    @property
    def speed_up(self) -> float | None:
        """The median over all pairs; None without any."""
        ratios = [ratio for domain in self.ratios.values() for ratio in domain]
        return statistics.median(ratios) if ratios else None


def records_in(store: RecordStore, target_revision: str) -> list[GenerationRecord]:
    """What the traffic left, in its order."""
    streams = store.keys()
    keys = [key for key in streams if key.target_revision == target_revision]
    found = [record for key in keys for record in store.draw_replay(key, store.size(key).num_records, 0)]
    return sorted(found, key=lambda record: record.created_at_s)


class SelfDraftArm:
    """The part with an engine of its own, which compiles passes meanwhile, and what it has learnt."""

    def __init__(
        self,
        target: str,
        part: str,
        records: Sequence[GenerationRecord],
        learner: LearnerSettings,
        options: EngineOptions,
    ) -> None:
        """`records`: of the traffic, in its order. `learner`: its settings, for a draft model."""
        self.result = SelfDraft(part, len(records))
        self._records = records
        self._settings = LearnerSettings.model_validate(
            {**learner.model_dump(), **ALONE, "target_modules": None}
        )
        self._feed = MemoryAdapterFeed()
        self._pair = load_pair(target, part)
        self._engine = load_engine(target, part, options)

    @property
    def is_compiling(self) -> bool:
        return self._engine.compiling.state == COMPILING

    def close(self) -> None:
        self._engine.close()

    def learn(self, num_records: int, limit: TimeLimit) -> None:
        """From so many records, evenly over the traffic, until they or the time are used."""
        pair, store = self._pair, MemoryRecordStore()
        assert pair.draft is not None
        draft = build_draft(
            pair.draft, self._settings, draft_id=pair.draft_id, draft_revision=pair.draft_revision
        )
        records = _spread(self._records, num_records)
        with TemporaryDirectory() as folder:
            settings = self._settings.model_copy(update={"checkpoint_folder": folder})
            learner = Learner(draft, store, self._feed, settings, target_revision=pair.target_revision)
            for start in range(0, len(records), _CHUNK):
                if limit.left_s == 0.0:
                    break
                chunk = records[start : start + _CHUNK]
                self._score(draft, chunk)
                arriving = [_arriving(record) for _, record in chunk]
                store.append(StreamKey(pair.target_revision, DEFAULT_ROUTE), arriving)
                while limit.left_s and learner.run_cycle():
                    pass
            learner_s = float(learner.snapshot()["learner_s"])
        events = self._feed.history(DEFAULT_ROUTE)
        self.result.num_promotions = sum(event.kind == "promoted" for event in events)
        self.result.costs = DraftCosts.of(pair.draft, self._feed.latest(DEFAULT_ROUTE), learner_s)

    def measure(self, held_out: Mapping[str, Iterator[Prompt]], max_tokens: int, limit: TimeLimit) -> None:
        """What was learnt against no speculation, while there is time. A compilation under way ends: it
        would take the other core."""
        self._engine.compiling.close()
        if (latest := self._feed.latest(DEFAULT_ROUTE)) is not None:
            weights = self._feed.weights(DEFAULT_ROUTE, latest.draft_version)
            assert self._engine.drafts is not None
            self._engine.drafts.swap(DEFAULT_ROUTE, self._engine.drafts.stage(DEFAULT_ROUTE, latest, weights))
        _measure(self.result, self._engine, held_out, limit, max_tokens)
        self.result.passes = self._engine.compiling.state

    def _score(self, draft: TrainableDraft, chunk: Sequence[tuple[int, GenerationRecord]]) -> None:
        """Before it is learnt from, by the version that would have served it."""
        latest, settings, state = self._feed.latest(DEFAULT_ROUTE), self._settings, None
        if latest is not None:
            state = draft.read(self._feed.weights(DEFAULT_ROUTE, latest.draft_version), latest)
        scores = score_records(
            draft,
            state,
            [record for _, record in chunk],
            max_row_tokens=settings.max_row_tokens,
            max_tokens_per_pass=settings.max_tokens_per_pass,
            max_positions_per_pass=settings.positions_per_pass(draft.vocab_size),
        )
        self.result.acceptance += [
            (number, score.acceptance) for (number, _), score in zip(chunk, scores, strict=True) if score
        ]


def _arriving(record: GenerationRecord) -> GenerationRecord:
    """As it would reach this learner now, from a replica that drafts with another draft: a promotion is
    watched on records that came after it, and none tells what the part's own versions were accepted for."""
    now_s = time.time()
    rounds = tuple(replace(trace, draft_route=_ANOTHER_DRAFT) for trace in record.rounds)
    left_s = record.expires_at_s - record.created_at_s
    return replace(record, rounds=rounds, created_at_s=now_s, expires_at_s=now_s + left_s)


def _measure(
    result: SelfDraft,
    engine: LocalEngine,
    held_out: Mapping[str, Iterator[Prompt]],
    limit: TimeLimit,
    max_tokens: int,
) -> None:
    """Prompt after prompt: both arms, the first one in turn, while there is time."""
    counts: dict[str, list[int]] = {domain: [0, 0] for domain in held_out}
    turn = 0
    while limit.left_s:
        for domain, prompts in held_out.items():
            if not limit.left_s:
                break
            [prompt] = islice(prompts, 1)
            ids = _token_ids(engine.pair.tokenizer, prompt)
            answers: dict[bool, tuple[float, Any]] = {}
            for drafts in (True, False) if turn % 2 else (False, True):
                params = SamplingParams(
                    temperature=0.0, max_tokens=max_tokens, num_draft_tokens=None if drafts else 0
                )
                began_s = limit.clock()
                [generation] = engine.generate([ids], params)
                answers[drafts] = (limit.clock() - began_s, generation)
            turn += 1
            (alone_s, alone), (drafted_s, drafted) = answers[False], answers[True]
            result.num_compared += 1
            result.num_identical += alone.output_token_ids == drafted.output_token_ids
            counts[domain][0] += drafted.num_accepted
            counts[domain][1] += drafted.num_attempted
            speed = len(drafted.output_token_ids) / drafted_s
            result.ratios.setdefault(domain, []).append(speed * alone_s / len(alone.output_token_ids))
    result.rates = {
        domain: acceptance_rate(accepted, attempted)
        for domain, (accepted, attempted) in counts.items()
        if attempted
    }


def _token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(prompt.messages), add_generation_prompt=True, return_dict=False
    )
    return ids


def _spread(records: Sequence[GenerationRecord], count: int) -> list[tuple[int, GenerationRecord]]:
    """So many, evenly over the traffic, with their numbers."""
    wanted = min(count, len(records))
    numbers = [index * len(records) // wanted for index in range(wanted)]
    return [(number, records[number]) for number in numbers]
