"""The whole product on one machine: real Ray Serve, a real Redis, real MLflow, the demo pair, real traffic.

One system is started for the file; the tests build on each other in order, as one long day of operation.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import httpx
import psutil
import pytest
from mlflow import MlflowClient
from openai import OpenAI

from buffer.names import DEFAULT_ROUTE
from buffer.redis_server import EmbeddedRedis
from deploy.commands.demo import LEARNER, PAIR
from deploy.demo.corpus import prompts
from deploy.demo.traffic import Ask, Clients, RequestOutcome
from deploy.learning import registered_base_name
from deploy.settings import Settings
from deploy.wiring import RunningSystem, open_feed, running_system
from learner.settings import LearnerSettings
from tests.support.ports import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
WAIT_S = 400.0
"""Not how long a thing takes, but after how long it is given up."""


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(scope="module")
def system(redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    settings = Settings.model_validate(
        {
            "serving": {
                "target": str(PAIR / "target"),
                "draft": str(PAIR / "draft"),
                "model_name": "demo",
                "num_threads": 1,
                "compile": "off",
                "max_seq_len": 512,
                "status_interval_s": 0.2,
            },
            "learner": {**LEARNER, "min_records_per_cycle": 16},
            "redis": {"url": redis.url},
            "cluster": {"port": free_port(), "state_dir": tmp_path_factory.mktemp("state")},
        }
    )
    with running_system(settings, lambda words: None) as system:
        yield system


class Load:
    """Clients that keep asking until told to stop; everything that came back is kept."""

    def __init__(self, system: RunningSystem, domain: str, num_clients: int = 4) -> None:
        self.outcomes: list[RequestOutcome] = []
        self._stop = threading.Event()
        self._asks = (Ask(prompt, max_tokens=48) for prompt in prompts(domain, "replay", seed=5))
        self._clients = Clients(system.url, num_clients)
        self._num_clients = num_clients
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for(self, num_answers: int) -> None:
        goal = len(self.outcomes) + num_answers
        wait_until(lambda: len(self.outcomes) >= goal)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._clients.send(list(islice(self._asks, 8 * self._num_clients)), self.outcomes.append)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline_s, "it did not come about in time"
        time.sleep(0.1)


def test_traffic_becomes_a_better_draft_that_serves(system: RunningSystem) -> None:
    feed = open_feed(system.redis_url, system.target_revision)
    with Load(system, "sql") as load:
        wait_until(lambda: feed.last_version(DEFAULT_ROUTE) >= 1)
        wait_until(lambda: bool(load.outcomes) and load.outcomes[-1].draft_version >= 1)
        load.wait_for(20)
    assert not [outcome.error for outcome in load.outcomes if outcome.error]
    assert load.outcomes[0].draft_version == 0 and load.outcomes[-1].draft_version >= 1
    manifest = feed.manifest(DEFAULT_ROUTE, 1)
    # Live acceptance is of what the controller chose to draft; the gate's is of the same records for both.
    assert manifest.evidence["acceptance_candidate"] > manifest.evidence["acceptance_floor"]
    [status] = feed.statuses()
    assert status.num_swaps >= 1
    feed.close()


def test_the_answer_is_the_targets_whatever_draft_serves(system: RunningSystem) -> None:
    client = OpenAI(base_url=f"{system.url}/v1", api_key="none")
    prompt = next(prompts("sql", "heldout"))
    texts = {
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": prompt.messages[0]["content"]}],
            max_tokens=60,
            temperature=temperature,
            seed=7,
            store=False,
            extra_body={"num_draft_tokens": length},
        )
        .choices[0]
        .message.content
        for temperature in (0.0,)
        for length in (0, 1, 4)
    }
    assert len(texts) == 1


def test_metrics_tell_acceptance_by_version_and_replica(system: RunningSystem) -> None:
    text = httpx.get(f"{system.url}/metrics").text
    lines = [
        line for line in text.splitlines() if line.startswith("everdraft_spec_decode_num_accepted_tokens")
    ]
    assert any('draft_version="0"' in line for line in lines)
    assert any('draft_version="1"' in line and "replica=" in line for line in lines)


def test_mlflow_knows_what_serves(system: RunningSystem) -> None:
    client = MlflowClient(system.settings.tracking_uri)
    settings = system.settings
    base = registered_base_name(settings.learner, settings.serving.target, system.target_revision)
    name = f"{base}-{DEFAULT_ROUTE}"

    def aliases() -> dict[str, str]:
        found = client.search_registered_models(filter_string=f"name = '{name}'")
        return dict(found[0].aliases) if found else {}

    wait_until(lambda: "serving" in aliases())
    serving = client.get_model_version_by_alias(name, "serving")
    assert "acceptance" in serving.tags["evidence"]
    assert client.get_run(serving.run_id).data.params["lora_rank"] == str(LearnerSettings().lora_rank)
    # The figures of the cycle that promoted are sent after the alias, from the tracker's own thread.
    wait_until(lambda: "loss" in client.get_run(serving.run_id).data.metrics)


@pytest.mark.slow
def test_redis_killed_and_restarted_under_load_fails_no_request(
    system: RunningSystem, redis: EmbeddedRedis
) -> None:
    with Load(system, "code") as load:
        load.wait_for(10)
        psutil.Process(redis.pid).kill()
        load.wait_for(30)
        redis.start()
        load.wait_for(10)
        feed = open_feed(redis.url, system.target_revision)
        wait_until(lambda: len(feed.statuses()) == 1)
        versions_before = {outcome.draft_version for outcome in load.outcomes[-5:]}
        # The feed came back empty; the learner publishes again from its checkpoint, and goes on.
        wait_until(lambda: feed.last_version(DEFAULT_ROUTE) >= max(versions_before))
        load.wait_for(5)
        feed.close()
    assert len(load.outcomes) >= 55
    assert not [outcome.error for outcome in load.outcomes if outcome.error]


def test_a_killed_learner_goes_on_where_it_was(system: RunningSystem) -> None:
    assert system.learner is not None
    learner = system.learner
    wait_until(lambda: learner.snapshot().get("state") in {"waiting", "learning"})
    before = learner.snapshot()
    os.kill(learner.snapshot()["pid"], signal.SIGKILL)
    with Load(system, "maths") as load:
        wait_until(lambda: learner.snapshot().get("num_steps", 0) > before["num_steps"])
        after = learner.snapshot()
    assert after["pid"] != before["pid"]
    assert after["last_version"] >= before["last_version"]
    assert after["num_records_seen"] >= before["num_records_seen"]
    assert after["mlflow_run_id"] == before["mlflow_run_id"]
    assert not [outcome.error for outcome in load.outcomes if outcome.error]


def test_the_state_folder_holds_what_outlives_the_processes(system: RunningSystem) -> None:
    state_dir: Path = system.settings.state_dir
    assert list((state_dir / "learner-checkpoints").iterdir())
    assert (state_dir / "mlflow" / "mlflow.db").stat().st_size > 0
