"""The worker's part without vLLM: a runner whose steps are told of, and a draft that changes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.engines.async_llm import worker as worker_module
from serving.engines.async_llm.draft_files import write_draft
from serving.engines.async_llm.step_messages import StepMessage
from serving.engines.async_llm.worker import CAPTURE, EverdraftWorker

FLOOR = {"a.weight": torch.zeros(2, 2)}


class Runner:
    """Two requests, `a` recorded and `b` not; the sampler spoils the logits that it was given."""

    def __init__(self) -> None:
        params = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        self.requests = {
            "a": SimpleNamespace(sampling_params=SimpleNamespace(**params, extra_args={CAPTURE: True})),
            "b": SimpleNamespace(sampling_params=SimpleNamespace(**params, extra_args=None)),
        }
        self.input_batch = SimpleNamespace(req_ids=["a", "b"])
        self.discard_request_mask = SimpleNamespace(np=np.zeros(2, bool))
        self.emitted = [[3, -1], [4, -1]]

    def _sample(self, logits: Tensor, metadata: Any) -> Any:
        logits.zero_()
        return SimpleNamespace(sampled_token_ids=torch.tensor(self.emitted))


class Worker(EverdraftWorker):
    def __init__(self) -> None:
        self.model_runner, self.vllm_config, self.rank = Runner(), None, 0
        self.messages: list[StepMessage] = []

    def begin(self, floor: str = "") -> None:
        self.everdraft_begin(self.messages.append, worker_module._asked_for, floor)

    def step(self, drafted: list[int] | None = None, num_drafted: list[int] | None = None) -> None:
        counts = num_drafted or [0, 0]
        metadata = None
        if drafted is not None:
            metadata = SimpleNamespace(num_draft_tokens=counts, draft_token_ids=torch.tensor(drafted))
        self.model_runner._sample(torch.randn(sum(counts) + 2, 10), metadata)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    found = Worker()
    found.begin(str(write_draft(tmp_path, 0, FLOOR)[0]))
    return found


def staged(worker: Worker, folder: Path, version: int) -> None:
    path, sha256 = write_draft(folder, version, {"a.weight": torch.full((2, 2), float(version))})
    worker.everdraft_stage(str(path), sha256, version)
    while not worker.everdraft_is_staged():
        pass


def test_every_request_of_a_step_is_told_of_and_only_one_is_recorded(worker: Worker) -> None:
    worker.step()
    first, second = worker.messages
    assert (first.request_id, first.emitted, first.num_drafted, first.batch_size) == ("a", [3], 0, 2)
    assert first.captured is not None and second.captured is None
    assert np.ptp(first.captured.topk_logprobs_EK.astype(np.float32)) > 0, "read before the sampler spoilt it"


def test_draft_tokens_belong_to_the_version_that_proposed_them(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "apply_weights", lambda *_: None)
    worker.step()
    staged(worker, tmp_path, 1)
    worker.everdraft_swap()
    for _ in range(2):
        worker.step([5, 6, 7], [2, 1])
    versions = [message.draft_version for message in worker.messages if message.request_id == "a"]
    assert versions == [0, 0, 1], "what was drafted before the swap is judged after it"
    assert [message.number for message in worker.messages if message.request_id == "b"] == [0, 1, 2]
    [captured] = [each.captured for each in worker.messages[2:3]]
    assert captured is not None and captured.drafted_token_ids_G.tolist() == [5, 6]
    assert len(captured.topk_token_ids_EK) == 3


def test_a_prompt_that_is_read_in_part_says_nothing(worker: Worker) -> None:
    worker.model_runner.discard_request_mask.np[0] = True
    worker.step()
    assert [message.request_id for message in worker.messages] == ["b"]


def test_what_fails_here_reaches_no_step(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    del worker.model_runner.input_batch
    for _ in range(3):
        worker.step()
    assert worker.messages == [] and caplog.text.count("could not be reported") == 1


def test_a_draft_that_cannot_be_put_in_place_leaves_the_floor(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live: list[float] = []

    def apply(_: Any, tensors: dict[str, Tensor]) -> None:
        live.append(float(tensors["a.weight"][0, 0]))
        if live[-1] == 2.0:
            raise RuntimeError("half of it is in place")

    monkeypatch.setattr(worker_module, "apply_weights", apply)
    staged(worker, tmp_path, 1)
    worker.everdraft_swap()
    staged(worker, tmp_path, 2)
    with pytest.raises(RuntimeError, match="half"):
        worker.everdraft_swap()
    assert live == [1.0, 2.0, 0.0] and worker.everdraft_version() == 0


def test_of_several_workers_one_reports() -> None:
    second = Worker()
    second.rank = 1
    second.begin()
    second.step()
    assert second.messages == []
