"""A part of the target learns its block from records without hidden states, and serves what it learnt."""

import json
import math

import pytest
import torch
from safetensors.torch import load
from torch import nn

from buffer.memory_store import MemoryAdapterFeed
from buffer.names import DEFAULT_ROUTE
from buffer.records import GenerationRecord, ServingStatus
from learner.distill import Objective, weighted_loss
from learner.draft import TrainableDraft, build_draft, export_weights
from learner.incumbent import Incumbent
from learner.trainer import Trainer
from serving.adapter_watcher import AdapterWatcher
from serving.engine import SamplingParams
from serving.local import load_engine
from serving.models.loading import ModelPair, load_pair
from serving.models.target_part import own_parameters
from serving.options import EngineOptions
from tests.support.record_factory import GREEDY, RecordFactory
from tests.support.tiny_learner import quick_settings
from tests.support.tiny_models import save_tiny_pair

PART = "self:1"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))[0]


@pytest.fixture
def pair(target: str) -> ModelPair:
    return load_pair(target, PART)


@pytest.fixture(scope="module")
def records(target: str) -> list[GenerationRecord]:
    pair = load_pair(target, PART)
    assert pair.draft is not None
    factory = RecordFactory(pair.target, pair.draft, target_revision=pair.target_revision)
    return factory.records(24, GREEDY, max_tokens=10, prompts=[[n, n + 1, 7] for n in range(24)])


def part_draft(pair: ModelPair, **changes: object) -> TrainableDraft:
    assert pair.draft is not None
    settings = quick_settings(**changes)
    return build_draft(pair.draft, settings, draft_id=PART, draft_revision=pair.draft_revision)


def acceptance(trainer: Trainer, records: list[GenerationRecord]) -> float:
    scores = [score for score in trainer.score(trainer.candidate, records) if score is not None]
    return sum(score.acceptance for score in scores) / len(scores)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def test_the_block_learns_and_nothing_of_the_target_changes(
    pair: ModelPair, records: list[GenerationRecord]
) -> None:
    before = weights_of(pair.target)
    draft = part_draft(pair, learning_rate=3e-3)
    trainer = Trainer(draft, quick_settings(learning_rate=3e-3))
    at_first = acceptance(trainer, records)
    for _ in range(4):
        trainer.train(records, [], rest=lambda _: True)
    assert acceptance(trainer, records) > at_first + 0.1
    assert {name.split(".")[2] for name in draft.parameters if "layers" in name} == {"1"}
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(pair.target).items())


def test_what_is_judged_is_what_travels_and_serves(pair: ModelPair, records: list[GenerationRecord]) -> None:
    draft = part_draft(pair)
    trainer = Trainer(draft, quick_settings())
    trainer.train(records, [], rest=lambda _: True)
    exported = load(export_weights(trainer.candidate))
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}
    assert all(torch.equal(weight, trainer.candidate[name]) for name, weight in exported.items())
    assert trainer.trained["model.norm.norm.weight"].dtype == torch.float32
    assert json.loads(draft.config_json) == {"everdraft": "part", "part": "self:1", "target_modules": None}


def test_lora_on_the_block_learns_too_and_is_smaller(
    pair: ModelPair, records: list[GenerationRecord]
) -> None:
    assert pair.draft is not None
    num_weights = sum(weight.numel() for weight in own_parameters(pair.draft).values())
    draft = part_draft(pair, trainable="lora", lora_rank=2, lora_alpha=4.0)
    trainer = Trainer(draft, quick_settings())
    at_first = acceptance(trainer, records)
    for _ in range(4):
        trainer.train(records, [], rest=lambda _: True)
    assert acceptance(trainer, records) > at_first
    assert "model.norm.map" in draft.target_modules
    assert all(".layers.1." in name for name in draft.target_modules if name != "model.norm.map")
    assert draft.num_parameters < num_weights


@pytest.mark.parametrize(("part", "trainable"), [(PART, None), (PART, "lora"), ("self:1:200", None)])
def test_an_engine_swaps_the_learnt_block_in_and_says_the_same_text(
    target: str, records: list[GenerationRecord], part: str, trainable: str | None
) -> None:
    pair = load_pair(target, part)
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    options = EngineOptions(num_slots=2, max_seq_len=64, num_draft_tokens=3, speculation="model")
    draft = part_draft(pair, trainable=trainable, learning_rate=3e-3)
    trainer = Trainer(draft, quick_settings(learning_rate=3e-3))
    for _ in range(4):
        trainer.train(records, [], rest=lambda _: True)
    with load_engine(target, part, options) as engine:
        prompts = [list(record.prompt_token_ids) for record in records[:4]]
        before = engine.generate(prompts, greedy)
        shared = weights_of(engine.pair.target)
        feed = MemoryAdapterFeed()
        incumbent = Incumbent(
            feed, draft, route=DEFAULT_ROUTE, target_revision=engine.pair.target_revision, now_s=lambda: 0.0
        )
        incumbent.publish(trainer.candidate, {}, 0, "")
        watcher = AdapterWatcher(
            engine.drafts,
            feed,
            replica_id="r0",
            status=lambda: ServingStatus("r0", 0, {}, ()),
            watch_interval_s=1.0,
            status_interval_s=1.0,
        )
        watcher.follow_all()
        assert engine.draft_version == 1 and not watcher.last_error
        after = engine.generate(prompts, greedy)
        assert [one.output_token_ids for one in after] == [one.output_token_ids for one in before]
        assert sum(one.num_accepted for one in after) > sum(one.num_accepted for one in before)
        assert all(
            torch.equal(shared[name], weight) for name, weight in weights_of(engine.pair.target).items()
        )
        feed.rollback(DEFAULT_ROUTE, "a test")
        watcher.follow_all()
        assert engine.draft_version == 0
        again = engine.generate(prompts, greedy)
        assert [one.num_accepted for one in again] == [one.num_accepted for one in before]


# -- a head over the tokens that traffic uses -------------------------------------------------------


KEPT_PART = "self:1:40"


@pytest.fixture
def kept_pair(target: str) -> ModelPair:
    return load_pair(target, KEPT_PART)


def used(records: list[GenerationRecord]) -> set[int]:
    return {token for record in records for token in record.output_token_ids.tolist()}


def test_the_head_keeps_what_traffic_uses_and_learns_on_it(
    kept_pair: ModelPair, records: list[GenerationRecord]
) -> None:
    """The start keeps tokens of generic text, which this random target hardly says."""
    few = records[:3]
    draft = part_draft(kept_pair, learning_rate=3e-3)
    trainer = Trainer(draft, quick_settings(learning_rate=3e-3))
    at_first = acceptance(trainer, few)
    trainer.train(few, [], rest=lambda _: True)
    kept = set(trainer.candidate["lm_head.token_ids"].tolist())
    assert len(used(few)) <= 40 == len(kept) and used(few) <= kept
    for _ in range(6):
        report = trainer.train(few, [], rest=lambda _: True)
        assert not report.num_skipped
    assert acceptance(trainer, few) > at_first + 0.1
    assert load(export_weights(trainer.candidate))["lm_head.token_ids"].dtype == torch.int64


def test_a_restored_trainer_chooses_the_same_tokens(
    target: str, kept_pair: ModelPair, records: list[GenerationRecord]
) -> None:
    first = Trainer(part_draft(kept_pair), quick_settings())
    first.train(records[:12], [], rest=lambda _: True)
    second = Trainer(part_draft(load_pair(target, KEPT_PART)), quick_settings())
    second.restore(first.trained, first.optimizer_state(), first.rng.bit_generator.state, first.num_steps)
    for trainer in (first, second):
        trainer.train(records[12:], [], rest=lambda _: True)
    assert first.candidate.keys() == second.candidate.keys()
    assert all(torch.equal(first.candidate[key], second.candidate[key]) for key in first.candidate)


def test_tokens_outside_the_head_are_no_part_of_what_is_learnt(
    kept_pair: ModelPair, records: list[GenerationRecord]
) -> None:
    """Against the sum over single positions, in probabilities."""
    draft = part_draft(kept_pair)
    [batch] = Trainer(draft, quick_settings(max_tokens_per_pass=10_000)).batches(records[:2])
    objective = Objective(greedy_temperature=1.0)
    logits_NV = draft.logits(batch)
    got = weighted_loss(batch, logits_NV, objective)
    kept = set(draft.state()["lm_head.token_ids"].tolist())
    expected, num_outside = 0.0, 0
    for index in range(batch.num_positions):
        target = {
            int(token): math.exp(logprob)
            for token, logprob in zip(
                batch.topk_token_ids_NK[index], batch.topk_logprobs_NK[index].tolist(), strict=True
            )
        }
        tail = max(1.0 - sum(target.values()), 1e-6)
        probs_V = logits_NV[index].detach().softmax(-1)
        inside = {token: prob for token, prob in target.items() if token in kept}
        num_outside += len(target) - len(inside)
        covered = sum(inside.values()) + tail
        own_tail = max(1.0 - sum(float(probs_V[token]) for token in inside), 1e-6)
        expected += sum(
            prob * math.log(prob / covered / float(probs_V[token])) for token, prob in inside.items()
        ) + tail * math.log(tail / covered / own_tail)
    assert num_outside > 0
    assert float(got.detach()) == pytest.approx(expected, rel=1e-3)
    got.backward()
    assert all(bool(torch.isfinite(weight.grad).all()) for weight in draft.parameters.values())
