"""A draft whose head is its embedding gets a head of its own on request, and then both learn."""

import pytest
import torch

from learner.draft import TrainableDraft, export_weights
from learner.trainable import adapted_module_names
from serving.engine import SamplingParams
from serving.local import load_engine
from serving.memory_plan import MemoryPlan
from serving.models.adapter import AdapterRejectedError
from serving.models.draft_weights import DraftWeights
from serving.models.loading import ModelPair, load_pair, untie
from serving.options import EngineOptions
from tests.support.staging import stage
from tests.support.tiny_models import save_tiny_pair, tiny_model, tiny_tokenizer

ENDS = {"lm_head", "embed_tokens"}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    target, _ = save_tiny_pair(folder)
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", 1, 320, tokenizer)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder / "tied")
    tokenizer.save_pretrained(folder / "tied")
    return target, str(folder / "tied")


def learner_of(pair: ModelPair) -> TrainableDraft:
    assert pair.draft is not None
    revision = pair.draft_revision
    return TrainableDraft(pair.draft, draft_id="tied", draft_revision=revision, rank=2, alpha=4.0)


def staged(pair: ModelPair, weights: bytes, config: str) -> DraftWeights:
    assert pair.draft is not None
    serving = DraftWeights(pair.draft, draft_revision=pair.draft_revision, target_revision="target-1")
    stage(serving, weights, config)
    return serving


def test_only_an_untied_draft_learns_at_both_ends(names: tuple[str, str]) -> None:
    tied, untied = load_pair(*names), load_pair(*names, untie_draft=True)
    assert ENDS.isdisjoint(adapted_module_names(tied.draft))
    assert set(adapted_module_names(untied.draft)) >= ENDS
    assert tied.draft_revision != untied.draft_revision
    tokens_BT = torch.arange(12)[None]
    assert tied.draft is not None and untied.draft is not None
    assert torch.equal(tied.draft(input_ids=tokens_BT).logits, untied.draft(input_ids=tokens_BT).logits)
    assert not untie(untied.draft), "there is nothing left to untie"


def test_what_both_ends_learnt_serves_and_a_tied_draft_refuses_it(names: tuple[str, str]) -> None:
    learner = learner_of(load_pair(*names, untie_draft=True))
    generator = torch.Generator().manual_seed(1)
    state = {
        key: weight + 0.1 * torch.randn(weight.shape, generator=generator)
        for key, weight in learner.state().items()
    }
    weights = export_weights(state)
    serving = staged(load_pair(*names, untie_draft=True), weights, learner.config_json)
    tokens_BT = torch.arange(12)[None]
    with learner.with_weights(state), torch.no_grad():
        expected = learner._model(input_ids=tokens_BT).logits
    with torch.no_grad():
        assert torch.allclose(serving.module(input_ids=tokens_BT).logits, expected, atol=1e-4)
    assert not torch.equal(serving.module.lm_head.weight, serving.module.model.embed_tokens.weight)
    with pytest.raises(AdapterRejectedError, match="ties to"):
        staged(load_pair(*names), weights, learner.config_json)


def test_the_plan_prices_the_second_head(names: tuple[str, str]) -> None:
    options = EngineOptions(num_slots=2, max_seq_len=64)
    pair = load_pair(*names, untie_draft=True)
    assert pair.draft is not None
    plans = [
        MemoryPlan.outlined(*names, options, dtype="float32", untie_draft=untied) for untied in (False, True)
    ]
    tied, untied = (plan.draft.weights_bytes for plan in plans if plan.draft is not None)
    assert untied - tied == pair.draft.lm_head.weight.numel() * 4
    loaded = MemoryPlan.of(pair, options).draft
    assert loaded is not None and loaded.weights_bytes == untied


def test_greedy_text_is_the_targets_own(names: tuple[str, str]) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    options = EngineOptions(num_slots=2, max_seq_len=64, num_draft_tokens=3, speculation="model")
    with load_engine(*names, options, untie_draft=True) as engine, load_engine(names[0]) as alone:
        prompts = [[1, 2, 3], [7, 8, 9, 10]]
        found = engine.generate(prompts, greedy)
        assert [one.output_token_ids for one in found] == [
            one.output_token_ids for one in alone.generate(prompts, greedy)
        ]
        assert sum(one.num_attempted for one in found) > 0
