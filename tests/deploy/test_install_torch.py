"""A machine without a GPU never downloads CUDA unasked; pip is real, its index is a local folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy.install_torch import cuda_packages, has_nvidia_gpu, is_installed, torch_requirement

ROOT = Path(__file__).parent.parent.parent


def write_wheel(folder: Path, name: str, version: str, *requirements: str) -> None:
    """An empty package that pip can install."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requirements]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def install(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installer against the wheels in `folder`; what it installs goes to folder/site."""
    (folder / "constraints.txt").write_text("numpy==2.0\ntorch==99.1\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "TORCH_"))}
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_TARGET": str(folder / "site")}
    return subprocess.run(
        [sys.executable, "-I", str(ROOT / "deploy/install_torch.py"), str(folder / "constraints.txt")],
        env={**kept, **pip, "PIP_CONFIG_FILE": os.devnull, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.skipif(has_nvidia_gpu(), reason="with a GPU the CUDA packages are wanted")
def test_cuda_packages_stop_the_installation_and_the_message_says_what_to_do(tmp_path: Path) -> None:
    write_wheel(tmp_path, "torch", "99.1", "nvidia-cublas")
    write_wheel(tmp_path, "nvidia_cublas", "1.0")
    done = install(tmp_path)
    assert done.returncode == 1
    assert "nvidia-cublas" in done.stderr
    assert "TORCH_INDEX" in done.stderr and "TORCH_CUDA=1" in done.stderr
    assert not (tmp_path / "site").exists()


def test_cuda_packages_are_installed_when_asked_for(tmp_path: Path) -> None:
    write_wheel(tmp_path, "torch", "99.1", "nvidia-cublas")
    write_wheel(tmp_path, "nvidia_cublas", "1.0")
    done = install(tmp_path, TORCH_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "nvidia_cublas-1.0.dist-info").exists()


def test_a_cpu_wheel_is_installed_without_asking(tmp_path: Path) -> None:
    write_wheel(tmp_path, "torch", "99.1")
    assert install(tmp_path).returncode == 0
    assert (tmp_path / "site" / "torch-99.1.dist-info").exists()


def test_only_cuda_packages_count() -> None:
    names = ["Torch", "nvidia-cublas-cu12", "NVIDIA-nccl", "numpy", "cuda-bindings"]
    report = {"install": [{"metadata": {"name": name}} for name in names]}
    assert cuda_packages(report) == ["cuda-bindings", "nvidia-cublas-cu12", "nvidia-nccl"]
    assert cuda_packages({}) == []


def test_the_constraints_pin_the_torch_that_is_installed_here() -> None:
    requirement = torch_requirement(ROOT / "constraints.txt")
    assert is_installed(requirement)
    assert not is_installed("torch==0.1")


def test_constraints_without_torch_are_refused(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("numpy==2.0\n")
    with pytest.raises(ValueError, match="pins no torch"):
        torch_requirement(tmp_path / "constraints.txt")
