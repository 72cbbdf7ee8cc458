"""Installs everything: torch by itself and first, never gigabytes of CUDA unasked; then the rest, with uv.

Runs on a bare interpreter: standard library only. It knows no registry and no index address; those come from
pip's own settings, which uv is told of, or from `TORCH_INDEX`. Invariants: nothing of torch is downloaded
before pip's dry run has shown what would be, and whatever uv cannot do here, pip does.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
PIP_SECTIONS = ("global", "install", ":env:")
"""Of pip's settings, the last one that speaks wins."""
UV_FLAGS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
}
"""uv's words for what pip's settings say of where packages come from; each may hold several."""


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


def install_torch(requirement: str, environment: Mapping[str, str]) -> int:
    """Install the pinned torch into this interpreter, with pip. Returns an exit status."""
    if is_installed(requirement):
        return 0
    index = environment.get("TORCH_INDEX", "")
    arguments = [requirement, "--quiet", *(["--index-url", index] if index else [])]
    if not (index or environment.get("TORCH_CUDA") or has_nvidia_gpu()):
        unwanted = cuda_packages(_dry_run(arguments))
        if unwanted:
            print(ADVICE.format(packages=" ".join(unwanted)), file=sys.stderr)
            return 1
    # Byte-compiling all of it takes longer than the rest; what is imported is compiled then.
    return _run(_pip([*arguments, "--no-compile"]))


def install_rest(constraints: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """What `arguments` ask of `pip install`, with uv, or with pip where uv fails. Returns an exit status."""
    arguments = ["--quiet", "--constraint", str(constraints), *arguments]
    settings = pip_settings(_output([sys.executable, "-m", "pip", "config", "list"]))
    uv = _uv(constraints)
    if uv:
        flags = ["--python", sys.executable, *uv_flags(settings)]
        if _run([*uv, "pip", "install", *flags, *arguments], uv_environment(settings, environment)) == 0:
            return 0
    reason = "uv failed, see above" if uv else "uv cannot be had here"
    print(f"  {reason}: pip does it, which takes minutes rather than seconds", flush=True)
    return _run(_pip(arguments))


def pip_settings(listing: str) -> dict[str, str]:
    """What `pip config list` tells, by name without its section."""
    found: dict[str, str] = {}
    for section in PIP_SECTIONS:
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}."):
                found[name.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    return found


def uv_flags(settings: Mapping[str, str]) -> list[str]:
    """Where pip's settings say that packages come from. As pip does, uv takes the best of all places."""
    flags = ["--index-strategy", "unsafe-best-match"]
    for name, flag in UV_FLAGS.items():
        for value in settings.get(name, "").split():
            flags += [flag, value]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        flags.append("--no-index")
    return flags


def uv_environment(settings: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """The certificates that pip was told to trust are trusted by uv too, unless it was told of others."""
    certificates = {"SSL_CERT_FILE": settings["cert"]} if "cert" in settings else {}
    return certificates | dict(environment)


def main(constraints: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Install torch, then what `arguments` name as for `pip install`. Returns an exit status."""
    requirement = torch_requirement(constraints)
    status = _timed(f"installing {requirement} with pip", lambda: install_torch(requirement, environment))
    if status or not arguments:
        return status
    num_pins = sum("==" in line for line in constraints.read_text().splitlines())
    words = f"installing the rest, up to {num_pins} packages, with uv"
    return _timed(words, lambda: install_rest(constraints, arguments, environment))


def _timed(words: str, step: Callable[[], int]) -> int:
    """Say what is done before it is, and how long it took."""
    print(words, flush=True)
    began_s = time.monotonic()
    status = step()
    if status == 0:
        print(f"  done in {time.monotonic() - began_s:.0f} s", flush=True)
    return status


def _uv(constraints: Path) -> list[str]:
    """The command that runs uv, brought here if need be; empty where it cannot be."""
    if found := shutil.which("uv"):
        return [found]
    brought = _run(_pip(["--quiet", "--constraint", str(constraints), "uv"]))
    return [] if brought else [sys.executable, "-m", "uv"]


def _pip(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pip", "install", *arguments]


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    return subprocess.run(command, env=environment, check=False).returncode


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _dry_run(arguments: Sequence[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(_output(_pip([*arguments, "--dry-run", "--report", "-"])))
    return report


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:], os.environ))
