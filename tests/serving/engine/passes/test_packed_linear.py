"""A target's large layers over packed weights: the same logits, never of weights that are gone."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from serving.engine import SamplingParams
from serving.engine.passes import packed_linear
from serving.engine.passes.packed_linear import ROWS, PackedLinear, has_packed, pack_linears, packable
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPass
from serving.local import build_engine
from serving.models.loading import load_pair
from serving.options import EngineOptions
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="packed products are oneDNN's"
)


@pytest.fixture(autouse=True)
def everything_is_packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However small, and whatever this machine measures."""
    monkeypatch.setattr(packed_linear, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(packed_linear, "_LEAST_GAIN", 0.0)
    yield


def model() -> Any:
    torch.manual_seed(0)
    return tiny_model("llama", 2, 64).eval().requires_grad_(False)


@torch.inference_mode()
def logits(module: Any, num_tokens: int) -> torch.Tensor:
    found: torch.Tensor = module(input_ids=torch.arange(num_tokens)[None] % 64).logits
    return found


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 9, 64, 65])
def test_logits_are_the_same_whatever_the_length(num_tokens: int) -> None:
    plain, packed = model(), model()
    names, weights = list(packed.state_dict()), len(packable(packed))
    assert pack_linears(packed) == sum(layer.weight.nbytes for layer in packable(plain)) > 0
    assert weights == sum(isinstance(module, PackedLinear) for module in packed.modules())
    assert has_packed(packed) and not has_packed(plain) and list(packed.state_dict()) == names
    torch.testing.assert_close(logits(packed, num_tokens), logits(plain, num_tokens), atol=1e-4, rtol=1e-4)
    assert pack_linears(packed) == 0, "once"


def test_changed_or_copied_weights_are_those_that_count() -> None:
    plain, packed = model(), model()
    pack_linears(packed)
    copied = copy.deepcopy(packed)
    for changed in (packed, copied, plain):
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(1.5)
    expected = logits(plain, 9)
    torch.testing.assert_close(logits(packed, 9), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(copied, 9), expected, atol=1e-4, rtol=1e-4)


def test_without_that_check_old_weights_would_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    plain, packed = model(), model()
    pack_linears(packed)
    monkeypatch.setattr(packed_linear._Packed, "is_of", lambda self, weight: True)
    for changed in (packed, plain):
        with torch.no_grad():
            changed.lm_head.weight.mul_(1.5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits(packed, 9), logits(plain, 9), atol=1e-4, rtol=1e-4)


def test_a_product_that_is_another_one_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_linear._product
    monkeypatch.setattr(packed_linear, "_product", lambda *given: right(*given) + 0.1)
    monkeypatch.setattr(packed_linear, "_LEAST_GAIN", 0.01)
    assert pack_linears(model()) == 0


def test_layers_that_learn_halves_and_special_ones_stay() -> None:
    class Special(nn.Linear):
        pass

    assert (
        packable(nn.ModuleList([Special(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16), nn.Embedding(8, 8)]))
        == []
    )
    assert len(packable(nn.ModuleList([nn.Linear(8, 8, bias=True)]))) == 1


def test_compiled_code_is_passed_over_for_the_rows_that_it_slows_down() -> None:
    runner, called = Runner(model(), num_slots=2, max_seq_len=80), list[int]()
    slot_pass = SlotPass(runner.model, 80)

    def compiled(token_ids_BT: torch.Tensor, *others: Any) -> torch.Tensor:
        called.append(token_ids_BT.numel())
        logits_BEV: torch.Tensor = slot_pass(token_ids_BT, *others)
        return logits_BEV

    runner.slower_rows = ROWS
    runner.compiled = compiled
    for num_tokens in (1, 3, 4, 64, 65):
        runner.prefill(0, [7] * num_tokens, 0)
    assert called == [1, 3, 65]


def test_the_engine_s_text_is_the_model_s_own(tiny_pair: tuple[str, str]) -> None:
    """Verification passes of five tokens go over packed weights; greedy text is what transformers says."""
    pair = load_pair(*tiny_pair)
    prompts = [[5, 6, 7, 8], [9, 10], [3] * 7]
    plain = load_pair(*tiny_pair).target
    with build_engine(
        pair, EngineOptions(num_slots=3, max_seq_len=96, num_draft_tokens=4, speculation="model")
    ) as engine:
        assert has_packed(pair.target) and pair.draft is not None and not has_packed(pair.draft)
        told = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    for prompt, generation in zip(prompts, told, strict=True):
        expected: Any = plain.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False
        )
        assert list(generation.output_token_ids) == expected[0, len(prompt) :].tolist()
