"""`self:auto` is settled once, before replicas and learner start."""

from pathlib import Path

import pytest

from buffer.redis_server import EmbeddedRedis
from deploy.errors import ModelPairError
from deploy.part_choice import as_if_chosen, with_chosen_part
from deploy.settings import Settings
from deploy.wiring import check_models
from tests.support.tiny_models import save_tiny_pair


def settings_of(target: str, draft: str | None) -> Settings:
    return Settings.model_validate({"serving": {"target": target, "draft": draft, "num_threads": 1}})


def test_one_part_is_named_and_all_are_told(tmp_path: Path) -> None:
    target, _ = save_tiny_pair(tmp_path)
    settings, told = settings_of(target, "self:auto"), list[str]()
    with EmbeddedRedis() as server:
        found = with_chosen_part(settings, server.url, told.append)
    assert found.serving.draft in {"self:0", "self:1", "self:2"}
    assert told[-1] == f"drafting with {found.serving.draft}"
    assert sum("acceptance" in line and "speed" in line for line in told) == 3
    check_models(found)


@pytest.mark.parametrize("draft", [None, "self", "self:1", "some/model"])
def test_a_draft_that_is_named_is_left_alone(draft: str | None) -> None:
    settings = settings_of("any", draft)
    assert with_chosen_part(settings, "redis://none", pytest.fail) is settings
    assert as_if_chosen(settings) is settings


def test_a_target_that_cannot_be_measured_is_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(ModelPairError, match=r"self:auto.*nothing was started: name a part, such as self:2"):
        with_chosen_part(settings_of(str(tmp_path), "self:auto"), "redis://127.0.0.1:1", lambda _: None)
