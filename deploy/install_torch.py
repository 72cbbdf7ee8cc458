"""Installs torch by itself, before everything else, and never gigabytes of CUDA unasked.

Runs on a bare interpreter: standard library only. It knows no registry and no index address; those
come from pip's own settings, or from `TORCH_INDEX`. Invariant: nothing is downloaded before pip's
dry run has shown what would be.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ADVICE = """\
This machine has no NVIDIA GPU, and a plain `pip install torch` would fetch these CUDA packages:
  {packages}
Nothing was installed. Choose one:
  make setup TORCH_INDEX=URL   the CPU wheels; URL is the --index-url that the install selector on
                               pytorch.org shows for "CPU"
  make setup TORCH_CUDA=1      accept the CUDA packages (several gigabytes)"""


def cuda_packages(report: Mapping[str, Any]) -> list[str]:
    """Names of the CUDA packages that a `pip install --dry-run --report` would install, sorted."""
    names = (item["metadata"]["name"].lower().replace("_", "-") for item in report.get("install", []))
    return sorted(name for name in names if name.startswith(("nvidia-", "cuda-")))


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA driver is present; asks no library, since none is installed yet."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def torch_requirement(constraints: Path) -> str:
    """The pinned line of torch in a constraints file. Raises ValueError where there is none."""
    for line in constraints.read_text().splitlines():
        if line.startswith("torch=="):
            return line.strip()
    raise ValueError(f"{constraints} pins no torch; nothing was installed")


def is_installed(requirement: str) -> bool:
    """Whether this very version is there, whatever its local label (`+cpu`, `+cu130`)."""
    try:
        installed = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
    return installed.partition("+")[0] == requirement.partition("==")[2]


def main(constraints: Path, environment: Mapping[str, str]) -> int:
    """Install the pinned torch into this interpreter. Returns an exit status."""
    requirement = torch_requirement(constraints)
    if is_installed(requirement):
        return 0
    index = environment.get("TORCH_INDEX", "")
    arguments = [requirement, "--quiet", *(["--index-url", index] if index else [])]
    if not (index or environment.get("TORCH_CUDA") or has_nvidia_gpu()):
        unwanted = cuda_packages(_dry_run(arguments))
        if unwanted:
            print(ADVICE.format(packages=" ".join(unwanted)), file=sys.stderr)
            return 1
    return subprocess.run(_pip(arguments), check=False).returncode


def _pip(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pip", "install", *arguments]


def _dry_run(arguments: Sequence[str]) -> dict[str, Any]:
    command = _pip([*arguments, "--dry-run", "--report", "-"])
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    report: dict[str, Any] = json.loads(output)
    return report


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), os.environ))
