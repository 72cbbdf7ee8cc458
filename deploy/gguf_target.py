"""A target that is a GGUF file, as the checkpoint that every engine loads. Starts nothing."""

from collections.abc import Callable
from pathlib import Path

from deploy.child_command import run_everdraft
from deploy.settings import Settings
from serving.models.gguf_checkpoint import SUFFIX, converted_folder


def with_converted_target(settings: Settings, narrate: Callable[[str], None]) -> Settings:
    """The settings with a folder in place of a GGUF file, converted first where it was not; others as they
    are. Raises ModelPairError."""
    file = Path(settings.serving.target)
    if file.suffix != SUFFIX or not file.is_file():
        return settings
    folder = converted_folder(file)
    if not folder.is_dir():
        narrate(f"converting {file.name} once, about a minute for each hundred million weights: {folder}")
        run_everdraft("convert", str(file), failure=f"serving.target={str(file)!r}")
    serving = settings.serving.model_copy(update={"target": str(folder)})
    return settings.model_copy(update={"serving": serving})
