"""A head over some tokens gives them the target's logits, and no other token any chance."""

import pytest
import torch
from torch import Tensor, nn

from buffer.records import AdapterManifest
from learner.draft import TrainableDraft, export_weights
from serving.engine import SamplingParams
from serving.engine.passes.runner import Runner
from serving.local import draft_runner, load_engine
from serving.memory_plan import ModelSize
from serving.models.adapter import AdapterRejectedError, sha256_of
from serving.models.draft_weights import DraftWeights
from serving.models.errors import UnsupportedModelError
from serving.models.inspection import inspect_pair
from serving.models.kept_head import KeptHead, count_tokens, kept_head, most_used
from serving.models.target_part import TargetPart, own_copy
from serving.options import EngineOptions
from serving.runner_check import prepare_runner
from tests.support.staging import stage
from tests.support.tiny_models import save_tiny_pair, tiny_model

PART = TargetPart(1, kept_tokens=20)
KEPT = torch.tensor([0, 1, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 63])
TEXT = torch.arange(24).view(2, 12)


def target_of(arch: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return tiny_model(arch, 3, 64).eval().requires_grad_(False)


def head_of(part: nn.Module) -> KeptHead:
    found = kept_head(part)
    assert found is not None
    return found[1]


def check_rows_are_their_tokens(part: nn.Module, token_ids_M: Tensor) -> None:
    """Against the same states before the whole head."""
    with torch.no_grad():
        got_BTV = part(input_ids=TEXT, use_cache=False).logits
        states_BTH = part.model(input_ids=TEXT, use_cache=False).last_hidden_state
        whole_BTV = head_of(part).whole(states_BTH)
    outside = torch.ones(64, dtype=torch.bool).index_fill(0, token_ids_M, False)
    assert torch.allclose(got_BTV[..., token_ids_M], whole_BTV[..., token_ids_M], atol=1e-5), "other words"
    assert bool((got_BTV[..., outside] == -torch.inf).all())


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_token_outside_has_no_chance_and_one_inside_its_own(arch: str) -> None:
    part = PART.build(target_of(arch))
    check_rows_are_their_tokens(part, torch.arange(20))
    head_of(part).keep(KEPT)
    check_rows_are_their_tokens(part, KEPT)


def test_rows_mapped_wrongly_are_caught() -> None:
    part = PART.build(target_of())
    head_of(part).keep(KEPT)
    head_of(part).weight.copy_(head_of(part).weight.roll(1, 0))
    with pytest.raises(AssertionError, match="other words"):
        check_rows_are_their_tokens(part, KEPT)


def test_a_copy_keeps_other_tokens_and_shares_the_whole_head() -> None:
    target = target_of()
    part = PART.build(target)
    copied = own_copy(part)
    head_of(copied).keep(KEPT)
    assert head_of(copied).whole is head_of(part).whole is target.lm_head
    assert head_of(part).token_ids.tolist() == list(range(20))
    check_rows_are_their_tokens(part, torch.arange(20))
    check_rows_are_their_tokens(copied, KEPT)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("self:2:20", TargetPart(2, kept_tokens=20)),
        ("self:1:attention:20", TargetPart(1, "attention", 20)),
    ],
)
def test_a_name_says_how_many_tokens_are_kept(name: str, part: TargetPart) -> None:
    assert TargetPart.named(name) == part
    assert str(part) == name
    assert TargetPart.of(part.build(target_of())) == part


@pytest.mark.parametrize("name", ["self:2:0", "self:2:-5", "self:2:20:attention", "self:2:x", "self:2:20:20"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="`self:E:M`"):
        TargetPart.named(name)


def test_a_head_over_all_tokens_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    target, _ = save_tiny_pair(tmp_path)
    with pytest.raises(UnsupportedModelError, match="M must be below 320"):
        inspect_pair(target, "self:1:320")


def test_the_plan_prices_rows_and_ids() -> None:
    target = target_of()
    whole, kept = ModelSize.of(TargetPart(1).build(target)), ModelSize.of(PART.build(target))
    width = target.config.hidden_size
    assert kept.weights_bytes - whole.weights_bytes == 20 * width * 4 + 20 * 8
    assert kept.vocab_size == whole.vocab_size == 64


def test_a_pass_over_the_slot_cache_is_checked_like_any() -> None:
    target = target_of()
    runner = Runner(target, num_slots=2, max_seq_len=32)
    prepare_runner(draft_runner(PART.build(target), runner), "self:1:20")


# -- which tokens -----------------------------------------------------------------------------------


def test_the_most_used_tokens_are_kept_and_of_equal_ones_the_lowest() -> None:
    counts_V = count_tokens([[7, 7, 7, 2], [2, 5]], 9)
    assert counts_V.tolist() == [0, 0, 2, 0, 0, 1, 0, 3, 0]
    assert most_used(counts_V, 3).tolist() == [2, 5, 7]
    assert most_used(counts_V, 5).tolist() == [0, 1, 2, 5, 7]


# -- in an adapter ----------------------------------------------------------------------------------


@pytest.fixture
def serving() -> DraftWeights:
    return DraftWeights(PART.build(target_of()), draft_revision="part-1", target_revision="target-1")


def learner() -> TrainableDraft:
    return TrainableDraft(
        PART.build(target_of()),
        draft_id=str(PART),
        draft_revision="part-1",
        rank=2,
        alpha=4.0,
        trainable="full",
    )


def test_kept_tokens_travel_and_the_floor_brings_its_own_back(serving: DraftWeights) -> None:
    draft = learner()
    draft.keep_tokens(torch.zeros(64).index_fill(0, KEPT, 3.0))
    state = draft.state()
    assert state["lm_head.token_ids"].tolist() == KEPT.tolist()
    stage(serving, export_weights(state), draft.config_json)
    check_rows_are_their_tokens(serving.module, KEPT)
    serving.stage_floor().apply()
    check_rows_are_their_tokens(serving.module, torch.arange(20))
    with draft.with_weights(None):
        assert draft.state()["lm_head.token_ids"].tolist() == list(range(20))
    assert draft.state()["lm_head.token_ids"].tolist() == KEPT.tolist()


def test_what_a_learner_reads_back_is_what_it_published_and_nothing_is_left_out() -> None:
    draft = learner()
    draft.keep_tokens(torch.zeros(64).index_fill(0, KEPT, 3.0))
    state, weights = draft.state(), export_weights(draft.state())
    manifest = AdapterManifest(
        route="default",
        draft_version=1,
        parent_version=0,
        draft_id=str(PART),
        draft_revision="part-1",
        target_revision="target-1",
        rank=0,
        alpha=0.0,
        target_modules=(),
        adapter_config_json=draft.config_json,
        sha256=sha256_of(weights),
        num_bytes=len(weights),
        created_at_s=0.0,
        mlflow_run_id="",
        evidence={},
        num_records_seen=0,
    )
    read = learner().read(weights, manifest)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)
    block_alone = TrainableDraft(
        PART.build(target_of()),
        draft_id=str(PART),
        draft_revision="part-1",
        rank=0,
        alpha=0.0,
        target_modules=("q_proj",),
        trainable="full",
    )
    with pytest.raises(ValueError, match="keys differ"):
        block_alone.read(weights, manifest)


def test_of_equally_used_tokens_those_that_are_kept_stay() -> None:
    draft = learner()
    draft.keep_tokens(torch.zeros(64).index_fill(0, KEPT, 3.0))
    draft.keep_tokens(torch.zeros(64))
    assert draft.state()["lm_head.token_ids"].tolist() == KEPT.tolist()


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (None, "no ids"),
        (KEPT[:-1], r"\(19,\) ids"),
        (KEPT.int(), "torch.int32"),
        (KEPT.flip(0), "not different ones in order"),
        (KEPT.clone().index_fill(0, torch.tensor([1]), 0), "not different ones in order"),
        (KEPT + 1, r"within 0\.\.63"),
        (KEPT - 1, r"within 0\.\.63"),
    ],
)
def test_other_ids_are_refused_and_nothing_changes(
    serving: DraftWeights, ids: Tensor | None, said: str
) -> None:
    draft = learner()
    state = draft.state() | {"lm_head.token_ids": ids}
    if ids is None:
        del state["lm_head.token_ids"]
    with pytest.raises(AdapterRejectedError, match=said):
        stage(serving, export_weights({key: state[key] for key in state}), draft.config_json)
    check_rows_are_their_tokens(serving.module, torch.arange(20))
    assert draft.fault(state)


def test_ids_where_weights_belong_are_refused(serving: DraftWeights) -> None:
    draft = learner()
    state = {key: tensor.long() if "norm.map" in key else tensor for key, tensor in draft.state().items()}
    with pytest.raises(AdapterRejectedError, match=r"norm\.map\.weight' holds torch.int64"):
        stage(serving, export_weights(state), draft.config_json)


# -- served -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_allows_no_kept_token_is_served_and_breaks_no_draft(
    tmp_path,
    temperature: float,  # type: ignore[no-untyped-def]
) -> None:
    target, _ = save_tiny_pair(tmp_path)
    options = EngineOptions(num_slots=2, max_seq_len=64, num_draft_tokens=3, speculation="model")
    with load_engine(target, "self:1:20", options) as engine:
        allowed = tuple(range(250, 300))
        strict = SamplingParams(
            temperature=temperature, max_tokens=8, allowed_token_ids=allowed, ignore_eos=True
        )
        [generation] = engine.generate([[1, 2, 3]], strict)
        assert set(generation.output_token_ids) <= set(allowed)
        assert not engine.stats().draft_disabled_reason
        [plain] = engine.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    with load_engine(target, None, EngineOptions(num_slots=2, max_seq_len=64)) as alone:
        [expected] = alone.generate(
            [[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        )
    assert plain.output_token_ids == expected.output_token_ids
