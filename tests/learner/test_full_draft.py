"""Full fine-tuning: the draft's own weights learn, travel and serve, exactly and whole."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from buffer.memory_store import MemoryAdapterFeed
from buffer.names import DEFAULT_ROUTE
from buffer.records import GenerationRecord, RecordSampling, ServingStatus
from learner.draft import TrainableDraft, build_draft, export_weights
from learner.incumbent import Incumbent
from learner.settings import LearnerSettings
from learner.trainer import Trainer
from serving.adapter_watcher import AdapterWatcher
from serving.engine import SamplingParams
from serving.local import load_engine
from serving.models.adapter import AdapterRejectedError
from serving.models.draft_weights import DraftWeights
from serving.models.loading import load_draft
from serving.options import EngineOptions
from tests.support.record_factory import GREEDY, RecordFactory
from tests.support.staging import stage
from tests.support.tiny_learner import quick_settings, tiny_draft, tiny_pair
from tests.support.tiny_models import save_tiny_pair


def full_draft(base: LlamaForCausalLM | None = None, **changes: object) -> TrainableDraft:
    settings = quick_settings(trainable="full", **changes)
    return build_draft(base or tiny_pair()[1], settings, draft_id="tiny", draft_revision="draft-1")


def tied_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    return model.eval().requires_grad_(False)


def published(draft: TrainableDraft) -> tuple[MemoryAdapterFeed, bytes, str]:
    """Under version 1, by the learner's own hand: (feed, weights, adapter_config_json)."""
    feed = MemoryAdapterFeed()
    incumbent = Incumbent(feed, draft, route=DEFAULT_ROUTE, target_revision="target-1", now_s=lambda: 0.0)
    incumbent.publish(draft.state(), {}, 0, "")
    manifest = feed.manifest(DEFAULT_ROUTE, 1)
    assert (manifest.rank, manifest.alpha) == (0, 0.0)
    return feed, feed.weights(DEFAULT_ROUTE, 1), manifest.adapter_config_json


def serving_weights(base: LlamaForCausalLM) -> DraftWeights:
    return DraftWeights(base, draft_revision="draft-1", target_revision="target-1")


@pytest.fixture(scope="module")
def records() -> list[GenerationRecord]:
    return RecordFactory(*tiny_pair()).records(8, RecordSampling(temperature=0.8), max_tokens=6)


@pytest.fixture
def trained(records: list[GenerationRecord]) -> TrainableDraft:
    draft = full_draft()
    Trainer(draft, quick_settings()).step(records)
    return draft


def test_every_weight_of_the_draft_learns(trained: TrainableDraft) -> None:
    base = tiny_pair()[1]
    before, after = dict(base.named_parameters()), trained.state()
    assert after.keys() == before.keys()
    assert trained.num_parameters == sum(weight.numel() for weight in before.values())
    unchanged = [name for name, weight in before.items() if torch.equal(weight, after[name])]
    assert unchanged == []


def test_only_the_named_modules_learn_where_some_are_named(records: list[GenerationRecord]) -> None:
    draft = full_draft(target_modules=("q_proj", "lm_head"))
    Trainer(draft, quick_settings()).step(records)
    assert set(draft.state()) == {"lm_head.weight", "model.layers.0.self_attn.q_proj.weight"}
    base = tiny_pair()[1]
    serving = serving_weights(base)
    stage(serving, export_weights(draft.state()), draft.config_json)
    floor = dict(base.named_parameters())
    for name, weight in serving.module.named_parameters():
        assert torch.equal(weight, draft.state().get(name, floor[name])), name


def test_a_name_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would learn"):
        full_draft(target_modules=("qq_proj",))


def test_the_floor_and_what_was_worn_come_back_bit_for_bit(trained: TrainableDraft) -> None:
    own = trained.state()
    with trained.with_weights(None):
        floor = trained.state()
    assert all(torch.equal(floor[name], weight) for name, weight in tiny_pair()[1].named_parameters())
    assert all(torch.equal(own[name], weight) for name, weight in trained.state().items())
    assert trained.fault({"other": own["lm_head.weight"]}).startswith("keys differ")


def test_tied_weights_learn_once_travel_once_and_serve_in_both_places(
    records: list[GenerationRecord],
) -> None:
    base = tied_model()
    draft = full_draft(copy.deepcopy(base), target_modules=("lm_head",))
    Trainer(draft, quick_settings()).step(records)
    assert draft.num_parameters == 32 * 16
    serving = serving_weights(base)
    _, weights, config = published(draft)
    assert list(load(weights)) == ["model.embed_tokens.weight"]
    stage(serving, weights, config)
    learnt = draft.state()["model.embed_tokens.weight"]
    assert not torch.equal(learnt, base.lm_head.weight)
    assert torch.equal(serving.module.lm_head.weight, learnt)
    assert torch.equal(serving.module.model.embed_tokens.weight, learnt)


def test_what_was_published_is_what_serves_and_the_floor_returns(trained: TrainableDraft) -> None:
    base = tiny_pair()[1]
    serving = serving_weights(base)
    _, weights, config = published(trained)
    stage(serving, weights, config)
    state = trained.state()
    assert all(torch.equal(weight, state[name]) for name, weight in serving.module.named_parameters())
    serving.stage_floor().apply()
    floor = dict(base.named_parameters())
    assert all(torch.equal(weight, floor[name]) for name, weight in serving.module.named_parameters())


def test_an_engine_drafts_with_exactly_the_published_weights_and_says_the_same_text(tmp_path: Path) -> None:
    target, draft_folder = save_tiny_pair(tmp_path)
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    with load_engine(
        target, draft_folder, options=EngineOptions(num_slots=2, max_seq_len=64, num_draft_tokens=3)
    ) as engine:
        pair = engine.pair
        before = engine.generate([[5, 6, 7]], greedy)[0]
        draft = build_draft(
            load_draft(draft_folder),
            quick_settings(trainable="full"),
            draft_id=draft_folder,
            draft_revision=pair.draft_revision,
        )
        factory = RecordFactory(pair.target, load_draft(draft_folder))
        Trainer(draft, quick_settings()).step(factory.records(4, GREEDY, max_tokens=6))
        feed = MemoryAdapterFeed()
        incumbent = Incumbent(
            feed, draft, route=DEFAULT_ROUTE, target_revision=pair.target_revision, now_s=lambda: 0.0
        )
        incumbent.publish(draft.state(), {}, 0, "")
        watcher = AdapterWatcher(
            engine.drafts,
            feed,
            replica_id="r0",
            status=lambda: ServingStatus("r0", 0, {}, ()),
            watch_interval_s=1.0,
            status_interval_s=1.0,
        )
        watcher.follow()
        after = engine.generate([[5, 6, 7]], greedy)[0]
        assert engine.drafts is not None
        live = dict(engine.drafts.default.module.named_parameters())
        assert all(torch.equal(live[name], weight) for name, weight in draft.state().items())
    assert engine.draft_version == 1
    assert after.output_token_ids == before.output_token_ids


def test_a_resumed_learner_reads_its_full_incumbent_back(trained: TrainableDraft) -> None:
    feed, _, _ = published(trained)
    again = Incumbent(feed, full_draft(), route=DEFAULT_ROUTE, target_revision="target-1", now_s=lambda: 0.0)
    assert again.sync()
    assert again.state is not None
    assert all(torch.equal(again.state[name], weight) for name, weight in trained.state().items())


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def foreign(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(64, 32)


def misshapen(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()


def poisoned(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][0] = torch.nan


def integral(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].long()


def emptied(tensors: dict[str, Tensor]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (missing, r"\['model.norm.weight'\] are missing"),
        (foreign, r"layers\.7.* are none"),
        (misshapen, "'lm_head.weight' has shape"),
        (poisoned, "'model.norm.weight' has values that are not finite"),
        (integral, "int64"),
        (emptied, "are missing"),
    ],
)
def test_full_weights_that_do_not_fit_are_refused_whole(
    trained: TrainableDraft, edit: Callable[[dict[str, Tensor]], None], reason: str
) -> None:
    tensors = load(export_weights(trained.state()))
    edit(tensors)
    refused(save(tensors), trained.config_json, reason)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"target_modules": ["q_proj"]}, "that target_modules="),
        ({"target_modules": ["nowhere"]}, "disagree"),
        ({"target_modules": "q_proj"}, "no module names"),
        ({"everdraft": "half"}, "unusable"),
    ],
)
def test_a_config_that_does_not_say_what_the_weights_are_is_refused(
    trained: TrainableDraft, config: dict[str, object], reason: str
) -> None:
    text = json.dumps(json.loads(trained.config_json) | config)
    refused(export_weights(trained.state()), text, reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sha256": "0" * 64}, "corrupted"),
        ({"draft_revision": "draft-2"}, "draft_revision"),
        ({"target_revision": "target-2"}, "target_revision"),
    ],
)
def test_full_weights_of_another_draft_or_target_are_refused(
    trained: TrainableDraft, changes: dict[str, str], reason: str
) -> None:
    refused(export_weights(trained.state()), trained.config_json, reason, **changes)


def test_a_weight_too_large_for_the_dtype_that_serves_is_refused(trained: TrainableDraft) -> None:
    state = {name: weight.clone() for name, weight in trained.state().items()}
    state["model.norm.weight"][0] = 1e6
    half = serving_weights(tiny_pair()[1].half())
    with pytest.raises(AdapterRejectedError, match=r"not finite as torch\.float16"):
        stage(half, export_weights(state), trained.config_json)


def refused(weights: bytes, config: str, reason: str, **changes: str) -> None:
    """With its reason, and nothing of it serves."""
    base = tiny_pair()[1]
    serving = serving_weights(base)
    with pytest.raises(AdapterRejectedError, match=reason):
        stage(serving, weights, config, **changes)
    floor = dict(base.named_parameters())
    assert all(torch.equal(weight, floor[name]) for name, weight in serving.module.named_parameters())


def test_the_settings_choose_what_learns() -> None:
    lora = build_draft(tiny_pair()[1], LearnerSettings(), draft_id="tiny", draft_revision="draft-1")
    assert all("lora_" in name for name in lora.parameters)
    assert not any("lora_" in name for name in full_draft().parameters)


def test_a_full_draft_wears_a_lora_incumbent_exactly_as_it_serves(records: list[GenerationRecord]) -> None:
    lora = tiny_draft()
    Trainer(lora, quick_settings()).step(records)
    feed = MemoryAdapterFeed()
    incumbent = Incumbent(feed, lora, route=DEFAULT_ROUTE, target_revision="target-1", now_s=lambda: 0.0)
    manifest = incumbent.publish(lora.state(), {}, 0, "")
    heir = full_draft()
    follower = Incumbent(feed, heir, route=DEFAULT_ROUTE, target_revision="target-1", now_s=lambda: 0.0)
    assert follower.sync() and not follower.unreadable
    assert follower.state is not None
    serving = serving_weights(tiny_pair()[1])
    stage(serving, feed.weights(DEFAULT_ROUTE, 1), manifest.adapter_config_json)
    served = dict(serving.module.named_parameters())
    assert all(torch.equal(weight, served[name]) for name, weight in follower.state.items())
