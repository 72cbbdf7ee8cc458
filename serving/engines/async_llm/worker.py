"""What a vLLM worker does for everdraft, as its `worker_extension_cls`: capture, versions, swaps.

Every public method is called by `collective_rpc`, between two steps. Invariant: a draft that serves changes
whole, or not at all.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from buffer.names import FLOOR_VERSION
from serving.engines.async_llm.draft_files import StagedFile, read_header
from serving.engines.async_llm.runner_steps import observe_runner
from serving.engines.async_llm.step_messages import MessageSender, StepMessage
from serving.engines.async_llm.steps import Steps, Wants
from serving.engines.async_llm.transfer import apply_weights

CAPTURE = "everdraft_capture"
"""Key of `SamplingParams.extra_args`: record this request."""


class EverdraftWorker:
    """Mixed into vLLM's worker class."""

    model_runner: Any
    vllm_config: Any
    rank: int

    def everdraft_open(self, socket_path: str, floor_path: str) -> None:
        """Begin to report steps. `floor_path`: file of the draft that is loaded; others must be like it.
        Empty: there is no draft."""
        sender = MessageSender(socket_path, lambda: _end(Path(socket_path).parent))
        self.everdraft_begin(sender.put, _asked_for, floor_path)

    def everdraft_begin(self, put: Callable[[StepMessage], None], wants: Wants, floor_path: str) -> None:
        """As `everdraft_open`, with messages given to `put` on the step's thread. Of several workers the
        first reports; all see the same tokens."""
        self._everdraft_floor = floor_path
        self._everdraft_staged: StagedFile | None = None
        self._everdraft = Steps(put, wants)
        if self.rank == 0:
            observe_runner(self.model_runner, self._everdraft)

    def everdraft_stage(self, path: str, sha256: str, draft_version: int) -> None:
        """Begin to read a draft's file, on a thread of its own. Raises ValueError for a file that is not like
        the floor's."""
        if not self._everdraft_floor:
            raise ValueError(f"draft_version={draft_version} was not staged: no draft is loaded")
        like = read_header(self._everdraft_floor)
        self._everdraft_staged = StagedFile(path, sha256, draft_version, like)

    def everdraft_is_staged(self) -> bool:
        """Whether the file was read. Raises ValueError where it could not be, or has another sha256."""
        staged = self._everdraft_staged
        if staged is None or not staged.is_done:
            return False
        staged.result()
        return True

    def everdraft_swap(self) -> float:
        """Make the staged draft live. Returns the seconds that steps waited. Raises ValueError for a file
        that did not pass, after which nothing changed, and what vLLM raises, after which the floor serves."""
        staged, self._everdraft_staged = self._everdraft_staged, None
        if staged is None:
            raise ValueError("no draft is staged; nothing was swapped")
        began_s, tensors = time.perf_counter(), staged.result()
        try:
            apply_weights(self, tensors)
        except Exception:
            apply_weights(self, load_file(self._everdraft_floor))
            self._everdraft.draft_version = FLOOR_VERSION
            raise
        self._everdraft.draft_version = staged.draft_version
        return time.perf_counter() - began_s

    def everdraft_version(self) -> int:
        """Of the draft that serves."""
        return self._everdraft.draft_version


def _asked_for(name: str, params: Any) -> bool:
    return bool((params.extra_args or {}).get(CAPTURE))


def _end(folder: Path) -> None:
    """The replica is gone, perhaps killed: nobody is left to answer, and vLLM's processes would stay, with
    the replica's folder. Its engine's process ends when it sees a worker end."""
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
