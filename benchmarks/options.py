"""What several bench commands ask for, how their learner learns, and where results lie."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deploy.commands.console import errors, plain_faults
from deploy.commands.demo import LEARNER, PAIR

if TYPE_CHECKING:
    from benchmarks.adapted import Adapter
    from learner.settings import LearnerSettings
    from serving.models.loading import ModelPair

RESULTS = Path("benchmarks") / "results"
DEMO_TARGET, DEMO_DRAFT = str(PAIR / "target"), str(PAIR / "draft")

TargetOption = Annotated[str, typer.Option(help="Path or hub id.")]
DraftOption = Annotated[str, typer.Option(help="Path or hub id.")]
AdapterOption = Annotated[
    Path | None, typer.Option(help="PEFT adapter of the draft; default: learnt here, once.")
]
CompileOption = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(help="auto waits for compiled passes where they can be had; on, off."),
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="Folder of .jsonl rows with `prompt`; default: the demo's prompts.")
]
ModesOption = Annotated[
    list[str] | None, typer.Option(help="Only these; engine_off is always among them; default: all.")
]
ThreadsOption = Annotated[int, typer.Option(help="Of one forward pass, the same for all.", min=1)]


def demo_settings() -> "LearnerSettings":
    """The demo's, but never resting, for nothing else runs here; and with more passes over what arrived,
    since here a record costs more time than a step."""
    from learner.settings import LearnerSettings

    unhurried = {"max_busy_share": 1.0, "quiet_after_publish_s": 0.0, "max_record_age_s": 3600.0}
    return LearnerSettings.model_validate({**LEARNER, **unhurried, "passes_over_fresh": 6.0})


def cache_folder() -> Path:
    """Where what takes long to work out is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "everdraft"


def pair_and_adapter(target: str, draft: str, adapter: Path | None) -> "tuple[ModelPair, Adapter | None]":
    """The pair, and what its draft learnt: --adapter, or from the demo's traffic, here and once."""
    from benchmarks.adapted import adapter_for, check_adapter
    from serving.models.loading import load_pair

    with plain_faults():
        check_adapter(adapter)
    pair = load_pair(target, draft)
    learnt = adapter_for(
        pair, adapter, cache_folder(), demo_settings(), lambda cycle: errors().print(str(cycle))
    )
    return pair, learnt
