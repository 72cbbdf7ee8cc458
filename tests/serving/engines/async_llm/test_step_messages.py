"""The channel from vLLM's process: whole messages, bounded, never waiting."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from serving.engines.async_llm.step_messages import (
    CapturedArrays,
    MessageReceiver,
    MessageSender,
    StepMessage,
)


def arrays() -> CapturedArrays:
    return CapturedArrays(
        drafted_token_ids_G=np.array([4, 5], np.int32),
        drafted_target_logprobs_G=np.array([0.0, -np.inf], np.float32),
        drafted_draft_logprobs_G=np.zeros(2, np.float32),
        emitted_target_logprobs_C=np.array([0.0, -0.5], np.float32),
        topk_token_ids_EK=np.arange(6, dtype=np.int32).reshape(3, 2),
        topk_logprobs_EK=np.full((3, 2), -1.5, np.float16),
        retemper_E=np.zeros(3, np.float32),
    )


def message(number: int, captured: CapturedArrays | None = None) -> StepMessage:
    return StepMessage("r-0-0-12345678", number, 3, 2, [4, 9], 0.01, 2, captured)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "steps")


@pytest.fixture
def received(path: str) -> Iterator[list[StepMessage]]:
    found: list[StepMessage] = []
    receiver = MessageReceiver(path, found.append)
    yield found
    receiver.close()


def until(holds: Callable[[], bool], wait_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + wait_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_message_comes_out_as_it_went_in() -> None:
    for sent in (message(0), message(1, arrays())):
        got = StepMessage.decode(sent.encode())
        assert {**vars(got), "captured": None} == {**vars(sent), "captured": None}
    assert got.captured is not None
    for name, array in vars(arrays()).items():
        np.testing.assert_array_equal(getattr(got.captured, name), array)
        assert getattr(got.captured, name).dtype == array.dtype


def test_messages_arrive_whole_and_in_order(path: str, received: list[StepMessage]) -> None:
    sender = MessageSender(path)
    for number in range(500):
        sender.put(message(number, arrays()))
    until(lambda: len(received) == 500)
    assert [each.number for each in received] == list(range(500))
    assert sender.num_dropped == 0
    sender.close()


def test_a_reader_that_does_not_read_costs_messages_and_no_time(path: str) -> None:
    stuck, go = threading.Event(), threading.Event()

    def wait(_: StepMessage) -> None:
        stuck.set()
        go.wait(20)

    receiver = MessageReceiver(path, wait)
    sender = MessageSender(path, max_queue_bytes=20_000)
    began_s = time.monotonic()
    sender.put(message(0))
    assert stuck.wait(5)
    while sender.num_dropped == 0:  # the kernel's buffers fill first
        sender.put(message(1, arrays()))
        assert time.monotonic() - began_s < 30
    longest_s = 0.0
    for number in range(100):
        put_s = time.monotonic()
        sender.put(message(number))
        longest_s = max(longest_s, time.monotonic() - put_s)
    assert longest_s < 5.0, "it never waited for the reader, who waits for 20 s"
    go.set()
    sender.close()
    receiver.close()


def test_the_sender_learns_that_the_receiver_is_gone(path: str) -> None:
    lost = threading.Event()
    receiver = MessageReceiver(path, lambda _: None)
    sender = MessageSender(path, lost.set)
    sender.put(message(0))
    receiver.close()
    assert lost.wait(5)
    for number in range(3):
        sender.put(message(number))
    sender.close()


def test_the_sender_learns_it_also_when_a_message_finds_out_first(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, found_out = threading.Event(), threading.Event()
    watch = MessageSender._watch
    monkeypatch.setattr(MessageSender, "_watch", lambda self: found_out.wait(20) and watch(self))
    receiver = MessageReceiver(path, lambda _: None)
    sender = MessageSender(path, lost.set)
    receiver.close()
    while not sender.num_dropped:
        sender.put(message(0))
    found_out.set()
    assert lost.wait(5)
    sender.close()


def test_a_sender_that_closes_leaves_no_thread_and_reports_no_loss(
    path: str, received: list[StepMessage]
) -> None:
    lost = threading.Event()
    before = set(threading.enumerate())
    sender = MessageSender(path, lost.set)
    sender.put(message(0))
    until(lambda: len(received) == 1)
    mine = [
        each
        for each in set(threading.enumerate()) - before
        if getattr(each, "_target", None) in (sender._send, sender._watch)
    ]
    assert len(mine) == 2
    sender.close()
    for thread in mine:
        thread.join(5)
        assert not thread.is_alive()
    assert not lost.is_set()
