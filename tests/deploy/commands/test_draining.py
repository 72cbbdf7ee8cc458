"""SIGTERM to a real `everdraft serve`: what it took is answered whole, what is new goes elsewhere."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.deploy.everdraft_process import EverdraftProcess, wait_for
from tests.support.tiny_models import save_tiny_pair

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

GONE_S = 180.0
NUM_CHOICES = 64
LONG = {
    "prompt": "a",
    "n": NUM_CHOICES,
    "max_tokens": 500,
    "ignore_eos": True,
    "num_draft_tokens": 0,
    "stream": True,
}
"""Eight times what the slots hold, without drafts: far longer than a test needs to look around."""


class Reader:
    """Reads a stream on a thread of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.events: list[str] = []
        self.began, self.failure = threading.Event(), ""
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=LONG, timeout=300) as response:
                for line in response.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
                        self.began.set()
        except httpx.HTTPError as error:
            self.failure = repr(error)

    @property
    def ends(self) -> list[str]:
        """Why each choice ended."""
        chunks = [json.loads(event) for event in self.events if event.startswith('{"id"')]
        return [one["finish_reason"] for chunk in chunks for one in chunk["choices"] if one["finish_reason"]]


@contextmanager
def served(folder: Path) -> Iterator[EverdraftProcess]:
    """Two replicas, without a learner."""
    target, draft = save_tiny_pair(folder)
    config = folder / "everdraft.toml"
    config.write_text(
        "[serving]\nnum_replicas = 2\nnum_threads = 1\ndrain_timeout_s = 600\n[cluster]\nlearn = false\n"
    )
    options = ("--config", str(config), "--target", target, "--draft", draft)
    with EverdraftProcess(folder, "serve", *options) as everdraft:
        everdraft.wait_until_up()
        yield everdraft


def statuses_of_ready(everdraft: EverdraftProcess) -> set[int]:
    """Of so many calls that each replica gets some: both, but for one chance in 2^19."""
    return {httpx.get(f"{everdraft.url}/ready", timeout=60).status_code for _ in range(20)}


def test_sigterm_refuses_what_is_new_and_answers_whole_what_is_under_way(tmp_path: Path) -> None:
    with served(tmp_path) as everdraft:
        assert statuses_of_ready(everdraft) == {200}
        reader = Reader(everdraft.url)
        assert reader.began.wait(120), reader.failure
        everdraft.process.send_signal(signal.SIGTERM)
        wait_for(lambda: 503 in statuses_of_ready(everdraft), 60)
        assert statuses_of_ready(everdraft) == {503}
        assert httpx.get(f"{everdraft.url}/health", timeout=60).status_code == 200
        refused = httpx.post(f"{everdraft.url}/v1/completions", json=LONG | {"n": 1}, timeout=60)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["type"] == "service_unavailable_error"
        assert reader.thread.is_alive(), "it was under way all the while"
        reader.thread.join()
        assert reader.failure == ""
        assert reader.ends == ["length"] * NUM_CHOICES
        assert reader.events[-1] == "[DONE]"
        everdraft.wait_until_gone(GONE_S)
        assert everdraft.process.returncode == 0, everdraft.said()
        assert "draining" in everdraft.said() and "aborted" not in everdraft.said()


@pytest.mark.slow
def test_a_second_signal_ends_them_at_once_with_an_error(tmp_path: Path) -> None:
    with served(tmp_path) as everdraft:
        reader = Reader(everdraft.url)
        assert reader.began.wait(120), reader.failure
        everdraft.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "draining" in everdraft.said(), 60)
        everdraft.process.send_signal(signal.SIGTERM)
        reader.thread.join(120)
        assert not reader.thread.is_alive() and reader.failure == ""
        assert len(reader.ends) < NUM_CHOICES
        assert '"error"' in reader.events[-2] and reader.events[-1] == "[DONE]"
        everdraft.wait_until_gone(GONE_S)
        assert everdraft.process.returncode == 0, everdraft.said()
        assert "aborted" in everdraft.said()
