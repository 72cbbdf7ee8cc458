"""Finds a model's files on this machine and reads their headers. Reads no weights.

The hub is asked once, with a short timeout; if it cannot be reached, what was downloaded before is used.
Invariant: a file that is truncated, missing or only a placeholder is refused by its name.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor

from serving.models.errors import UnsupportedModelError, first_few, refusing
from serving.models.gguf_checkpoint import SUFFIX, converted_folder

CONFIG = "config.json"
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names of weight files, in the order in which transformers looks for them; an index names the files that
hold the tensors."""
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "spiece.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
_POINTER = b"version https://git-lfs"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class ModelFiles:
    """`name` as it was given; `source` is what transformers reads: a folder, or an id if the hub answered."""

    name: str
    source: str
    folder: Path
    """Folder with the files on this machine; for a hub id perhaps only the configuration."""

    @property
    def is_whole(self) -> bool:
        """Whether all files are on this machine."""
        return Path(self.source).is_dir()

    def config(self) -> dict[str, Any]:
        """The parsed config.json. Raises UnsupportedModelError if it is invalid."""
        return _read_json(self.name, self.folder / CONFIG)

    def has_tokenizer(self) -> bool:
        """True also if it may be on the hub. Raises UnsupportedModelError for pointer files in its place."""
        files = [self.folder / name for name in _TOKENIZER if (self.folder / name).is_file()]
        for file in files:
            _refuse_pointer(self.name, file)
        return bool(files) or not self.is_whole

    def outlined_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the weights' files, on the meta device; none where they are still on the hub.
        Raises UnsupportedModelError for files that cannot be what the folder says."""
        outlined: dict[str, Tensor] = {}
        for file in self._weight_files():
            _refuse_pointer(self.name, file)
            with refusing(self.name, f"cannot be loaded, {file.name} is cut short or no file of weights"):
                outlined.update(_safetensors(file) if file.suffix == ".safetensors" else _pickled(file))
        return outlined

    def tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """These tensors, as far as files of safetensors hold them. Raises UnsupportedModelError."""
        found: dict[str, Tensor] = {}
        for file in self._weight_files():
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    there = set(opened.keys()).intersection(names)
                    found |= {name: opened.get_tensor(name) for name in there}
        return found

    def _weight_files(self) -> list[Path]:
        weights_file = next((self.folder / name for name in _WEIGHTS if (self.folder / name).is_file()), None)
        if weights_file is None:
            if self.is_whole:
                raise UnsupportedModelError(
                    f"model {self.name!r} has none of {', '.join(_WEIGHTS)}, so there are no weights to load;"
                    f" {_contents(self.folder)}"
                )
            return []
        return [weights_file] if weights_file.suffix != ".json" else self._shards(weights_file)

    def _shards(self, index: Path) -> list[Path]:
        weight_map = _read_json(self.name, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UnsupportedModelError(
                f"model {self.name!r} has a {index.name} without weight_map, so its weights cannot be found"
            )
        names = {str(file) for file in weight_map.values()}
        absent = {file for file in names if not (self.folder / file).is_file()}
        if absent and self.is_whole:
            raise UnsupportedModelError(
                f"model {self.name!r} lacks {len(absent)} of the {len(names)} files that {index.name} names: "
                f"{first_few(absent)}; their tensors would be random numbers. Copy them too"
            )
        return [self.folder / file for file in sorted(names)] if not absent else []


def find_model(name: str) -> ModelFiles:
    """Find a model by path or hub id. Raises UnsupportedModelError at once if it is neither."""
    path = Path(name)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UnsupportedModelError(f"model {name!r} is a folder without {CONFIG}; {_contents(path)}")
        return ModelFiles(name, name, path)
    if path.suffix == SUFFIX and path.is_file():
        if (folder := converted_folder(path)).is_dir():
            return ModelFiles(name, str(folder), folder)
        raise UnsupportedModelError(
            f"model {name!r} is a GGUF file and was not converted yet: `everdraft convert {name}`, once"
        )
    if path.exists():
        raise UnsupportedModelError(f"model {name!r} is a file; give the folder with its {CONFIG}")
    if name.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(name):
        raise UnsupportedModelError(f"model {name!r} is no folder")
    return _from_hub(name)


def _from_hub(name: str) -> ModelFiles:
    """Asks the hub once before anything is fetched, because the hub's client would retry for half a
    minute."""
    with refusing(name, "is no folder here and no id of the hub"):
        cached = try_to_load_from_cache(name, CONFIG)
    try:
        with refusing(name, "is no folder here, was not downloaded before, and the hub does not give it"):
            get_hf_file_metadata(hf_hub_url(name, CONFIG), timeout=_HUB_TIMEOUT_S)
    except UnsupportedModelError:
        if not isinstance(cached, str):
            raise
        return ModelFiles(name, str(Path(cached).parent), Path(cached).parent)
    with refusing(name, f"has no {CONFIG} that could be downloaded"):
        return ModelFiles(name, name, Path(hf_hub_download(name, CONFIG)).parent)


def _contents(folder: Path) -> str:
    files = {file.name for file in folder.iterdir()}
    if not files:
        return "it is empty"
    if any(name.endswith(".gguf") for name in files):
        return f"it holds {first_few(files)}: give the path of one GGUF file, or the safetensors it came from"
    if "adapter_config.json" in files:
        return f"it holds {first_few(files)}: an adapter is no model, merge it into its base"
    return f"it holds {first_few(files)}"


def _refuse_pointer(name: str, file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) != _POINTER:
            return
    raise UnsupportedModelError(
        f"model {name!r} has only a pointer of git's large-file storage in place of {file.name}, so it "
        "cannot be loaded; fetch the files with 'git lfs pull'"
    )


def _read_json(name: str, file: Path) -> dict[str, Any]:
    _refuse_pointer(name, file)
    with refusing(name, f"cannot be loaded, its {file.name} is no JSON"):
        parsed = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(parsed, dict):
        raise UnsupportedModelError(f"model {name!r} cannot be loaded, its {file.name} is no JSON object")
    return parsed


def _safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Opening the file checks the header against the length of the file."""
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 (no mapping)
            yield key, torch.empty(opened.get_slice(key).get_shape(), device="meta")


def _pickled(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Never runs a pickle's code: torch refuses all but tensors and plain containers. Its message tells how
    to run it nevertheless, so it is replaced."""
    try:
        loaded = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it asks for {asked[1]}, and code is never run" if asked else str(error).partition(". This")[0]
        )
        raise ValueError(reason) from error
    return ((key, value) for key, value in loaded.items() if isinstance(value, Tensor))
