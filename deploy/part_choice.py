"""Settles `serving.draft = "self:auto"` before anything starts on it: replicas and learner get one part."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

from deploy.errors import ModelPairError
from deploy.settings import Settings
from serving.models.target_part import SELF

AUTO = f"{SELF}:auto"


def as_if_chosen(settings: Settings) -> Settings:
    """For checks before the choice: with the part that `self` names."""
    return _with_draft(settings, SELF) if settings.serving.draft == AUTO else settings


def with_chosen_part(settings: Settings, redis_url: str, narrate: Callable[[str], None]) -> Settings:
    """The settings with the part that is likely to serve fastest in place of `self:auto`; others as they
    are. Raises ModelPairError."""
    serving = settings.serving
    if serving.draft != AUTO:
        return settings
    narrate("measuring what passes of the target's parts cost, to choose the one that drafts")
    question = {"target": serving.target, "device": serving.device, "dtype": serving.dtype}
    threads = {} if serving.num_threads is None else {"OMP_NUM_THREADS": str(serving.num_threads)}
    child = subprocess.run(
        [sys.executable, "-m", "serving.part_choice"],
        input=json.dumps(question | {"redis_url": redis_url}),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | threads,
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise ModelPairError(
            f"serving.draft={AUTO!r}: {last}; nothing was started: name a part, such as self:2"
        )
    best, *others = json.loads(child.stdout.splitlines()[-1])
    for each in (best, *others):
        narrate(
            f"  {each['part']}: a pass takes {each['draft_pass_share']:.2f} of the target's, expected are "
            f"acceptance {each['acceptance']:.2f} and speed {each['speedup']:.2f} at "
            f"{each['num_draft_tokens']} drafts"
        )
    narrate(f"drafting with {best['part']}")
    return _with_draft(settings, best["part"])


def _with_draft(settings: Settings, draft: str) -> Settings:
    return settings.model_copy(update={"serving": settings.serving.model_copy(update={"draft": draft})})
