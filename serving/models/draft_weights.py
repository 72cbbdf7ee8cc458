"""The live weights of a draft: stage in separate tensors, swap in place, roll back, floor.

Staging validates and merges into fresh tensors, on the caller's thread. Applying copies every weight that
differs between two versions into place: addresses stay (captured graphs stay valid) and no round ever sees
weights of two versions. The floor, a copy of the draft as loaded, stays beside the live weights. What a part
of the target shares with it exists once, and is never written.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from buffer.names import FLOOR_VERSION
from serving.models.adapter import AdapterRejectedError, merge_adapter
from serving.models.target_part import own_copy, own_tensors


@dataclass(frozen=True, eq=False)
class StagedWeights:
    """One version, ready to be copied into place."""

    draft_version: int
    owner: "DraftWeights"
    merged: Mapping[str, Tensor]
    """Changed tensors by name; every other one is the floor's."""

    def apply(self) -> None:
        """Make this version live. Call only between two rounds, on the thread that runs them."""
        self.owner.copy_in(self.merged)


def check_made_for(draft_version: int, **revisions: tuple[str, str]) -> None:
    """By name: the revision that an adapter was made for, and the one that is served. Raises
    AdapterRejectedError."""
    for name, (theirs, ours) in revisions.items():
        if theirs != ours:
            raise AdapterRejectedError(
                f"adapter {draft_version} was made for {name}={theirs[:12]}…, this replica serves "
                f"{ours[:12]}…; it is another model's adapter"
            )
    if draft_version <= FLOOR_VERSION:
        raise AdapterRejectedError(f"draft_version={draft_version} is not positive; 0 is the floor")


class DraftWeights:
    """Owns the draft module that serves, and its floor."""

    def __init__(self, floor: nn.Module, *, draft_revision: str, target_revision: str) -> None:
        """`floor` is the draft as loaded; it is never changed."""
        self.draft_revision = draft_revision
        self.target_revision = target_revision
        self.module = own_copy(floor)
        """The module that serves."""
        self._floor_module = floor
        self._live = own_tensors(self.module)
        self._floor = own_tensors(self._floor_module)
        self._adapted: frozenset[str] = frozenset()

    def stage(
        self,
        weights: bytes,
        *,
        draft_version: int,
        adapter_config_json: str,
        sha256: str,
        draft_revision: str,
        target_revision: str,
    ) -> StagedWeights:
        """Validate and merge into new tensors. Raises AdapterRejectedError; the live weights are
        untouched."""
        check_made_for(
            draft_version,
            draft_revision=(draft_revision, self.draft_revision),
            target_revision=(target_revision, self.target_revision),
        )
        merged = merge_adapter(self._floor_module, weights, adapter_config_json, sha256)
        return StagedWeights(draft_version, self, merged)

    def stage_floor(self) -> StagedWeights:
        """The draft as loaded; costs nothing to stage."""
        return StagedWeights(FLOOR_VERSION, self, {})

    def floor_parameters(self) -> Mapping[str, Tensor]:
        """Parameters of the draft as loaded, by name."""
        return self._floor

    @torch.inference_mode()
    def copy_in(self, merged: Mapping[str, Tensor]) -> None:
        """Write `merged`, and the floor wherever only the last version differed from it."""
        names = sorted(self._adapted.union(merged))
        self._adapted = frozenset(names)  # of both versions, so that a failed copy can be undone
        if names:
            live: list[Tensor] = [self._live[name] for name in names]
            torch._foreach_copy_(live, [merged.get(name, self._floor[name]) for name in names])
        self._adapted = frozenset(merged)
