"""Capture mode `memory`: what a user wrote, and what was answered, reaches no disk; yet the draft learns.

A secret is planted in every kind of request, good and bad, and looked for in all files and in the durable
Redis. The control is the same life in mode `replay`, where the same search finds it.
"""

import json
import logging
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgpack
import numpy as np
import pytest

from buffer.redis_server import EmbeddedRedis
from deploy.cluster import temp_root
from deploy.commands.demo import LEARNER, PAIR
from deploy.learning import build_learner
from deploy.private_memory import folder_in_memory
from deploy.settings import Settings
from deploy.wiring import running_system
from serving.capture_mode import CaptureMode
from serving.settings import ServingSettings
from tests.support import secret_search
from tests.support.live_server import live_server
from tests.support.ports import free_port
from tests.support.secret_search import Secret
from tests.support.tiny_learner import quick_settings
from tests.support.tiny_models import save_tiny_pair

WAIT_S = 120.0
NUM_REQUESTS = 40


def wait_until(holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "it did not come about in time"
        time.sleep(0.1)


@dataclass
class Plants:
    """What was said to the service and by it, with a word in it that nobody else says."""

    url: str
    words: list[str] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)

    def ask(self, number: int) -> None:
        """A question with a new secret; both its words and the answer's are looked for."""
        word = secrets.token_hex(12)
        prompt = f"my number is {word}, keep it"
        sent = {"prompt": prompt, "max_tokens": 12, "temperature": 0.8, "return_token_ids": True}
        if number % 4 == 0:
            stream = httpx.post(f"{self.url}/v1/completions", json=sent | {"stream": True}, timeout=60)
            assert stream.status_code == 200
            chunks = [
                json.loads(line[6:]) for line in stream.text.split("\n\n") if line.startswith("data: {")
            ]
            answered = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
        else:
            answer = httpx.post(f"{self.url}/v1/completions", json=sent, timeout=60)
            assert answer.status_code == 200, answer.text
            answered = answer.json()["choices"][0]["token_ids"]
        tokens = httpx.post(f"{self.url}/tokenize", json={"prompt": prompt}, timeout=60).json()["tokens"]
        self.words.append(word)
        self.token_ids += [tokens, answered]

    def misbehave(self) -> None:
        """Requests that are refused in every way that might show what they held."""
        word = secrets.token_hex(12)
        long = f"{word} " * 20_000
        bodies: list[tuple[str, str]] = [
            ("/v1/completions", f'{{"prompt": "{word}", "temperature": "{word}"}}'),
            ("/v1/completions", f'{{"prompt": "{word}'),
            ("/v1/completions", json.dumps({"prompt": long})),
            ("/v1/chat/completions", json.dumps({"messages": [{"role": word, "content": word}]})),
            ("/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": {"a": word}}]})),
            ("/v1/responses", json.dumps({"input": [{"type": word, "content": word}]})),
            ("/tokenize", json.dumps({"prompt": word, word: word})),
        ]
        for path, body in bodies:
            headers = {"Content-Type": "application/json"}
            answer = httpx.post(f"{self.url}{path}", content=body, headers=headers, timeout=60)
            assert 400 <= answer.status_code < 500, (path, answer.status_code)
        self.words.append(word)

    @property
    def secret(self) -> Secret:
        return Secret(self.words, self.token_ids)


@contextmanager
def everything_logged(file: Path) -> Iterator[None]:
    handler, root = logging.FileHandler(file), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)
        handler.close()


@dataclass
class Found:
    """What the search came to, and how much was learnt meanwhile."""

    in_files: dict[str, set[str]]
    in_redis: set[str]
    in_memory: set[str]
    num_steps: int


def life(state: Path, mode: CaptureMode, pair: tuple[str, str]) -> Found:
    """One replica and one learner on real servers, as the service puts them together."""
    serving = ServingSettings(
        compile="off",
        target=pair[0],
        draft=pair[1],
        model_name="tiny",
        num_slots=4,
        max_seq_len=256,
        capture=mode,
    )
    learning = quick_settings(
        checkpoint_folder=str(state / "learner"),
        tracking_uri=f"sqlite:///{state / 'mlflow' / 'mlflow.db'}",
        min_records_per_cycle=8,
        max_record_age_s=0.5,
    )
    stop = threading.Event()
    with (
        everything_logged(state / "log"),
        EmbeddedRedis(folder=state / "redis") as durable,
        EmbeddedRedis(is_sealed=True) as volatile,
        live_server(serving, "r0", durable.url, volatile.url) as live,
    ):
        learner = build_learner(serving, learning, durable.url, volatile.url)
        thread = threading.Thread(target=learner.run, args=(stop,))
        thread.start()
        try:
            plants = Plants(live.url)
            plants.misbehave()
            for number in range(NUM_REQUESTS):
                plants.ask(number)
            wait_until(lambda: learner.snapshot()["num_steps"] > 0)
            wait_until(lambda: learner.snapshot()["num_waiting_records"] == 0)
        finally:
            stop.set()
            thread.join()
        time.sleep(1.5)  # the append-only file is flushed once a second
        secret = plants.secret
        return Found(
            secret.found_in(state, Path(tempfile.gettempdir())),
            secret.found_at(durable.url),
            secret.found_at(volatile.url),
            learner.snapshot()["num_steps"],
        )


@pytest.fixture
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whatever is left in it is this test's."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


@pytest.mark.usefixtures("own_temporary_folder")
@pytest.mark.parametrize("mode", ["memory", "replay"])
def test_a_secret_reaches_a_disk_only_in_replay_mode(tmp_path: Path, mode: CaptureMode) -> None:
    state = tmp_path / "state"
    state.mkdir()
    found = life(state, mode, save_tiny_pair(tmp_path / "pair"))
    assert found.num_steps > 0, "the draft was taught"
    if mode == "memory":
        assert (found.in_files, found.in_redis) == ({}, set())
        assert "int32" in found.in_memory, "it was in the other Redis, and found there by the same search"
    else:
        assert {Path(file).name for file in found.in_files} == {"appendonly.aof"}
        assert found.in_files.popitem()[1] == {"int32"}
        assert (found.in_redis, found.in_memory) == ({"int32"}, set())


@pytest.mark.parametrize("form", ["text", "int32", "int64", "msgpack", "JSON"])
def test_the_search_finds_every_form(tmp_path: Path, form: str) -> None:
    """In the middle of a file, and where two pieces of it meet that are read apart."""
    ids = [901, 17, 70_000, 42, 5]
    secret = Secret(["my number is 7"], [ids])
    content = {
        "text": b"my number is 7",
        "int32": np.array(ids, dtype=np.int32).tobytes(),
        "int64": np.array(ids).tobytes(),
        "msgpack": msgpack.packb(ids),
        "JSON": json.dumps(ids).encode(),
    }[form]
    (tmp_path / "file").write_bytes(b"x" * (secret_search._CHUNK_BYTES - 5) + content + b"y")
    assert secret.found_in(tmp_path) == {str(tmp_path / "file"): {form}}
    (tmp_path / "file").write_bytes(content[:-1] if form == "text" else content[:5])
    assert secret.found_in(tmp_path) == {}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["memory", "replay"])
def test_the_whole_service_leaves_nothing_on_a_disk(tmp_path: Path, mode: CaptureMode) -> None:
    """With Ray, whose session, logs and spilled objects are searched too."""
    began_s, said = time.time(), list[str]()
    settings = Settings.model_validate(
        {
            "serving": {
                "target": str(PAIR / "target"),
                "draft": str(PAIR / "draft"),
                "num_threads": 1,
                "compile": "off",
                "max_seq_len": 512,
                "capture": mode,
            },
            "learner": {**LEARNER, "min_records_per_cycle": 16},
            "cluster": {"port": free_port(), "state_dir": tmp_path / "state"},
        }
    )
    with running_system(settings, said.append) as system:
        assert system.learner is not None
        plants = Plants(system.url)
        plants.misbehave()
        for number in range(NUM_REQUESTS):
            plants.ask(number)
        learner = system.learner
        wait_until(lambda: learner.snapshot().get("num_steps", 0) > 0, 400.0)
        time.sleep(1.5)  # as above
        roots = [tmp_path, temp_root(), *filter(None, [folder_in_memory()])]
        folders = [folder for root in roots for folder in [tmp_path, *root.glob("everdraft-*")]]
        sessions = [folder for folder in folders if list(folder.glob("session_*/logs"))]
        secret = plants.secret
        found = {
            name: forms
            for folder in dict.fromkeys(folders)
            for name, forms in secret.found_in(folder, since_s=began_s).items()
        }
        in_redis = secret.found_at(system.redis_url)
    assert sessions, "the search reaches Ray's own folder"
    assert ("starting a second Redis, which persists nothing" in said) == (mode == "memory")
    if mode == "memory":
        assert (found, in_redis) == ({}, set())
        assert any(folder.is_relative_to(folder_in_memory() or "/nowhere") for folder in sessions)
    else:
        assert {Path(file).name for file in found} == {"appendonly.aof"} and in_redis == {"int32"}
