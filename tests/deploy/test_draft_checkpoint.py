"""`self` for an engine that loads drafts from files: written once, and only its last block learns."""

from pathlib import Path

import pytest

from deploy.draft_checkpoint import with_draft_checkpoint
from deploy.errors import ModelPairError
from deploy.settings import Settings
from learner.draft import build_draft
from serving.models.loading import load_draft, load_pair
from serving.settings import ServingSettings
from tests.support.tiny_models import save_tiny_pair


def settings(target: str, draft: str | None, engine: str = "vllm") -> Settings:
    return Settings(serving=ServingSettings(engine=engine, target=target, draft=draft))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_part_becomes_a_checkpoint_whose_last_block_learns(tmp_path: Path) -> None:
    target, _ = save_tiny_pair(tmp_path / "pair")
    said: list[str] = []
    found = with_draft_checkpoint(settings(target, "self:1"), said.append)
    folder = Path(found.serving.draft or "")
    assert load_pair(target, str(folder)).draft is not None
    draft = build_draft(load_draft(str(folder)), found.learner, draft_id="d", draft_revision="r")
    assert draft.parameters and all(".layers.1." in name for name in draft.parameters)
    written_at = (folder / "model.safetensors").stat().st_mtime_ns
    again = with_draft_checkpoint(settings(target, "self:1"), said.append)
    assert again.serving.draft == found.serving.draft and len(said) == 1
    assert (folder / "model.safetensors").stat().st_mtime_ns == written_at


@pytest.mark.parametrize(("draft", "engine"), [("self:1", "everdraft"), (None, "vllm"), ("a-model", "vllm")])
def test_all_else_stays_as_it_is(draft: str | None, engine: str) -> None:
    given = settings("a-target", draft, engine)
    assert with_draft_checkpoint(given, print) is given


def test_a_smaller_head_is_refused() -> None:
    with pytest.raises(ModelPairError, match="whole models over all tokens"):
        with_draft_checkpoint(settings("a-target", "self:1:64"), print)
