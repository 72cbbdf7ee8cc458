"""A part of the target is the target's own first layers, a block of its own, and the target's head."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from learner.draft import TrainableDraft, export_weights
from serving.models.adapter import AdapterRejectedError
from serving.models.draft_weights import DraftWeights
from serving.models.errors import UnsupportedModelError
from serving.models.full_weights import full_config
from serving.models.inspection import inspect_pair
from serving.models.loading import load_pair
from serving.models.target_part import NoUpdate, TargetPart, own_copy, own_parameters
from tests.support.staging import stage
from tests.support.tiny_models import save_tiny_pair

ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 8}),
}
PARTS = [TargetPart(exit_layer, block) for exit_layer in (0, 1, 3) for block in ("whole", "attention")]


def target_of(arch: str, *, tied: bool = False, num_layers: int = 4) -> nn.Module:
    model_class, config_class, more = ARCHITECTURES[arch]
    config = config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
        **more,
    )
    torch.manual_seed(0)
    model: nn.Module = model_class(config)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def expected_logits(target: nn.Module, part: TargetPart, token_ids_BT: Tensor) -> Tensor:
    """By the target's own layers, one after another."""
    if part.block == "attention":
        target = copy.deepcopy(target)
        target.model.layers[part.exit_layer].mlp = NoUpdate()
    states: list[Tensor] = []
    handle = target.model.layers[part.exit_layer].register_forward_hook(
        lambda *given: states.append(given[2])
    )
    target(input_ids=token_ids_BT, use_cache=False)
    handle.remove()
    found = states[0][0] if isinstance(states[0], tuple) else states[0]
    logits: Tensor = target.lm_head(target.model.norm(found))
    return logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_part_computes_what_the_targets_layers_compute(arch: str, tied: bool) -> None:
    target, token_ids_BT = target_of(arch, tied=tied), torch.arange(24).view(2, 12)
    for part in PARTS:
        module = part.build(target)
        got = module(input_ids=token_ids_BT, use_cache=False).logits
        assert torch.equal(got, expected_logits(target, part, token_ids_BT)), part


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_only_the_block_and_the_norm_are_a_parts_own(arch: str) -> None:
    target = target_of(arch, tied=True)
    theirs = {id(weight) for weight in target.parameters()}
    for part in PARTS:
        module = part.build(target)
        own = own_parameters(module)
        assert all(name.startswith((f"model.layers.{part.exit_layer}.", "model.norm.")) for name in own)
        assert {id(weight) for weight in module.parameters()} - theirs == {id(one) for one in own.values()}
        assert any("mlp" in name for name in own) == (part.block == "whole")
        assert TargetPart.of(module) == part and TargetPart.of(target) is None
        assert not any(weight.requires_grad for weight in module.parameters())
        assert target.config.num_hidden_layers == 4


def test_a_copy_shares_what_the_part_shares() -> None:
    target = target_of("llama", tied=True)
    part = TargetPart(2).build(target)
    copied = own_copy(part)
    assert copied.lm_head is target.lm_head and copied.model.layers[1] is target.model.layers[1]
    own, theirs = own_parameters(part), own_parameters(copied)
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert {id(one) for one in own.values()}.isdisjoint(id(one) for one in theirs.values())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("self", TargetPart(2)),
        ("self:4", TargetPart(4)),
        ("self:1:attention", TargetPart(1, "attention")),
        ("self:0:whole", TargetPart(0)),
        ("selfish", None),
        ("models/self:2", None),
        (None, None),
    ],
)
def test_names_of_parts(name: str | None, part: TargetPart | None) -> None:
    assert TargetPart.named(name) == part
    assert part is None or TargetPart.named(str(part)) == part


@pytest.mark.parametrize("name", ["self:two", "self:-1", "self:1:mlp", "self:1:whole:2:3"])
def test_names_that_are_none_say_what_is_one(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"`self:E`") as raised:
        TargetPart.named(name)
    assert repr(name) in str(raised.value)


def test_a_part_that_the_target_does_not_have_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    target, _ = save_tiny_pair(tmp_path)
    with pytest.raises(UnsupportedModelError, match="the target has 3 layers, so E must be below 3"):
        inspect_pair(target, "self:3")
    assert inspect_pair(target, "self:2").part == TargetPart(2)


def test_every_part_of_every_target_has_a_revision_of_its_own(tmp_path: Path) -> None:
    target, _ = save_tiny_pair(tmp_path / "one")
    other, _ = save_tiny_pair(tmp_path / "other", seed=5)
    names = ["self:0", "self:1", "self:1:attention"]
    revisions = {load_pair(each, name).draft_revision for each in (target, other) for name in names}
    assert len(revisions) == 6
    assert load_pair(target, "self:1").draft_revision in revisions


@pytest.fixture
def serving() -> DraftWeights:
    return DraftWeights(
        TargetPart(2).build(target_of("llama")), draft_revision="part-1", target_revision="target-1"
    )


def learner_of(part: TargetPart, trainable: str = "full") -> TrainableDraft:
    return TrainableDraft(
        part.build(target_of("llama")),
        draft_id=str(part),
        draft_revision="part-1",
        rank=2,
        alpha=4.0,
        trainable=trainable,  # type: ignore[arg-type]
    )


def changed(draft: TrainableDraft) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        key: weight + 0.1 * torch.randn(weight.shape, generator=generator)
        for key, weight in draft.state().items()
    }


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_what_a_learner_exports_serves_and_leaves_the_target_alone(
    serving: DraftWeights, trainable: str
) -> None:
    learner = learner_of(TargetPart(2), trainable)
    state = {key: weight.to(learner.export_dtype) for key, weight in changed(learner).items()}
    shared = {
        name: weight.clone()
        for name, weight in serving.module.named_parameters()
        if name not in own_parameters(serving.module)
    }
    stage(serving, export_weights(state), learner.config_json)
    tokens_BT = torch.arange(12)[None]
    inner = learner._model if trainable == "full" else learner._model.base_model.model
    with learner.with_weights(state):
        expected = inner(input_ids=tokens_BT, use_cache=False).logits
    with torch.no_grad():
        got = serving.module(input_ids=tokens_BT, use_cache=False).logits
    assert torch.allclose(got, expected, atol=1e-4)
    served = dict(serving.module.named_parameters())
    assert all(torch.equal(served[name], weight) for name, weight in shared.items())
    serving.stage_floor().apply()
    floor = TargetPart(2).build(target_of("llama"))
    assert all(torch.equal(served[name], weight) for name, weight in floor.named_parameters())


def test_a_block_travels_in_half_the_bytes() -> None:
    draft = learner_of(TargetPart(2))
    assert draft.export_dtype == torch.bfloat16
    assert draft.num_parameters == sum(one.numel() for one in own_parameters(draft._model).values())


@pytest.mark.parametrize("other", [TargetPart(1), TargetPart(2, "attention"), TargetPart(3)])
def test_a_block_of_another_part_is_refused(serving: DraftWeights, other: TargetPart) -> None:
    draft = learner_of(other)
    with pytest.raises(AdapterRejectedError, match=f"weights of {other}.*drafts with self:2"):
        stage(serving, export_weights(draft.state()), draft.config_json)


def test_a_whole_draft_models_weights_are_refused(serving: DraftWeights) -> None:
    weights = export_weights({name: one.detach() for name, one in serving.module.named_parameters()})
    with pytest.raises(AdapterRejectedError, match="a whole draft model"):
        stage(serving, weights, full_config(None))


def test_lora_on_what_the_target_owns_is_refused(serving: DraftWeights) -> None:
    base = TargetPart(2).build(target_of("llama"))
    learner = TrainableDraft(
        base, draft_id="x", draft_revision="part-1", rank=2, alpha=4.0, target_modules=("q_proj",)
    )
    before = serving.module.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(AdapterRejectedError, match=r"layers\.0\.self_attn.*shares with the target"):
        stage(serving, export_weights(changed(learner)), learner.config_json)
    assert torch.equal(serving.module.model.layers[0].self_attn.q_proj.weight, before)
