"""everdraft inside a vLLM server that it did not start: records, a learner beside it, swaps, and faults."""

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
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from buffer.names import DEFAULT_ROUTE
from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_server import EmbeddedRedis
from deploy.demo.corpus import prompts
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
    """A plain vLLM, and the Redis that it was told of."""

    url: str
    redis: EmbeddedRedis
    folder: Path
    feed: RedisAdapterFeed

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("plugin")
    redis = EmbeddedRedis(folder=folder / "redis").start()
    port = free_port()
    speculative = {"method": "draft_model", "model": DRAFT, "num_speculative_tokens": 3}
    environment = {**os.environ, REDIS_URL: redis.url}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", TARGET]
    command += ["--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "256"]
    command += ["--max-num-seqs", "8", "--enforce-eager", "--no-async-scheduling", "--port", str(port)]
    command += ["--speculative-config", json.dumps(speculative), "--host", "127.0.0.1"]
    command += ["--worker-extension-cls", "serving.engines.async_llm.worker.EverdraftWorker"]
    with (folder / "vllm.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment | vllm_environment(None, 1, environment), stdout=log, stderr=log
        )
    revision = weights_revision(load_model(TARGET))
    found = Server(f"http://127.0.0.1:{port}", redis, folder, RedisAdapterFeed(redis.url, revision))
    try:
        _until(lambda: _is_up(found.url), START_S, folder / "vllm.log")
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        redis.stop()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except OSError:
        return False


def _until(holds: Callable[[], bool], wait_s: float, log: Path) -> None:
    deadline_s = time.monotonic() + wait_s
    while not holds():
        assert time.monotonic() < deadline_s, log.read_text()[-3000:]
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plain_vllm_learns_and_survives(server: Server) -> None:
    stream = prompts("sql", "replay")
    texts = [prompt.messages[-1]["content"] for prompt in islice(stream, 400)]
    held = texts[:12]
    said = server.ask_all(held)
    before = server.acceptance(held)
    learner_log = server.folder / "learner.log"
    with learner_log.open("w") as log:
        command = [sys.executable, "-c", "from deploy.cli import main; main()", "learn"]
        command += ["--target", TARGET, "--draft", DRAFT, "--redis-url", server.redis.url]
        command += ["--state-dir", str(server.folder / "state")]
        learner = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        began_s, at = time.monotonic(), 0
        while server.feed.latest(DEFAULT_ROUTE) is None:
            assert time.monotonic() - began_s < LEARN_S, learner_log.read_text()[-2000:]
            server.ask_all(texts[at % 384 : at % 384 + 16])
            at += 16
        _until(lambda: _served(server) >= 1, 30.0, server.folder / "vllm.log")
        assert server.ask_all(held) == said, "the text is the target's, whatever drafts"
        assert server.acceptance(held) >= before + 0.2

        # what does not fit is refused, and what serves goes on
        latest = server.feed.latest(DEFAULT_ROUTE)
        assert latest is not None
        learner.kill()
        manifest, weights = tiny_adapter(DRAFT, draft_version=900, target_revision=latest.target_revision)
        server.feed.publish(replace(manifest, draft_revision="0" * 64), weights)
        _until(lambda: bool(_rejections(server)), 30.0, server.folder / "vllm.log")
        assert server.ask_all(held) == said
        assert _served(server) < 900

        # the floor is one call away
        server.redis.stop()
        assert server.ask_all(held) == said, "without Redis, without a learner"
    finally:
        learner.kill()
        learner.wait(10)


def _served(server: Server) -> int:
    return max((status.serving_versions[DEFAULT_ROUTE] for status in server.feed.statuses()), default=0)


def _rejections(server: Server) -> list[Any]:
    return [event for event in server.feed.history(DEFAULT_ROUTE) if event.kind == "rejected_by_replica"]
