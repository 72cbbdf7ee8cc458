"""A GGUF file as the target of a service: converted once, a folder from then on."""

from pathlib import Path

import pytest

from deploy.errors import ModelPairError
from deploy.gguf_target import with_converted_target
from deploy.settings import Settings
from serving.models.loading import load_pair
from serving.settings import ServingSettings
from tests.support.tiny_gguf import save_gguf
from tests.support.tiny_models import save_tiny_pair


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def settings(target: Path) -> Settings:
    return Settings(serving=ServingSettings(target=str(target)))


def test_it_is_converted_once_and_every_engine_gets_the_folder(tmp_path: Path) -> None:
    file, said = tmp_path / "tiny.gguf", list[str]()
    save_gguf(save_tiny_pair(tmp_path / "pair")[0], file)
    found = with_converted_target(settings(file), said.append)
    assert load_pair(found.serving.target).vocab_size == 320
    again = with_converted_target(settings(file), said.append)
    assert again.serving.target == found.serving.target and len(said) == 1


def test_what_is_no_such_file_stays_as_it_is(tmp_path: Path) -> None:
    given = settings(tmp_path)
    assert with_converted_target(given, print) is given


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelPairError, match=r"broken\.gguf.*cannot be converted"):
        with_converted_target(settings(tmp_path / "broken.gguf"), print)
