"""Chooses the code of an engine's passes: the models' own, compiled, or captured; at start, changed once.

On a CPU "on" waits for the compiler, "auto" takes what an earlier start compiled and otherwise serves eagerly
until it is ready, "off" never compiles. Compiled passes are used only where they were measured to be faster.
On a GPU "on" and "auto" are static passes, captured as CUDA graphs at start and at first use; where they
disagree with the model's own code "on" fails and "auto" serves eagerly.
"""

import logging
import shutil
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from serving.engine.cost_measurement import fastest_pass_s, measure_costs
from serving.engine.cost_table import CostTable
from serving.engine.passes.packed_linear import ROWS as PACKED_ROWS
from serving.engine.passes.packed_linear import has_packed
from serving.engine.passes.pass_compiler import (
    CompileError,
    PassCompiler,
    compile_spec,
    load_compiled,
    package_path,
)
from serving.engine.passes.runner import Runner
from serving.engine.passes.shared_slot_cache import SharedSlotCache
from serving.engine.passes.slot_pass import SlotPassFunction
from serving.engine.passes.static_check import static_error, static_pass_of

if TYPE_CHECKING:
    from serving.engine.engine import Engine

_log = logging.getLogger(__name__)

CompileChoice = Literal["auto", "on", "off"]

COMPILING = "eager (compiling)"
"""The only state that changes later."""


class Compiling:
    """The passes of a target, of a draft and of a prompt embedder if there are any."""

    def __init__(
        self, target: Runner, draft: Runner | None, choice: CompileChoice, embedder: Runner | None = None
    ) -> None:
        """Raises CompileError if "on" is impossible. Uses what is compiled already, before any round."""
        self.state = "eager"
        """How the passes run, and why, for display."""
        self._target = target
        self._runners = [target] if draft is None else [target, draft]
        self._compiled = self._runners if embedder is None else [*self._runners, embedder]
        self._compiler: PassCompiler | None = None
        self._joined: weakref.WeakSet[Runner] = weakref.WeakSet()
        """Further drafts, which get the compiled package when the first draft does."""
        self._has_package = False
        """Whether drafts that join from now on get the package at once."""
        self._lock = threading.Lock()
        if target.device.type == "cuda" and choice != "off":
            self._capture(choice)
            return
        reason = self._objection()
        if choice == "off" or (choice == "auto" and reason):
            self.state = f"eager ({reason or 'compile: off'})"
            return
        if reason:
            raise CompileError(f"compile='on' cannot be had: {reason}")
        compiler = PassCompiler(self._compiled)
        if choice == "on":
            self._bind(compiler.compile())
        elif compiler.is_cached and self._bind_cached(compiler):
            return
        else:
            self.state, self._compiler = COMPILING, compiler

    def start(self, engine: "Engine") -> None:
        """Start the compilation that is left to do, while the engine runs."""
        if self._compiler is None:
            return

        def on_ready(passes: Sequence[SlotPassFunction]) -> None:
            self._compare(passes)
            before, after = self._measure([]), self._measure(passes)
            if after.round_s(1, 0) < before.round_s(1, 0):
                self._hand_over(engine, passes, after)
            else:
                self._say("eager (compiled passes were not faster)")

        def on_failure(reason: str) -> None:
            self.state = f"eager ({reason})"

        self._compiler.start(on_ready, on_failure)

    def join(self, runner: Runner) -> None:
        """Make a further draft run its passes like the first, at once or when the package is ready; its cache
        must be idle. If that is impossible, it stays eager."""
        with self._lock:
            has_package = self._has_package
            if not has_package:
                self._joined.add(runner)
        if has_package:
            runner.compiled = self._package(runner)
        elif self.state == "captured":
            try:
                self._use_static(runner)
            except (CompileError, RuntimeError) as error:
                _log.warning("passes of one more draft stay eager: %s", error)

    def close(self) -> None:
        """End a compilation under way."""
        if self._compiler is not None:
            self._compiler.close()

    def _hand_over(self, engine: "Engine", passes: Sequence[SlotPassFunction], costs: CostTable) -> None:
        """Give the passes to the engine's thread, which sets all of them between two rounds."""
        with self._lock:
            self._has_package = True
            joined = list(self._joined)
        ready = list(zip(self._compiled, passes, strict=True))
        ready += [(runner, package) for runner in joined if (package := self._package(runner)) is not None]
        engine.use_passes(ready, costs).add_done_callback(lambda _: self._say("compiled"))

    def _say(self, state: str) -> None:
        self.state = state
        _log.info("passes: %s", state)

    def _capture(self, choice: CompileChoice) -> None:
        """Static passes for all runners, or for none."""
        try:
            for runner in self._runners:
                self._use_static(runner)
        except (CompileError, RuntimeError) as error:
            for runner in self._runners:
                runner.static = None
            if choice == "on":
                raise CompileError(f"compile='on' cannot be had: {error}") from error
            self.state = f"eager ({error})"
            _log.warning("passes stay eager: %s", error)
            return
        self.state = "captured"

    def _use_static(self, runner: Runner) -> None:
        """Capture and check; the cache is idle, and cleared. A further draft whose first layers are the
        target's live cache is not checked: the first one, of the same shape, was."""
        static = static_pass_of(runner)
        if self.state == "captured" and isinstance(runner.cache, SharedSlotCache):
            runner.static = static
            return
        error = static_error(runner, static)
        tolerance = 1e-3 if runner.dtype == torch.float32 else 0.05
        if not error <= tolerance:
            raise CompileError(f"static passes disagree with the model (relative error {error:.2g})")
        runner.static = static

    def _package(self, runner: Runner) -> SlotPassFunction | None:
        """The first draft's package with this draft's weights, for the same rows; None if it does not fit."""
        runner.slower_rows = self._runners[-1].slower_rows
        try:
            return load_compiled(runner, package_path(compile_spec(runner)))
        except CompileError as error:
            _log.warning("passes of one more draft stay eager: %s", error)
            return None

    def _objection(self) -> str:
        """Reason why passes cannot be compiled here; empty if they can."""
        if self._target.device.type != "cpu":
            return "compiled packages are for processors"
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            return "no C++ compiler is installed"
        return ""

    def _bind_cached(self, compiler: PassCompiler) -> bool:
        """Whether the packages of an earlier start could be used."""
        try:
            self._bind(compiler.compile())
        except CompileError as error:
            self.state = f"eager ({error})"
            _log.warning("passes stay eager: %s", error)
        return True

    def _bind(self, passes: Sequence[SlotPassFunction]) -> None:
        self._compare(passes)
        for runner, compiled in zip(self._compiled, passes, strict=True):
            runner.compiled = compiled
        self.state, self._has_package = "compiled", True

    def _compare(self, passes: Sequence[SlotPassFunction]) -> None:
        """Packages know no packed layers: where these are faster, passes of their rows stay the model's
        own."""
        for runner, compiled in zip(self._compiled, passes, strict=True):
            if has_packed(runner.model):
                own, other = runner.twin(num_slots=1), runner.twin(num_slots=1)
                other.compiled = compiled
                if fastest_pass_s(own, 1, PACKED_ROWS[1]) < fastest_pass_s(other, 1, PACKED_ROWS[1]):
                    runner.slower_rows = PACKED_ROWS

    def _measure(self, passes: Sequence[SlotPassFunction]) -> CostTable:
        """Measure costs over separate caches, because the engine's are in use."""
        runners = [runner.twin() for runner in self._runners]
        for runner, compiled in zip(runners, passes, strict=False):
            runner.compiled = compiled
        return measure_costs(runners[0], runners[1] if len(runners) > 1 else None)
