"""The draft of a vLLM engine, on the default route: merged here, laid aside and swapped in its process.

vLLM holds one native draft an engine, so further routes are served by it. Invariant: a version serves only
after vLLM's process read its file whole under the sha256 that was written here.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.records import AdapterManifest
from serving.engine.draft_pool import BrokenDraftError
from serving.engine.stats import SwapReport
from serving.engines.async_llm.draft_files import write_draft
from serving.models.adapter import AdapterRejectedError, check_config, merge_adapter
from serving.models.draft_weights import check_made_for

_POLL_S = 0.005


@dataclass(frozen=True)
class StagedDraft:
    """A version's file, which vLLM's worker has read."""

    draft_version: int
    path: Path


class AsyncLLMDrafts:
    """See DraftPort. `call` runs a worker's method and waits for it; `swapped` is told of every swap."""

    max_route_drafts = 0

    def __init__(
        self,
        floor: nn.Module,
        folder: Path,
        *,
        draft_revision: str,
        target_revision: str,
        call: Callable[..., Any],
        swapped: Callable[[int, float], SwapReport],
    ) -> None:
        self._floor, self._draft_revision, self._target_revision = floor, draft_revision, target_revision
        self._folder, self._call, self._swapped = folder, call, swapped
        self._version = FLOOR_VERSION
        self.floor_path, self._floor_sha256 = self._write(FLOOR_VERSION, {})

    @property
    def routes(self) -> list[str]:
        return [DEFAULT_ROUTE]

    @property
    def versions(self) -> Mapping[str, int]:
        return {DEFAULT_ROUTE: self._version}

    def follow(self, wanted: Iterable[str]) -> None:
        """There is one draft, for all routes."""

    def stage(self, route: str, manifest: AdapterManifest | None, weights: bytes = b"") -> StagedDraft:
        """See DraftPort.stage."""
        version, path, sha256 = FLOOR_VERSION, self.floor_path, self._floor_sha256
        if manifest is not None:
            version = manifest.draft_version
            check_config(manifest.adapter_config_json, manifest.rank, manifest.alpha)
            check_made_for(
                version,
                draft_revision=(manifest.draft_revision, self._draft_revision),
                target_revision=(manifest.target_revision, self._target_revision),
            )
            merged = merge_adapter(self._floor, weights, manifest.adapter_config_json, manifest.sha256)
            path, sha256 = self._write(version, merged)
        try:
            self._call("everdraft_stage", str(path), sha256, version)
            while not all(self._call("everdraft_is_staged")):  # steps go on meanwhile
                time.sleep(_POLL_S)
        except Exception as error:
            raise AdapterRejectedError(f"draft_version={version}: vLLM did not take it: {error}") from error
        return StagedDraft(version, path)

    def swap(self, route: str, staged: StagedDraft) -> SwapReport:
        """See DraftPort.swap."""
        try:
            swap_s = max(self._call("everdraft_swap"))
        except Exception as error:
            self._version = min(self._call("everdraft_version"))
            raise BrokenDraftError(
                f"draft_version={staged.draft_version} was not swapped in: {error}"
            ) from error
        finally:
            if staged.path != self.floor_path:
                staged.path.unlink(missing_ok=True)
        self._version = staged.draft_version
        return self._swapped(staged.draft_version, swap_s)

    def close(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, version: int, merged: Mapping[str, Tensor]) -> tuple[Path, str]:
        return write_draft(self._folder, version, whole_draft(self._floor, merged))


@torch.inference_mode()
def whole_draft(floor: nn.Module, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights by checkpoint name, each once: a tied head is its embedding and has no entry."""
    return {name: merged.get(name, weight) for name, weight in floor.named_parameters()}
