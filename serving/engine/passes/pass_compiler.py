"""Compiles passes in the background: eager first, compiled when ready, cached for the next start.

Compiling takes about a minute of one core for a small model and needs a C++ compiler. It happens in a process
of its own, at low priority, on a model of the same shape with random weights; the package it leaves in the
cache folder serves every later start at once. A failure there costs only speed: the model's own code
continues to run. Knows no engine: `on_ready` gets the compiled passes.
"""

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from serving.cache_folders import cache_folder
from serving.engine.passes import compiled_pass, grouped_attention, slot_cache, slot_pass
from serving.engine.passes.compiled_pass import CompiledPass, agrees
from serving.engine.passes.hidden_states import HiddenStates
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPass

_log = logging.getLogger(__name__)
_SOURCES = (compiled_pass, grouped_attention, slot_cache, slot_pass)
_TIMEOUT_S = 1800.0


class CompileError(RuntimeError):
    """Passes could not be compiled here; the message says why."""


def compile_spec(runner: Runner) -> dict[str, Any]:
    """Everything that a package depends on, which excludes the weights."""
    model: Any = runner.model
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    states = {"states": True} if isinstance(model, HiddenStates) else {}
    return states | {
        "config": config,
        "attention": model.config._attn_implementation,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "max_seq_len": runner.max_seq_len,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "sources": [Path(str(module.__file__)).read_text() for module in _SOURCES],
    }


def package_path(spec: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder("compiled") / f"{digest[:32]}.pt2"


def load_compiled(runner: Runner, path: Path) -> CompiledPass:
    """Load the package with this runner's weights, checked against the model's own code. Raises
    CompileError."""
    passes = SlotPass(runner.model, runner.max_seq_len)
    try:
        compiled = CompiledPass(path, passes)
        if not agrees(compiled, passes, runner):
            raise CompileError(f"compiled passes {path.name} disagree with the model; they are not used")
    except (OSError, RuntimeError, KeyError) as error:
        raise CompileError(f"compiled passes {path.name} cannot be used: {error}") from error
    return compiled


class PassCompiler:
    """Loads or compiles the packages of some runners."""

    def __init__(self, runners: Sequence[Runner]) -> None:
        self._specs = [(runner, compile_spec(runner)) for runner in runners]
        self._child: subprocess.Popen[str] | None = None
        self._closed = threading.Event()

    @property
    def is_cached(self) -> bool:
        return all(package_path(spec).exists() for _, spec in self._specs)

    def compile(self) -> list[CompiledPass]:
        """One pass for each runner; compiles what is missing, and waits for it. Raises CompileError."""
        return [self._one(runner, spec) for runner, spec in self._specs]

    def start(
        self, on_ready: Callable[[list[CompiledPass]], None], on_failure: Callable[[str], None]
    ) -> None:
        """The same in a thread of its own."""

        def run() -> None:
            try:
                on_ready(self.compile())
            except Exception as error:
                if not self._closed.is_set():
                    _log.warning("passes stay eager: %s", error)
                    on_failure(str(error))

        threading.Thread(target=run, name="everdraft-compile", daemon=True).start()

    def close(self) -> None:
        """End a compilation under way."""
        self._closed.set()
        child = self._child
        if child is not None and child.poll() is None:
            child.kill()

    def _one(self, runner: Runner, spec: dict[str, Any]) -> CompiledPass:
        path = package_path(spec)
        if not path.exists():
            self._compile_in_child(spec, path)
        return load_compiled(runner, path)

    def _compile_in_child(self, spec: dict[str, Any], path: Path) -> None:
        if self._closed.is_set():
            raise CompileError("the engine was closed")
        command = [sys.executable, "-m", "serving.compile_child", str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            _, errors = self._child.communicate(json.dumps(spec, default=str), timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            raise CompileError(f"compiling took more than {_TIMEOUT_S:.0f} s") from None
        if self._child.returncode != 0:
            last = (errors.strip().splitlines() or [f"exit status {self._child.returncode}"])[-1]
            raise CompileError(f"compiling failed: {last}")
