"""Setting up: no CUDA unasked, uv where it can, pip where not. Both are real; their index is a folder."""

import os
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from deploy.install import (
    cuda_packages,
    has_nvidia_gpu,
    is_installed,
    pip_settings,
    torch_requirement,
    uv_environment,
    uv_flags,
)

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


def make_environment(folder: Path, *tools: str) -> Path:
    """A virtual environment that has these of our own tools, and nothing else. Returns its site folder."""
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    [site] = (folder / "venv" / "lib").glob("python*/site-packages")
    for tool in tools:
        for file in {file.parts[0] for file in metadata.files(tool) or [] if file.parts[0] != ".."}:
            (site / file).symlink_to(Path(str(metadata.distribution(tool).locate_file(file))))
    if "uv" in tools:
        (folder / "venv" / "bin" / "uv").symlink_to(Path(sys.executable).parent / "uv")
    return site


def install(
    folder: Path, *arguments: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the installer on the wheels in `folder`; what torch is goes to folder/site unless `python` has a
    place of its own."""
    (folder / "constraints.txt").write_text("numpy==2.0\ntorch==99.1\n")
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "TORCH_", "UV_"))
    }
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}
    if python == sys.executable:
        pip["PIP_TARGET"] = str(folder / "site")
    return subprocess.run(
        [python, "-I", str(ROOT / "deploy/install.py"), str(folder / "constraints.txt"), *arguments],
        env={**kept, **pip, "UV_CACHE_DIR": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def installed_by(site: Path, name: str) -> str:
    """Who installed the one version of it that there is."""
    [info] = site.glob(f"{name}-*.dist-info")
    return (info / "INSTALLER").read_text().strip()


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


def test_uv_installs_the_rest_and_leaves_the_torch_that_is_there(tmp_path: Path) -> None:
    site = make_environment(tmp_path, "pip", "uv")
    write_wheel(tmp_path, "torch", "99.1+cpu")
    write_wheel(tmp_path, "numpy", "2.0")
    write_wheel(tmp_path, "numpy", "3.0")
    write_wheel(tmp_path, "rest", "1.0", "torch>=99", "numpy")
    python = str(tmp_path / "venv" / "bin" / "python")
    assert install(tmp_path, python=python).returncode == 0
    write_wheel(tmp_path, "torch", "99.1", "nvidia-cublas")
    write_wheel(tmp_path, "nvidia_cublas", "1.0")
    done = install(tmp_path, "rest", python=python, PATH="")
    assert done.returncode == 0, done.stderr
    assert installed_by(site, "rest") == installed_by(site, "numpy") == "uv"
    assert (site / "torch-99.1+cpu.dist-info").exists() and (site / "numpy-2.0.dist-info").exists()
    assert installed_by(site, "torch") == "pip" and not list(site.glob("nvidia*"))
    said = done.stdout.splitlines()
    assert said[0] == "installing torch==99.1 with pip" and "with uv" in said[2]
    assert said[1].startswith("  done in") and said[3].startswith("  done in") and len(said) == 4


def test_where_uv_cannot_be_had_pip_installs_the_rest_and_it_is_said(tmp_path: Path) -> None:
    site = make_environment(tmp_path, "pip")
    write_wheel(tmp_path, "torch", "99.1")
    write_wheel(tmp_path, "rest", "1.0", "torch")
    done = install(tmp_path, "rest", python=str(tmp_path / "venv" / "bin" / "python"), PATH="")
    assert done.returncode == 0, done.stderr
    assert "uv cannot be had here: pip does it" in done.stdout
    assert installed_by(site, "rest") == "pip"


def test_where_uv_fails_pip_installs_the_rest_and_uv_has_said_why(tmp_path: Path) -> None:
    site = make_environment(tmp_path, "pip", "uv")
    write_wheel(tmp_path, "torch", "99.1")
    write_wheel(tmp_path, "rest", "1.0", "torch")
    python = str(tmp_path / "venv" / "bin" / "python")
    done = install(tmp_path, "rest", python=python, PATH="", UV_INDEX_STRATEGY="x", UV_LINK_MODE="nonsense")
    assert done.returncode == 0, done.stderr
    assert "uv failed, see above: pip does it" in done.stdout and "nonsense" in done.stderr
    assert installed_by(site, "rest") == "pip"


def test_what_neither_can_install_fails(tmp_path: Path) -> None:
    make_environment(tmp_path, "pip")
    write_wheel(tmp_path, "torch", "99.1")
    assert install(tmp_path, "absent", python=str(tmp_path / "venv" / "bin" / "python"), PATH="").returncode


def test_of_pips_settings_the_environments_win() -> None:
    listing = (
        ":env:.index-url='https://e/simple'\nglobal.index-url='https://g/simple'\nglobal.cert='/c.pem'\n"
    )
    listing += "install.cert='/i.pem'\ndownload.cert='/d.pem'\n"
    assert pip_settings(listing) == {"index-url": "https://e/simple", "cert": "/i.pem"}


def test_uv_is_told_where_pip_finds_packages_and_whom_it_trusts() -> None:
    settings = {"index-url": "https://a/simple", "extra-index-url": "https://b\nhttps://c", "no-index": "0"}
    strategy = ["--index-strategy", "unsafe-best-match"]
    places = ["--default-index", "https://a/simple", "--index", "https://b", "--index", "https://c"]
    assert uv_flags(settings) == [*strategy, *places]
    assert uv_flags({"no-index": "true", "find-links": "/w"}) == [
        *strategy, "--find-links", "/w", "--no-index"
    ]  # fmt: skip
    assert uv_environment({"cert": "/c.pem"}, {"HOME": "/"}) == {"HOME": "/", "SSL_CERT_FILE": "/c.pem"}
    assert uv_environment({"cert": "/c.pem"}, {"SSL_CERT_FILE": "/own"}) == {"SSL_CERT_FILE": "/own"}
    assert uv_environment({}, {}) == {}
