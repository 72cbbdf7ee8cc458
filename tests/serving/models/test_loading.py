"""Models that cannot work are refused before the first request, with the reason."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from serving.engine.passes.runner import Runner
from serving.models.loading import (
    UnsupportedModelError,
    check_attention,
    check_config,
    load_model,
    load_pair,
    weights_revision,
)
from serving.runner_check import prepare_runner
from tests.support.tiny_models import save_tiny_pair, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_pair_loads_with_its_tokenizer_stop_ids_and_revisions(arch: str, tmp_path: Path) -> None:
    target, draft = save_tiny_pair(tmp_path, arch=arch)
    pair = load_pair(target, draft)
    assert pair.eos_token_ids == (0,)
    assert pair.vocab_size == 320
    assert pair.target_revision == weights_revision(pair.target) != pair.draft_revision
    assert (
        pair.tokenizer is not None
        and pair.tokenizer.decode(pair.tokenizer.encode("naïve 東京")) == "naïve 東京"
    )
    again = load_pair(target, draft, dtype="bfloat16")
    assert next(again.target.parameters()).dtype.itemsize == 2


def test_recurrent_models_are_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        load_model(str(tmp_path))


def test_position_scaling_that_depends_on_batch_mates_is_refused(tmp_path: Path) -> None:
    config = tiny_model("llama", 1, 64).config
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModelError, match="rope_type='dynamic'"):
        check_config("m", config)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    target, _ = save_tiny_pair(tmp_path / "a")
    _, other = save_tiny_pair(tmp_path / "b", vocab_size=300)
    with pytest.raises(UnsupportedModelError, match="different vocabularies"):
        load_pair(target, other)


def test_other_words_of_the_same_number_are_refused(tmp_path: Path) -> None:
    target, draft = save_tiny_pair(tmp_path)
    renamed = (Path(draft) / "tokenizer.json").read_text().replace("<|system|>", "<|sistema|>")
    (Path(draft) / "tokenizer.json").write_text(renamed)
    with pytest.raises(UnsupportedModelError, match="not the same words"):
        load_pair(target, draft)


def test_without_tokenizers_sizes_decide(tmp_path: Path) -> None:
    tiny_model("llama", 2, 64).save_pretrained(tmp_path / "target")
    tiny_model("llama", 1, 64).save_pretrained(tmp_path / "draft")
    tiny_model("llama", 1, 65).save_pretrained(tmp_path / "other")
    assert load_pair(str(tmp_path / "target"), str(tmp_path / "draft")).tokenizer is None
    with pytest.raises(UnsupportedModelError, match="vocab_size=65"):
        load_pair(str(tmp_path / "target"), str(tmp_path / "other"))


def test_eager_attention_is_refused_by_name_and_by_what_it_computes(tmp_path: Path) -> None:
    target, _ = save_tiny_pair(tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").eval()
    with pytest.raises(UnsupportedModelError, match="'eager'"):
        check_attention(target, eager)
    with pytest.raises(UnsupportedModelError, match="differently through the slot cache"):
        prepare_runner(Runner(eager, num_slots=1, max_seq_len=64), target)
    prepare_runner(Runner(load_model(target), num_slots=1, max_seq_len=64), target)


def test_the_revision_is_of_values_not_of_the_dtype_that_holds_them(tmp_path: Path) -> None:
    import torch

    model = tiny_model("llama", 1, 64)
    rounded = model.to(torch.bfloat16)
    revision = weights_revision(rounded)
    assert weights_revision(rounded.float()) == revision
    next(rounded.parameters()).data[0, 0] += 1.0
    assert weights_revision(rounded) != revision


def test_the_tiny_tokenizer_has_the_size_it_was_asked_for() -> None:
    assert len(tiny_tokenizer(320)) == 320
