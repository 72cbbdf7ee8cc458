"""Builds the learner of the pair that is served, in whatever process it shall run; knows no Ray.

Invariant: the learner's draft has the very weights that the replicas serve, rounding included, or its
adapters would be refused.
"""

import re
from functools import partial
from pathlib import PurePath

from torch import nn

from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_store import RedisRecordStore
from buffer.store import RecordStore
from buffer.two_stores import TwoStores
from learner.draft import build_draft
from learner.loop import Learner
from learner.settings import LearnerSettings
from learner.tracking.mlflow_tracker import MlflowTracker, NullTracker, Tracker
from serving.free_memory import free_memory
from serving.models.loading import load_pair
from serving.settings import ServingSettings

_MAX_READABLE = 40


def build_learner(
    serving: ServingSettings, learner: LearnerSettings, redis_url: str, memory_url: str | None = None
) -> Learner:
    """Load the pair, make its draft trainable. `memory_url`: of records of capture mode `memory`. Raises
    UnsupportedModelError.

    The target is needed only for its revision; its weights are let go at once.
    """
    pair = load_pair(
        serving.target,
        serving.draft,
        device=serving.device,
        dtype=serving.dtype,
        untie_draft=serving.untie_draft,
    )
    assert pair.draft is not None, "a learner is wired only where there is a draft"
    draft = build_draft(
        with_own_memory(pair.draft.float()),
        learner,
        draft_id=pair.draft_id,
        draft_revision=pair.draft_revision,
    )
    return Learner(
        draft,
        _store(serving, redis_url, memory_url),
        RedisAdapterFeed(redis_url, pair.target_revision),
        learner,
        target_revision=pair.target_revision,
        isolated_routes=serving.isolated_routes,
        free_bytes=lambda: free_memory(draft.device).device_bytes,
        tracker_for=partial(
            _tracker, learner, registered_base_name(learner, serving.target, pair.target_revision)
        ),
    )


def _store(serving: ServingSettings, redis_url: str, memory_url: str | None) -> RecordStore:
    durable = RedisRecordStore(redis_url, serving.record_bounds())
    if memory_url is None:
        return durable
    return TwoStores(durable, RedisRecordStore(memory_url, serving.record_bounds("memory"), in_memory=True))


def with_own_memory(model: nn.Module) -> nn.Module:
    """The model with its weights copied: as loaded they are windows on the whole file, which for a part of
    the target is the target's, and stays in memory as long as one of them is used."""
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.clone()
    return model


def registered_base_name(learner: LearnerSettings, target: str, target_revision: str) -> str:
    """What the names of registered models begin with: two targets on one MLflow share none. MLflow's names
    have neither slashes nor colons."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", PurePath(target).name)[:_MAX_READABLE].strip("-")
    return "-".join(filter(None, (learner.registered_model_name, readable, target_revision[:8])))


def _tracker(learner: LearnerSettings, base_name: str, run_id: str) -> Tracker:
    if not learner.tracking_uri:
        return NullTracker()
    return MlflowTracker(
        learner.tracking_uri,
        experiment_name=learner.experiment_name,
        registered_model_name=base_name,
        run_id=run_id,
    )
