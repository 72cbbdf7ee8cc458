"""An adapter on its way into a draft's live weights, as the watcher puts it there."""

from serving.models.adapter import sha256_of
from serving.models.draft_weights import DraftWeights


def stage(serving: DraftWeights, weights: bytes, config: str, **changes: str) -> None:
    """Make these weights live as version 1. `changes`: of the hash or the revisions, which otherwise fit."""
    fields = {
        "sha256": sha256_of(weights),
        "draft_revision": serving.draft_revision,
        "target_revision": serving.target_revision,
    }
    serving.stage(weights, draft_version=1, adapter_config_json=config, **fields | changes).apply()
