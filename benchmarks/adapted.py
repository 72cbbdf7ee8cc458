"""The product's loop in one process: traffic through an engine, records to a learner, its drafts back.

Every part is the one that serves (recorder, stores, learner, gate, watcher); only Ray, Redis and HTTP are
absent. Serving and learning take turns, so what comes out follows from the prompts, the settings and the
generator's seed, not from the machine's speed, unless `time_limit_s` cuts it short.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from benchmarks.prompts import demo_prompts
from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.names import DEFAULT_ROUTE
from buffer.records import GenerationRecord
from buffer.store import StreamKey
from deploy.errors import DeployError
from learner.draft import TrainableDraft, build_draft
from learner.loop import Learner
from learner.settings import LearnerSettings
from serving.engine.counters import acceptance_rate
from serving.engine.request import Generation, GenerationRequest, SamplingParams
from serving.local import LocalEngine, build_engine
from serving.models.adapter import merge_adapter, sha256_of
from serving.models.loading import ModelPair
from serving.models.target_part import own_copy, own_tensors
from serving.options import EngineOptions, Speculation
from serving.recorder import Recorder, RecordPlace

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


class AdapterError(DeployError, ValueError):
    """A folder that holds no PEFT adapter; nothing was measured."""


def check_adapter(folder: Path | None) -> None:
    """Raises AdapterError; None is fine."""
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if folder is not None and not (folder / name).is_file():
            raise AdapterError(
                f"adapter={folder} holds no {name}, so it is no PEFT adapter; nothing was measured"
            )


@dataclass(frozen=True)
class Adapter:
    """LoRA weights of a draft, as PEFT keeps them."""

    weights: bytes
    config_json: str

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """Raises OSError where the folder has none."""
        return cls((folder / WEIGHTS_FILE).read_bytes(), (folder / CONFIG_FILE).read_text(encoding="utf-8"))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(self.config_json, encoding="utf-8")
        aside = folder / f"{WEIGHTS_FILE}.part"
        aside.write_bytes(self.weights)
        aside.replace(folder / WEIGHTS_FILE)

    def merged(self, draft: nn.Module) -> nn.Module:
        """A copy of the draft with these weights in it. Raises AdapterRejectedError if they do not fit."""
        merged = merge_adapter(draft, self.weights, self.config_json, sha256_of(self.weights))
        adapted = own_copy(draft)
        own = own_tensors(adapted)
        for name, weight in merged.items():
            own[name].data.copy_(weight)
        return adapted


@dataclass(frozen=True)
class Recipe:
    """How much traffic, and of which kind; all of it is captured."""

    num_requests: int = 960
    requests_per_cycle: int = 32
    num_slots: int = 16
    num_draft_tokens: int | None = None
    """None: the controller's choice."""
    speculation: Speculation = "auto"
    max_tokens: int = 64
    prompt_tokens: int = 64
    sampled_share: float = 0.25
    """Of the requests at temperature 1, the others are greedy."""
    time_limit_s: float = 180.0
    seed: int = 0


@dataclass(frozen=True)
class Cycle:
    """One turn of serving and learning."""

    num_requests: int
    """So far, those of this cycle included."""
    draft_version: int
    """That served in this cycle."""
    num_accepted: int
    num_attempted: int
    """Of its greedy requests."""
    elapsed_s: float

    @property
    def acceptance_rate(self) -> float:
        return acceptance_rate(self.num_accepted, self.num_attempted)


@dataclass
class Adaptation:
    """What came of it; `adapter` is None as long as no candidate passed the gate."""

    adapter: Adapter | None = None
    history: list[Cycle] = field(default_factory=list)
    learner_s: float = 0.0
    """Seconds of its thread."""


def adapt(
    pair: ModelPair,
    prompts: Iterator[list[int]],
    settings: LearnerSettings,
    recipe: Recipe,
    on_cycle: Callable[[Cycle], None] = lambda cycle: None,
) -> Adaptation:
    """Serve the prompts and learn from them, cycle after cycle. `pair` is float32 and is not changed."""
    store, feed, result = MemoryRecordStore(), MemoryAdapterFeed(), Adaptation()
    began_s = time.monotonic()
    room = recipe.prompt_tokens + recipe.max_tokens
    with (
        TemporaryDirectory() as folder,
        build_engine(
            pair,
            options=EngineOptions(
                num_slots=recipe.num_slots,
                max_seq_len=room,
                num_draft_tokens=recipe.num_draft_tokens,
                speculation=recipe.speculation,
                prefix_cache_mib=0,
            ),
        ) as engine,
    ):
        engine.seed(recipe.seed)
        learner = Learner(
            _trainable(pair, settings),
            store,
            feed,
            settings.model_copy(update={"checkpoint_folder": folder}),
            target_revision=pair.target_revision,
        )
        recorder = Recorder(
            {"replay": RecordPlace(_Sink(store), ttl_s=24 * 3600.0)},
            target_revision=pair.target_revision,
            replica_id="benchmark",
            capture_rate=1.0,
        )
        num_requests = 0
        while num_requests < recipe.num_requests and time.monotonic() - began_s < recipe.time_limit_s:
            version = engine.draft_version
            generations = _serve(engine, prompts, recipe, num_requests)
            num_requests += len(generations)
            for generation in generations:
                recorder.record(generation, "replay")
            learning_s = time.thread_time()
            learner.run_cycle()
            result.learner_s += time.thread_time() - learning_s
            result.adapter = _follow(engine, feed)
            counts = _greedy_counts(generations)
            result.history.append(Cycle(num_requests, version, *counts, time.monotonic() - began_s))
            on_cycle(result.history[-1])
    return result


def adapter_for(
    pair: ModelPair,
    folder: Path | None,
    cache: Path,
    settings: LearnerSettings,
    on_cycle: Callable[[Cycle], None] = lambda cycle: None,
    recipe: Recipe | None = None,
) -> Adapter | None:
    """The one in `folder`, or else learnt from the demo's traffic with these settings."""
    if folder is not None:
        return Adapter.load(folder)
    return adapted_to_the_demo(pair, cache, settings, recipe or Recipe(), on_cycle)


def adapted_to_the_demo(
    pair: ModelPair,
    cache: Path,
    settings: LearnerSettings,
    recipe: Recipe,
    on_cycle: Callable[[Cycle], None] = lambda cycle: None,
) -> Adapter | None:
    """Learnt from the demo's training prompts, once for each pair and settings: kept in `cache`, unless
    time ran out before the last request."""
    folder = cache / "adapters" / _key(pair, settings, recipe)
    if (folder / WEIGHTS_FILE).exists():
        return Adapter.load(folder)
    prompts = demo_prompts(pair.tokenizer, recipe.prompt_tokens, split="train")
    adaptation = adapt(pair, prompts, settings, recipe, on_cycle)
    if adaptation.adapter is not None and adaptation.history[-1].num_requests >= recipe.num_requests:
        adaptation.adapter.save(folder)
        history = [asdict(cycle) for cycle in adaptation.history]
        (folder / "history.json").write_text(json.dumps(history, indent=1), encoding="utf-8")
    return adaptation.adapter


class _Sink:
    """Straight into the store: nobody waits here."""

    def __init__(self, store: MemoryRecordStore) -> None:
        self._store = store

    def submit(
        self, key: StreamKey, record: GenerationRecord | Callable[[], GenerationRecord], num_bytes: int, /
    ) -> None:
        self._store.append(key, [record() if callable(record) else record])


def _trainable(pair: ModelPair, settings: LearnerSettings) -> TrainableDraft:
    assert pair.draft is not None
    own = copy.deepcopy(pair.draft).float()  # learning changes its base in place
    return build_draft(own, settings, draft_id=pair.draft_id, draft_revision=pair.draft_revision)


def _serve(engine: LocalEngine, prompts: Iterator[list[int]], recipe: Recipe, first: int) -> list[Generation]:
    warm_every = round(1 / recipe.sampled_share) if recipe.sampled_share else 0
    handles = [
        engine.submit(
            GenerationRequest(
                f"request-{number}",
                tuple(prompt),
                SamplingParams(
                    temperature=1.0 if warm_every and number % warm_every == 0 else 0.0,
                    max_tokens=recipe.max_tokens,
                ),
                capture=True,
            )
        )
        for number, prompt in enumerate(islice(prompts, recipe.requests_per_cycle), start=first)
    ]
    return [handle.result() for handle in handles]


def _follow(engine: LocalEngine, feed: MemoryAdapterFeed) -> Adapter | None:
    """Make what the feed points to serve."""
    drafts = engine.drafts
    assert drafts is not None
    manifest = feed.latest(DEFAULT_ROUTE)
    if manifest is None:
        if engine.draft_version:
            drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, None))
        return None
    weights = feed.weights(DEFAULT_ROUTE, manifest.draft_version)
    if engine.draft_version != manifest.draft_version:
        drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, manifest, weights))
    return Adapter(weights, manifest.adapter_config_json)


def _greedy_counts(generations: list[Generation]) -> tuple[int, int]:
    """(accepted, attempted) draft tokens."""
    greedy = [generation for generation in generations if generation.sampling.mode == "greedy"]
    return (
        sum(generation.num_accepted for generation in greedy),
        sum(generation.num_attempted for generation in greedy),
    )


def _key(pair: ModelPair, settings: LearnerSettings, recipe: Recipe) -> str:
    parts: list[Any] = [pair.target_revision, pair.draft_revision, settings.model_dump(), asdict(recipe)]
    return sha256_of(json.dumps(parts, sort_keys=True).encode())[:24]
