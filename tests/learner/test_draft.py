"""The trainable draft: PEFT's own format, states in and out, faults named."""

import hashlib
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from learner.batch import collate
from learner.draft import TrainableDraft, export_weights, import_weights
from learner.rows import trajectory_row
from learner.trainable import adapted_module_names
from serving.models.draft_weights import DraftWeights
from tests.support.record_factory import GREEDY, RecordFactory
from tests.support.tiny_learner import MODULES, tiny_draft, tiny_pair


def trained_draft() -> TrainableDraft:
    """Every LoRA weight set to something, as training would."""
    draft = tiny_draft()
    generator = torch.Generator().manual_seed(0)
    draft.load({key: 0.1 * torch.randn(w.shape, generator=generator) for key, w in draft.state().items()})
    return draft


PROMPT = [3, 1, 4, 1, 5]


def next_token_logits(draft: TrainableDraft) -> torch.Tensor:
    """[V], after PROMPT."""
    row = trajectory_row(RecordFactory(*tiny_pair()).record(PROMPT, GREEDY, 1), 100)
    assert row is not None
    with torch.no_grad():
        return draft.logits(collate([row]))[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_peft_loads_an_exported_adapter_and_computes_the_same(tmp_path: Path) -> None:
    draft = trained_draft()
    (tmp_path / "adapter_model.safetensors").write_bytes(export_weights(draft.state()))
    (tmp_path / "adapter_config.json").write_text(draft.config_json)
    loaded = PeftModel.from_pretrained(tiny_pair()[1], str(tmp_path))
    with torch.no_grad():
        theirs = loaded(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(next_token_logits(draft), theirs, atol=1e-4, rtol=1e-4)


def test_serving_stages_an_exported_adapter_and_computes_the_same() -> None:
    draft, module = trained_draft(), tiny_pair()[1]
    weights = export_weights(draft.state())
    live = DraftWeights(module, draft_revision="d", target_revision="t")
    staged = live.stage(
        weights,
        draft_version=1,
        adapter_config_json=draft.config_json,
        sha256=hashlib.sha256(weights).hexdigest(),
        draft_revision="d",
        target_revision="t",
    )
    staged.apply()
    with torch.no_grad():
        theirs = live.module(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(next_token_logits(draft), theirs, atol=1e-4, rtol=1e-4)


def test_a_state_survives_export_and_import_bit_for_bit() -> None:
    state = trained_draft().state()
    found = import_weights(export_weights(state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    with pytest.raises(ValueError, match="no safetensors file"):
        import_weights(b"poison")


def test_wearing_another_state_leaves_no_trace() -> None:
    draft = trained_draft()
    before, own = draft.state(), next_token_logits(draft)
    with draft.with_weights(None):
        floor = next_token_logits(draft)
    assert torch.equal(next_token_logits(draft), own)
    assert not torch.allclose(floor, own)
    torch.testing.assert_close(floor, next_token_logits(tiny_draft()))
    assert all(torch.equal(before[key], value) for key, value in draft.state().items())


def test_a_state_with_faults_is_named_and_not_loaded() -> None:
    draft = trained_draft()
    key, weight = next(iter(draft.state().items()))
    poisons = {
        "keys differ": {"other": weight},
        "has shape": draft.state() | {key: weight[:1]},
        "not finite": draft.state() | {key: torch.full_like(weight, torch.nan)},
    }
    before = draft.state()
    for words, poison in poisons.items():
        assert words in draft.fault(poison)
        with pytest.raises(ValueError, match="nothing was loaded"):
            draft.load(poison)
    assert draft.fault(before) == ""
    assert all(torch.equal(before[name], value) for name, value in draft.state().items())


def test_by_default_everything_but_norms_learns_and_not_a_head_that_is_the_embedding() -> None:
    draft = tiny_pair()[1]
    assert set(adapted_module_names(draft)) == set(MODULES)
    draft.lm_head.weight = draft.get_input_embeddings().weight
    assert set(adapted_module_names(draft)) == set(MODULES) - {"embed_tokens", "lm_head"}


def test_the_same_seed_gives_the_same_start_whatever_was_drawn_before() -> None:
    first = tiny_draft(seed=3).state()
    torch.rand(7)
    second = tiny_draft(seed=3).state()
    assert all(torch.equal(first[key], value) for key, value in second.items())
    assert not all(torch.equal(first[key], value) for key, value in tiny_draft(seed=4).state().items())
