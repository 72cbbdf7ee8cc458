"""The map before the head is found in closed form, kept, and lets a part agree with its target more."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from deploy.commands.demo import PAIR
from serving.models.loading import load_model, load_pair
from serving.models.part_fit import NUM_TEXTS, fit_map, generic_texts
from serving.models.target_part import TargetPart, map_of
from tests.support.tiny_models import save_tiny_pair, tiny_model


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "everdraft" / "parts"


def test_a_linear_relation_is_recovered() -> None:
    torch.manual_seed(0)
    target = tiny_model("llama", 3, 64).eval().requires_grad_(False)
    part = TargetPart(2).build(target)
    scale = torch.rand(32) + 0.5
    target.model.norm.weight.data.mul_(scale)
    texts = torch.randint(64, (12, 40)).tolist()
    found = fit_map(part, target, texts)
    assert torch.allclose(found, scale.diag(), atol=0.02)


def test_the_last_exit_needs_no_map() -> None:
    target = tiny_model("llama", 3, 64).eval().requires_grad_(False)
    found = fit_map(TargetPart(2).build(target), target, torch.randint(64, (6, 20)).tolist())
    assert torch.equal(found, torch.eye(32))


def test_generic_texts_are_the_same_every_time_and_not_all_code() -> None:
    texts = generic_texts()
    assert texts == generic_texts() and len(set(texts)) == NUM_TEXTS
    assert sum("import " in text for text in texts) < NUM_TEXTS * 0.8


def test_a_start_is_fitted_once_and_kept(
    own_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target, _ = save_tiny_pair(tmp_path)
    with caplog.at_level(logging.INFO, logger="serving.models.part_fit"):
        first = map_of(load_pair(target, "self:1").draft or nn.Module()).weight
        again = map_of(load_pair(target, "self:1").draft or nn.Module()).weight
    assert torch.equal(first, again) and not torch.equal(first, torch.eye(32))
    assert sum("was fitted in" in line for line in caplog.messages) == 1
    [kept] = own_cache.glob("*.safetensors")
    kept.write_bytes(b"no tensors")
    assert torch.equal(map_of(load_pair(target, "self:1").draft or nn.Module()).weight, first)
    assert kept.stat().st_size > 1000


def test_a_target_without_a_tokenizer_starts_from_its_own_layers(own_cache: Path, tmp_path: Path) -> None:
    tiny_model("llama", 3, 64).save_pretrained(tmp_path / "bare")
    pair = load_pair(str(tmp_path / "bare"), "self:1")
    assert pair.draft is not None and torch.equal(map_of(pair.draft).weight, torch.eye(32))


def test_the_fit_makes_a_part_agree_more_often_on_texts_left_out() -> None:
    """A trained target. Where the texts of the fit are unlike the traffic, it may help less, or nothing."""
    target = load_model(str(PAIR / "target"))
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    part = TargetPart(1).build(target)
    texts = [tokenizer.encode(text)[:128] for text in generic_texts(36)]

    def agreement() -> float:
        hits = [
            (part(input_ids=ids).logits.argmax(-1) == target(input_ids=ids).logits.argmax(-1)).float()
            for ids in (torch.tensor([text]) for text in texts[::3])
        ]
        return float(torch.cat(hits, dim=1).mean())

    with torch.no_grad():
        before = agreement()
        used = [text for number, text in enumerate(texts) if number % 3]
        map_of(part).weight.copy_(fit_map(part, target, used))
        assert agreement() > before + 0.03
