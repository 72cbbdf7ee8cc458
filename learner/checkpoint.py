"""A route's whole training state in one file, written atomically, so that a killed learner can resume.

A checkpoint is a safetensors file: tensors as tensors, everything else as JSON in its header; no pickle.
Its name carries the sha256 of its bytes, so a torn or corrupt file is recognised and the one before it
is used. Knows no store. Invariant: after `write` returns, the state survives loss of power.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from buffer.records import AdapterManifest


class CheckpointError(OSError):
    """A checkpoint could not be written, as on a full disk; the files of before are as they were."""


KEPT_FILES = 2
_NAMED_BY = 16
"""A target's folder is named by so many digits of its revision."""
_SCHEMA = "1"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that a resumed learner needs and cannot read from elsewhere."""

    adapter: Mapping[str, Tensor]
    """The trainable weights as trained; the candidate is their running mean, which `optimizer` holds."""
    optimizer: Mapping[str, Tensor]
    """Tensors by `<moment>.<key>`, see `optimizer_state`."""
    generator_state: Mapping[str, Any]
    """State of the numpy generator of draws and bootstraps."""
    num_steps: int = 0
    num_records_seen: int = 0
    last_version: int = 0
    """Greatest draft_version ever published; versions never restart, even if the feed does."""
    acked_entry_ids: Mapping[str, list[str]] = field(default_factory=dict)
    """Entries that this state has used, by route. If they are delivered again after a crash, they are
    acknowledged and not trained on again."""
    incumbent_manifest: AdapterManifest | None = None
    incumbent_weights: bytes = b""
    mlflow_run_id: str = ""
    schedule: Mapping[str, Any] = field(default_factory=dict)


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write, flush, rename, delete all but the last files. Returns the new file. Raises CheckpointError."""
    files = _files(folder)
    number = _number(files[-1]) + 1 if files else 1
    aside = folder / f"{number:010d}.part"
    tensors, header = _contents(checkpoint)
    with _written(aside):
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, aside, header)
        path = folder / f"{number:010d}-{_digest(aside)}.safetensors"
        _put_in_place(aside, path)
    for old in [*files[: len(files) + 1 - KEPT_FILES], *folder.glob("*.part")]:
        old.unlink(missing_ok=True)
    return path


def folder_of_target(folder: Path, target_revision: str) -> Path:
    """Folder of one target's learner state, because a state folder may hold several targets. Checkpoints that
    an earlier build left directly in `folder` are moved there, unless their draft was made for another
    target."""
    own = folder / f"target-{target_revision[:_NAMED_BY]}"
    if _files(folder):
        latest = read_latest(folder)
        manifest = latest.incumbent_manifest if latest else None
        if manifest is None or manifest.target_revision == target_revision:
            own.mkdir(exist_ok=True)
            for path in [
                *folder.glob("routes*"),
                *_files(folder),
            ]:  # if killed here, the next start moves the rest
                path.rename(own / path.name)
    return own


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file atomically, even across a loss of power. Raises CheckpointError."""
    aside = path.with_suffix(".part")
    with _written(aside):
        aside.write_bytes(data)
        _put_in_place(aside, path)


def read_latest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint; None where there is none."""
    for path in reversed(_files(folder)):
        if _digest(path) == path.stem.split("-")[1]:
            return _from_file(path)
    return None


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's live moments by `<moment>.<parameter key>`, on the CPU."""
    found: dict[str, Tensor] = {}
    for key, parameter in parameters.items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            found[f"{moment}.{key}"] = torch.as_tensor(value).detach().cpu()
    return found


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_state` took; parameters without moments start fresh."""
    optimizer.state.clear()
    for name, value in state.items():
        moment, key = name.split(".", 1)
        parameter = parameters[key]
        device = "cpu" if moment == "step" else parameter.device
        optimizer.state[parameter][moment] = value.to(device).clone()


def _contents(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header."""
    tensors = {f"adapter.{key}": tensor for key, tensor in checkpoint.adapter.items()}
    tensors |= {f"optimizer.{key}": tensor for key, tensor in checkpoint.optimizer.items()}
    if checkpoint.incumbent_weights:
        tensors["incumbent"] = torch.frombuffer(bytearray(checkpoint.incumbent_weights), dtype=torch.uint8)
    manifest = checkpoint.incumbent_manifest
    plain = {
        "generator_state": checkpoint.generator_state,
        "num_steps": checkpoint.num_steps,
        "num_records_seen": checkpoint.num_records_seen,
        "last_version": checkpoint.last_version,
        "acked_entry_ids": checkpoint.acked_entry_ids,
        "incumbent_manifest": None if manifest is None else _manifest_fields(manifest),
        "mlflow_run_id": checkpoint.mlflow_run_id,
        "schedule": checkpoint.schedule,
    }
    return tensors, {"schema": _SCHEMA, "state": json.dumps(plain)}


def _from_file(path: Path) -> Checkpoint | None:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    if header.get("schema") != _SCHEMA:
        return None
    plain = json.loads(header["state"])
    if "pace" in plain:  # the key's name until version 0.2
        plain["schedule"] = plain.pop("pace")
    manifest = plain.pop("incumbent_manifest")
    weights = tensors.pop("incumbent", None)
    return Checkpoint(
        adapter={
            name.removeprefix("adapter."): t for name, t in tensors.items() if name.startswith("adapter.")
        },
        optimizer={
            name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")
        },
        incumbent_manifest=None if manifest is None else _manifest(manifest),
        incumbent_weights=b"" if weights is None else weights.numpy().tobytes(),
        **plain,
    )


def _manifest_fields(manifest: AdapterManifest) -> dict[str, Any]:
    return asdict(manifest) | {"evidence": dict(manifest.evidence)}


def _manifest(fields: dict[str, Any]) -> AdapterManifest:
    return AdapterManifest(**fields | {"target_modules": tuple(fields["target_modules"])})


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-*.safetensors"))


def _number(path: Path) -> int:
    return int(path.stem.split("-")[0])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


@contextmanager
def _written(aside: Path) -> Iterator[None]:
    """Half a file is not left: it would keep the space that the next one needs."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise CheckpointError(f"{aside.parent}: {error}; no checkpoint was written") from error


def _put_in_place(aside: Path, path: Path) -> None:
    """Rename a written file, which survives loss of power before its name does."""
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    aside.replace(path)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
