"""A GGUF file is converted once and loads from then on; what it says is what the model said."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from deploy.cli import app
from serving.models.errors import UnsupportedModelError
from serving.models.gguf_checkpoint import convert_gguf, converted_folder
from serving.models.loading import load_model, load_pair
from tests.support.tiny_gguf import save_gguf


@pytest.fixture
def file(tiny_pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    save_gguf(tiny_pair[0], path)
    return path


def test_it_names_the_command_and_loads_once_that_was_run(file: Path, tiny_pair: tuple[str, str]) -> None:
    with pytest.raises(UnsupportedModelError, match=f"everdraft convert {file}"):
        load_pair(str(file))
    done = CliRunner().invoke(app, ["convert", str(file)])
    assert done.exit_code == 0, done.output
    found, given = load_pair(str(file)), load_pair(tiny_pair[0])
    tokens = torch.tensor([[5, 6, 7, 300]])
    with torch.inference_mode():
        torch.testing.assert_close(found.target(tokens).logits, given.target(tokens).logits)
    assert found.eos_token_ids == given.eos_token_ids
    assert found.tokenizer is not None and given.tokenizer is not None
    assert found.tokenizer.chat_template == given.tokenizer.chat_template
    assert "already" in CliRunner().invoke(app, ["convert", str(file)]).output


def test_what_lies_in_the_folder_loads_by_itself(file: Path, tmp_path: Path) -> None:
    convert_gguf(file, tmp_path / "out")
    assert not hasattr(load_model(str(tmp_path / "out")).config, "quantization_config")
    with pytest.raises(FileExistsError, match="nothing was written"):
        convert_gguf(file, tmp_path / "out")


@pytest.mark.parametrize(("pre", "is_split"), [("smollm", True), ("default", False)])
def test_numbers_are_split_as_the_file_says(
    pre: str, is_split: bool, tiny_pair: tuple[str, str], tmp_path: Path
) -> None:
    save_gguf(tiny_pair[0], tmp_path / "tiny.gguf", pre)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    backend = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a  42")]
    assert (pieces[-2:] == ["4", "2"]) is is_split


def test_another_file_under_the_name_is_another_model(file: Path) -> None:
    before = converted_folder(file)
    file.write_bytes(file.read_bytes() + b"x")
    assert converted_folder(file) != before


def test_a_broken_file_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match="cannot be converted"):
        convert_gguf(tmp_path / "broken.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]
