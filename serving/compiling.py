"""Which code runs the passes of an engine: the models' own, or compiled. Decided at start, changed once.

"on" waits for the compiler, "auto" takes what an earlier start compiled and otherwise serves eagerly until it
is ready, "off" never compiles. Compiled passes are used only where they were measured to be faster.
"""

import logging
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from serving.engine.cost_table import CostTable, measure_costs
from serving.engine.pass_compiler import CompileError, PassCompiler
from serving.engine.runner import Pass, Runner

if TYPE_CHECKING:
    from serving.engine.engine import Engine

_log = logging.getLogger(__name__)

CompileChoice = Literal["auto", "on", "off"]


class Compiling:
    """The passes of a target and perhaps a draft."""

    def __init__(self, target: Runner, draft: Runner | None, choice: CompileChoice) -> None:
        """Raises CompileError if "on" is impossible. Uses what is compiled already, before any round."""
        self.state = "eager"
        """For people: what runs the passes, and why."""
        self._target, self._draft = target, draft
        self._runners = [target] if draft is None else [target, draft]
        self._compiler: PassCompiler | None = None
        reason = self._objection()
        if choice == "off" or (choice == "auto" and reason):
            self.state = f"eager ({reason or 'compile: off'})"
            return
        if reason:
            raise CompileError(f"compile='on' cannot be had: {reason}")
        compiler = PassCompiler(self._runners)
        if choice == "on":
            self._bind(compiler.compile())
        elif compiler.is_cached and self._bind_cached(compiler):
            return
        else:
            self.state, self._compiler = "eager (compiling)", compiler

    def start(self, engine: "Engine") -> None:
        """Begin what the constructor left to do, beside the running engine."""
        if self._compiler is None:
            return

        def on_ready(passes: Sequence[Pass]) -> None:
            before, after = self._measure([]), self._measure(passes)
            if after.round_s(1, 0) < before.round_s(1, 0):
                engine.use_passes(list(zip(self._runners, passes, strict=True)), after)
                self.state = "compiled"
            else:
                self.state = "eager (compiled passes were not faster)"
            _log.info("passes: %s", self.state)

        def on_failure(reason: str) -> None:
            self.state = f"eager ({reason})"

        self._compiler.start(on_ready, on_failure)

    def close(self) -> None:
        """End a compilation under way."""
        if self._compiler is not None:
            self._compiler.close()

    def _objection(self) -> str:
        """Why passes cannot be compiled here, or nothing."""
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

    def _bind(self, passes: Sequence[Pass]) -> None:
        for runner, compiled in zip(self._runners, passes, strict=True):
            runner.compiled = compiled
        self.state = "compiled"

    def _measure(self, passes: Sequence[Pass]) -> CostTable:
        """Costs over caches of its own: the engine's are in use."""
        runners = [runner.twin() for runner in self._runners]
        for runner, compiled in zip(runners, passes, strict=False):
            runner.compiled = compiled
        return measure_costs(runners[0], runners[1] if len(runners) > 1 else None)
