"""Draft files: whole, checked by sha256 and by shape, or refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.engines.async_llm.draft_files import Header, StagedFile, read_header, write_draft

TENSORS = {"a.weight": torch.randn(4, 3), "b.weight": torch.randn(2)}


def staged(folder: Path, tensors: dict[str, Tensor], like: Header, sha256: str | None = None) -> StagedFile:
    path, digest = write_draft(folder, 1, tensors)
    return StagedFile(str(path), sha256 or digest, 1, like)


@pytest.fixture
def floor(tmp_path: Path) -> Header:
    return read_header(write_draft(tmp_path, 0, TENSORS)[0])


def test_a_file_like_the_floor_is_read_whole(tmp_path: Path, floor: Header) -> None:
    other = {name: weight + 1 for name, weight in TENSORS.items()}
    found = staged(tmp_path, other, floor).result()
    assert all(torch.equal(found[name], weight) for name, weight in other.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"a.weight": t["a.weight"]}, "b.weight is absent"),
        (lambda t: {**t, "c.weight": torch.zeros(1)}, "c.weight"),
        (lambda t: {**t, "a.weight": torch.zeros(3, 4)}, "a.weight"),
        (lambda t: {**t, "a.weight": t["a.weight"].half()}, "a.weight"),
    ],
)
def test_another_models_file_is_refused_before_it_is_read(
    tmp_path: Path, floor: Header, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        staged(tmp_path, change(TENSORS), floor)


def test_another_sha256_is_refused(tmp_path: Path, floor: Header) -> None:
    with pytest.raises(ValueError, match="sha256"):
        staged(tmp_path, TENSORS, floor, sha256="0" * 64).result()


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_half_a_file_is_refused(tmp_path: Path, floor: Header, keep: int) -> None:
    path, digest = write_draft(tmp_path, 1, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="draft-1"):
        StagedFile(str(path), digest, 1, floor).result()
