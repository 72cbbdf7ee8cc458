"""What a learner is planned to hold: counted from shapes, as the draft that is built counts it."""

from typing import Any

import pytest
import torch

from deploy.learner_plan import LearnerPlan, num_trainable
from deploy.learning import with_own_memory
from learner.draft import build_draft
from learner.settings import LOGITS_COPIES, LearnerSettings
from learner.trainer import Trainer
from serving.models.loading import load_outline, load_pair
from serving.models.target_part import TargetPart
from tests.support.tiny_learner import quick_settings
from tests.support.tiny_models import save_tiny_pair, tiny_model

DRAFTS: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("", {"target_modules": ("q_proj", "lm_head"), "lora_rank": 4}),
    ("", {"trainable": "full"}),
    ("", {"trainable": "full", "target_modules": ("q_proj", "norm")}),
    ("self:1", {}),
    ("self:1:attention:16", {}),
    ("self:1", {"trainable": "lora"}),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize(("part", "changes"), DRAFTS)
def test_an_outline_s_weights_that_learn_are_those_of_the_draft(
    pair: tuple[str, str], part: str, changes: dict[str, Any]
) -> None:
    target, draft = pair
    settings = quick_settings(**changes)
    loaded = load_pair(target, part or draft)
    assert loaded.draft is not None
    outline = load_outline(draft)
    if (named := TargetPart.named(part)) is not None:
        outline = named.build(load_outline(target))
    plan = LearnerPlan.outlined(outline, settings, max_record_tokens=64, num_routes=0)
    weights = sum(weight.numel() * 4 for weight in loaded.draft.parameters())
    built = build_draft(loaded.draft, settings, draft_id="d", draft_revision="r")
    assert plan.num_trainable == built.num_parameters > 0
    assert plan.weights_bytes == weights
    assert plan.export_bytes == built.export_dtype.itemsize
    assert plan.vocab_size == built.vocab_size
    assert plan.token_bytes > 0


def test_the_parts_add_up_and_routes_are_planned_where_they_were_asked_for(pair: tuple[str, str]) -> None:
    outline = load_outline(pair[1])
    none, two = (
        LearnerPlan.outlined(outline, LearnerSettings(), max_record_tokens=64, num_routes=count)
        for count in (0, 2)
    )
    assert (
        sum(part.num_bytes for part in two.parts()) - sum(part.num_bytes for part in none.parts())
        == 2 * none.route_bytes
    )
    moments = 4 * 4 * none.num_trainable
    assert none.route_bytes == moments + 4 * none.export_bytes * none.num_trainable


def test_a_pass_holds_no_more_logits_than_were_allowed(pair: tuple[str, str]) -> None:
    settings = LearnerSettings(max_logits_mib_per_pass=3.0)
    bytes_each = 4 * LOGITS_COPIES * 500
    assert settings.positions_per_pass(500) == 3 * 2**20 // bytes_each
    assert settings.positions_per_pass(10**9) == 1, "one position is always taken"
    loaded = load_pair(*pair)
    assert loaded.draft is not None
    assert num_trainable(loaded.draft, settings, "full") == sum(
        weight.numel() for weight in loaded.draft.parameters()
    )


def test_a_trainer_holds_what_is_planned_of_a_route(pair: tuple[str, str]) -> None:
    """The moments and the mean are what a checkpoint takes; no more copies are alive."""
    loaded = load_pair(*pair)
    assert loaded.draft is not None
    trainer = Trainer(
        build_draft(loaded.draft, quick_settings(), draft_id="d", draft_revision="r"), quick_settings()
    )
    for parameter in trainer.draft.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    trainer._optimizer.step()
    trainer._follow()
    moments = trainer.optimizer_state()
    held = sum(value.numel() for name, value in moments.items() if not name.startswith("step."))
    assert held == 3 * trainer.draft.num_parameters
    live = trainer._optimizer.state[next(iter(trainer.draft.parameters.values()))]["exp_avg"]
    assert any(value.data_ptr() == live.data_ptr() for value in moments.values()), "nothing was copied"


def test_weights_of_their_own_are_the_same_and_tied_ones_stay_tied(pair: tuple[str, str]) -> None:
    """A part of the target as loaded is windows on the target's file."""
    loaded = load_pair(pair[0], "self:1")
    part: Any = loaded.draft
    before = {name: (value.data_ptr(), value.clone()) for name, value in part.state_dict().items()}
    own: Any = with_own_memory(part)
    assert all(torch.equal(value, before[name][1]) for name, value in own.state_dict().items())
    assert all(value.data_ptr() != before[name][0] for name, value in own.state_dict().items())
    tied: Any = tiny_model("llama", 1, 32)
    tied.lm_head.weight = tied.get_input_embeddings().weight
    again: Any = with_own_memory(tied)
    assert again.lm_head.weight is again.get_input_embeddings().weight
