"""Whole drafts as safetensors files: floor and adapter merged, written for vLLM's worker and checked there.

Knows no vLLM. Invariant: a file is read whole and its sha256 and shapes agree with the floor's before any
tensor of it may serve.
"""

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor


def new_folder() -> Path:
    """For drafts and a socket, in memory where there is such a place; whoever made it deletes it."""
    shared = "/dev/shm"
    return Path(
        tempfile.mkdtemp(prefix="everdraft-vllm-", dir=shared if os.access(shared, os.W_OK) else None)
    )


Header = dict[str, tuple[str, tuple[int, ...]]]
"""name -> (dtype, shape)."""
_LENGTH_BYTES = 8


def write_draft(folder: Path, draft_version: int, tensors: Mapping[str, Tensor]) -> tuple[Path, str]:
    """The file and its sha256; appears whole or not at all."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    path = folder / f"draft-{draft_version}.safetensors"
    aside = path.with_suffix(".part")
    aside.write_bytes(data)
    aside.replace(path)
    return path, hashlib.sha256(data).hexdigest()


def read_header(path: str | os.PathLike[str]) -> Header:
    """Names, dtypes and shapes. Raises ValueError for a file that is no safetensors file."""
    with Path(path).open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if not 0 < length <= Path(path).stat().st_size:
            raise ValueError(f"{path} is no safetensors file; it was not staged")
        return _header(opened.read(length), path)


def _header(data: bytes, path: str | os.PathLike[str]) -> Header:
    try:
        parsed = json.loads(data)
        return {
            name: (entry["dtype"], tuple(entry["shape"]))
            for name, entry in parsed.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file ({error}); it was not staged") from None


class StagedFile:
    """A draft's file, being read on a thread of its own, so that no step waits for it."""

    def __init__(self, path: str, sha256: str, draft_version: int, like: Header) -> None:
        """`like`: the floor's header. Raises ValueError for a file under another folder's name or shape."""
        self.draft_version = draft_version
        self._path, self._sha256 = path, sha256
        _check_like(read_header(path), like, path)
        self._tensors: dict[str, Tensor] | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._read, name="everdraft-stage", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it was read, or failed to be."""
        return not self._thread.is_alive()

    def result(self) -> dict[str, Tensor]:
        """Raises ValueError for a file whose sha256 is another or that could not be read."""
        self._thread.join()
        if self._tensors is None:
            raise ValueError(f"draft_version={self.draft_version} was not swapped in: {self._error}")
        return self._tensors

    def _read(self) -> None:
        try:
            data = Path(self._path).read_bytes()
            found = hashlib.sha256(data).hexdigest()
            if found != self._sha256:
                raise ValueError(f"{self._path} has sha256 {found[:12]}…, not {self._sha256[:12]}…")
            self._tensors = load(data)
        except Exception as error:
            self._error = error


def _check_like(found: Header, like: Header, path: str) -> None:
    if found == like:
        return
    names = sorted(name for name in {*found, *like} if found.get(name) != like.get(name))
    name = names[0]
    raise ValueError(
        f"{path} is not like the draft that is loaded: {name} is {found.get(name, 'absent')} where it is "
        f"{like.get(name, 'absent')} ({len(names)} tensors differ); it was not staged"
    )
