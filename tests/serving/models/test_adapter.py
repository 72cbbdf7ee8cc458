"""Adapters: merged as PEFT merges them, swapped whole, refused whole."""

import copy
import json
import warnings
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from serving.models.adapter import AdapterRejectedError, merge_adapter, sha256_of
from serving.models.draft_weights import DraftWeights
from tests.support.peft_adapters import random_adapter
from tests.support.tiny_models import tiny_model


@dataclass
class _Case:
    module: nn.Module
    weights: bytes
    config: str
    merged_by_peft: dict[str, Tensor]

    def store(self) -> DraftWeights:
        return DraftWeights(self.module, draft_revision="d" * 64, target_revision="t" * 64)


@pytest.fixture
def case() -> _Case:
    module = tiny_model("llama", 1, 64).eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights, config, peft_model = random_adapter(copy.deepcopy(module))
        merged = peft_model.merge_and_unload().state_dict()  # type: ignore[operator]
    return _Case(module, weights, config, merged)


def _stage(store: DraftWeights, weights: bytes, config: str, version: int = 1, **changes: str):  # type: ignore[no-untyped-def]
    fields = {"sha256": sha256_of(weights), "draft_revision": "d" * 64, "target_revision": "t" * 64} | changes
    return store.stage(weights, draft_version=version, adapter_config_json=config, **fields)


def test_merging_equals_pefts_own_merge(case: _Case) -> None:
    merged = merge_adapter(case.module, case.weights, case.config, sha256_of(case.weights))
    assert len(merged) == 9
    for name, weight in merged.items():
        assert torch.allclose(weight, case.merged_by_peft[name], atol=1e-6), name


def test_a_swap_keeps_addresses_and_the_floor_comes_back_bit_for_bit(case: _Case) -> None:
    store = case.store()
    live = store.module
    before = {name: weight.clone() for name, weight in live.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in live.parameters()]
    staged = _stage(store, case.weights, case.config)
    assert all(torch.equal(live.state_dict()[name], weight) for name, weight in before.items())
    staged.apply()
    assert not torch.equal(live.state_dict()["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(case.module.state_dict()["lm_head.weight"], before["lm_head.weight"])
    store.stage_floor().apply()
    assert all(torch.equal(live.state_dict()[name], weight) for name, weight in before.items())
    assert [parameter.data_ptr() for parameter in live.parameters()] == addresses


def test_a_copy_that_fails_midway_is_undone_by_the_floor(case: _Case) -> None:
    store = case.store()
    before = {name: weight.clone() for name, weight in store.module.state_dict().items()}
    staged = _stage(store, case.weights, case.config)
    broken = dict(staged.merged) | {"model.layers.0.self_attn.v_proj.weight": torch.ones(3, 3)}
    with pytest.raises(RuntimeError):
        store.copy_in(broken)
    store.stage_floor().apply()
    assert all(torch.equal(store.module.state_dict()[name], weight) for name, weight in before.items())


def test_a_narrower_adapter_after_a_wider_one_leaves_nothing_of_the_wider(case: _Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        narrow, config, peft_model = random_adapter(copy.deepcopy(case.module), modules=["q_proj"], seed=3)
        expected = peft_model.merge_and_unload().state_dict()  # type: ignore[operator]
    store = case.store()
    _stage(store, case.weights, case.config, 1).apply()
    _stage(store, narrow, config, 2).apply()
    for name, weight in store.module.state_dict().items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name


def _edited(weights: bytes, edit) -> bytes:  # type: ignore[no-untyped-def]
    tensors = load(weights)
    edit(tensors)
    return save(tensors)


def _nan(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[-1] = torch.nan


def _overflow(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.fill_(3e38)


def _shape(tensors: dict[str, Tensor]) -> None:
    key = sorted(tensors)[-1]
    tensors[key] = tensors[key][:, :-1].contiguous()


def _half(tensors: dict[str, Tensor]) -> None:
    tensors.pop(sorted(tensors)[0])


def _foreign(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"] = torch.ones(64, 4)


def _stray(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(32)


def _complex(tensors: dict[str, Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key] = tensors[key].to(torch.complex64)


def _module_gone(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "q_proj" in key]:
        tensors.pop(key)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_nan, "not finite"),
        (_overflow, "not finite"),
        (_shape, "rank 4 on this draft needs"),
        (_half, "lacks lora_A or lora_B"),
        (_foreign, r"layers\.7"),
        (_stray, "no LoRA weight"),
        (_module_gone, "q_proj"),
        (_complex, "complex64"),
    ],
)
def test_a_bad_adapter_is_refused_whole_with_its_reason(case: _Case, edit, reason: str) -> None:  # type: ignore[no-untyped-def]
    store, before = case.store(), copy.deepcopy(case.module.state_dict())
    weights = _edited(case.weights, edit)
    with pytest.raises(AdapterRejectedError, match=reason):
        _stage(store, weights, case.config)
    assert all(torch.equal(store.module.state_dict()[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sha256": "0" * 64}, "corrupted"),
        ({"draft_revision": "e" * 64}, "draft_revision"),
        ({"target_revision": "e" * 64}, "target_revision"),
    ],
)
def test_foreign_or_corrupt_bytes_are_refused(case: _Case, changes: dict[str, str], reason: str) -> None:
    with pytest.raises(AdapterRejectedError, match=reason):
        _stage(case.store(), case.weights, case.config, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 8}, "rank 8"),
        ({"r": 0}, "r=0"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": [3]}, "no module names"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    case: _Case, changes: dict[str, object], reason: str
) -> None:
    config = json.dumps(json.loads(case.config) | changes)
    with pytest.raises(AdapterRejectedError, match=reason):
        _stage(case.store(), case.weights, config)


@pytest.mark.parametrize("garbage", [b"", b"not safetensors", b"\x00" * 64])
def test_bytes_that_are_no_safetensors_are_refused(case: _Case, garbage: bytes) -> None:
    with pytest.raises(AdapterRejectedError, match=r"safetensors|no LoRA"):
        _stage(case.store(), garbage, case.config)
