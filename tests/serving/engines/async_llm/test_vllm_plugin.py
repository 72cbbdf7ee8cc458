"""everdraft inside two vLLM servers that it did not start: records, a learner beside them, swaps on one first
and then on both, and faults."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from buffer.names import DEFAULT_ROUTE
from buffer.records import AdapterManifest, ServingStatus
from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_server import EmbeddedRedis
from deploy.demo.corpus import prompts
from learner.draft import export_weights, import_weights
from serving.engines.async_llm.environment import vllm_environment
from serving.engines.async_llm.plugin import REDIS_URL
from serving.models.loading import load_model, weights_revision
from tests.support.ports import free_port
from tests.support.tiny_adapters import tiny_adapter

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

PAIR = Path(__file__).parents[4] / "deploy" / "demo" / "pair"
TARGET, DRAFT = str(PAIR / "target"), str(PAIR / "draft")
START_S, LEARN_S = 240.0, 400.0


@dataclass
class Server:
    """A plain vLLM."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return True
        except OSError:
            return False

    def ask(self, text: str) -> dict[str, Any]:
        body = {"model": "demo", "prompt": text, "max_tokens": 40, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found

    def ask_all(self, texts: list[str]) -> list[str]:
        with ThreadPoolExecutor(8) as pool:
            return [answer["choices"][0]["text"] for answer in pool.map(self.ask, texts)]

    def counts(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {
            line.split("{")[0].removeprefix("vllm:spec_decode_num_"): float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("vllm:spec_decode_num_") and "_total{" in line and "per_pos" not in line
        }

    def acceptance(self, texts: list[str]) -> float:
        """Accepted over drafted tokens, as vLLM counts them."""
        before = self.counts()
        self.ask_all(texts)
        after = self.counts()
        spent = {name: after[name] - before[name] for name in after}
        return spent["accepted_tokens_total"] / spent["draft_tokens_total"]


@dataclass
class Fleet:
    """Two plain vLLMs, and the Redis that both were told of."""

    servers: tuple[Server, Server]
    redis: EmbeddedRedis
    folder: Path
    feed: RedisAdapterFeed
    revision: str

    def ask_both(self, texts: list[str]) -> list[list[str]]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda server: server.ask_all(texts), self.servers))

    def statuses(self) -> list[ServingStatus]:
        """The canary's first."""
        return sorted(self.feed.statuses(), key=lambda status: status.replica_id)

    def serving(self) -> list[int]:
        return [status.serving_versions[DEFAULT_ROUTE] for status in self.statuses()]

    def events(self, kind: str) -> list[Any]:
        return [event for event in self.feed.history(DEFAULT_ROUTE) if event.kind == kind]

    def until(self, holds: Callable[[], bool], wait_s: float = 60.0) -> None:
        deadline_s = time.monotonic() + wait_s
        while not holds():
            logs = "\n".join(log.read_text()[-2000:] for log in self.folder.glob("*.log"))
            assert time.monotonic() < deadline_s, logs
            time.sleep(0.2)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("plugin")
    redis = EmbeddedRedis(folder=folder / "redis").start()
    servers = (_start(folder, redis.url, 1), _start(folder, redis.url, 2))
    revision = weights_revision(load_model(TARGET))
    found = Fleet(servers, redis, folder, RedisAdapterFeed(redis.url, revision), revision)
    try:
        found.until(lambda: all(server.is_up for server in servers), START_S)
        yield found
    finally:
        for server in servers:
            server.process.send_signal(signal.SIGTERM)
        for server in servers:
            server.process.wait(60)
        redis.stop()


def _start(folder: Path, redis_url: str, number: int) -> Server:
    port = free_port()
    speculative = {"method": "draft_model", "model": DRAFT, "num_speculative_tokens": 3}
    environment = {**os.environ, REDIS_URL: redis_url}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", TARGET]
    command += ["--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "256"]
    command += ["--max-num-seqs", "8", "--enforce-eager", "--no-async-scheduling", "--port", str(port)]
    command += ["--speculative-config", json.dumps(speculative), "--host", "127.0.0.1"]
    command += ["--worker-extension-cls", "serving.engines.async_llm.worker.EverdraftWorker"]
    path = folder / f"vllm-{number}.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            command, env=environment | vllm_environment(1, 1, environment), stdout=log, stderr=log
        )
    return Server(f"http://127.0.0.1:{port}", path, process)


@contextlib.contextmanager
def _learner(fleet: Fleet) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "learn"]
    command += ["--target", TARGET, "--draft", DRAFT, "--redis-url", fleet.redis.url]
    command += ["--state-dir", str(fleet.folder / "state")]
    with (fleet.folder / "learner.log").open("w") as log:
        learner = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield learner
    finally:
        learner.kill()
        learner.wait(10)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_plain_vllms_learn_and_survive(fleet: Fleet) -> None:
    texts = [prompt.messages[-1]["content"] for prompt in islice(prompts("sql", "replay"), 400)]
    held, first = texts[:12], fleet.servers[0]
    said = first.ask_all(held)
    before = [server.acceptance(held) for server in fleet.servers]
    traffic = cycle([texts[at : at + 16] for at in range(16, 400, 16)])

    def until(holds: Callable[[], bool]) -> None:
        began_s = time.monotonic()
        while not holds():
            assert time.monotonic() - began_s < LEARN_S, (fleet.folder / "learner.log").read_text()[-2000:]
            fleet.ask_both(next(traffic))

    with _learner(fleet) as learner:
        # one serves what passed the gate, then both
        until(lambda: bool(fleet.events("promoted")))
        fleet.until(lambda: fleet.serving()[0] >= 1 or bool(fleet.events("confirmed")))
        assert fleet.serving()[1] == 0 or fleet.events("confirmed")
        until(lambda: bool(fleet.events("confirmed")))
        fleet.until(lambda: min(fleet.serving()) >= 1)
        assert fleet.ask_both(held) == [said, said], "the text is the target's, whatever drafts"
        for server, floor in zip(fleet.servers, before, strict=True):
            until(lambda server=server, least=floor + 0.2: server.acceptance(held) >= least)  # type: ignore[misc]

        # a draft that is worse live goes back from the one, and the other never served it
        worse: set[int] = set()

        def has_gone_back() -> bool:
            latest = fleet.feed.latest(DEFAULT_ROUTE)
            assert latest is not None
            if fleet.events("rolled_back"):
                return True
            if latest.draft_version not in worse:  # the first, or the learner was about to publish another
                worse.add(_publish_worse(fleet, latest))
            return False

        until(has_gone_back)
        assert "worse on live traffic" in fleet.events("rolled_back")[0].reason
        fleet.until(lambda: not worse.intersection(fleet.serving()))
        drafted = [{each.draft_version for each in status.counts} for status in fleet.statuses()]
        assert worse & drafted[0] and not worse & drafted[1]

        # what does not fit is refused by both, and what serves goes on; nobody is left to roll it back
        learner.kill()
    manifest, weights = tiny_adapter(DRAFT, draft_version=900, target_revision=fleet.revision)
    fleet.feed.publish(replace(manifest, draft_revision="0" * 64), weights)
    fleet.until(lambda: len(fleet.events("rejected_by_replica")) == 2)
    assert fleet.ask_both(held) == [said, said]
    assert max(fleet.serving()) < 900

    fleet.redis.stop()
    assert fleet.ask_both(held) == [said, said], "without Redis, without a learner"


def _publish_worse(fleet: Fleet, good: AdapterManifest) -> int:
    """The floor in the name of a successor, on trial on one replica. Returns its version."""
    learnt = import_weights(fleet.feed.weights(DEFAULT_ROUTE, good.draft_version))
    weights = export_weights({key: tensor * 0 for key, tensor in learnt.items()})
    manifest = replace(
        good,
        draft_version=good.draft_version + 5,  # the learner may be about to publish the next one
        parent_version=good.draft_version,
        sha256=hashlib.sha256(weights).hexdigest(),
        created_at_s=time.time(),
    )
    fleet.feed.publish(manifest, weights, on_trial=True)
    return manifest.draft_version
