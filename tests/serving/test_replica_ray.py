"""The deployment on a real Ray Serve with a real Redis: two replicas, one endpoint."""

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import httpx
import openai
import pytest
import ray
from ray import serve

from buffer.records import GenerationRecord
from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_server import EmbeddedRedis
from buffer.redis_store import RedisRecordStore
from deploy.log_relay import log_relay
from serving.api.request_ids import SERVE_PROXY_ENVIRONMENT
from serving.log_lines import LogPlan
from serving.models.loading import load_pair
from serving.replica import build_deployment
from serving.settings import ServingSettings
from tests.support.ports import free_port
from tests.support.tiny_adapters import tiny_adapter

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    # Ray leaves sockets and files of its own to the garbage collector, and warns about its own future.
    pytest.mark.filterwarnings("default::ResourceWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]

PAGE = "https://chat.example.org"


def wait_for(condition: Callable[[], bool], timeout_s: float = 150.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with EmbeddedRedis() as server:
        yield server.url


@pytest.fixture(scope="module")
def logged() -> list[str]:
    """Every line that the replicas logged."""
    return []


@pytest.fixture(scope="module")
def logs(logged: list[str]) -> Iterator[LogPlan]:
    with log_relay(logged.append) as path:
        yield LogPlan("json", path)


@pytest.fixture(scope="module")
def endpoint(tiny_pair: tuple[str, str], redis_url: str, logs: LogPlan) -> Iterator[str]:
    settings = ServingSettings(
        compile="off",
        target=tiny_pair[0],
        draft=tiny_pair[1],
        model_name="tiny",
        allowed_origins=(PAGE,),
        num_slots=4,
        max_seq_len=512,
        num_draft_tokens=2,
        num_threads=1,
        num_replicas=2,
        status_interval_s=0.2,
        drain_timeout_s=300.0,  # a busy machine takes its time, and no test is about that
    )
    port = free_port()
    os.environ.update(SERVE_PROXY_ENVIRONMENT)
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_deployment(settings, redis_url, logs=logs), route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        for name in SERVE_PROXY_ENVIRONMENT:
            del os.environ[name]


@pytest.fixture(scope="module")
def client(endpoint: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def by_replica(endpoint: str, pattern: str) -> dict[str, float]:
    """A metric of both replicas; a scrape reaches only one of them."""
    found: dict[str, float] = {}
    deadline_s = time.monotonic() + 150
    while len(found) < 2 and time.monotonic() < deadline_s:
        text = httpx.get(f"{endpoint}/metrics", timeout=150).text
        [replica] = set(re.findall(r'replica="([^"]+)"', text))
        values = re.findall(rf"^{pattern}.* (\S+)$", text, re.MULTILINE)
        found[replica] = sum(map(float, values))
    assert len(found) == 2, found
    return found


def test_the_official_client_is_answered_whole_and_streamed(client: openai.OpenAI) -> None:
    request = {"model": "tiny", "prompt": "the quick", "max_tokens": 30, "seed": 1}
    whole = client.completions.create(**request)
    texts = {
        "".join(chunk.choices[0].text for chunk in client.completions.create(**request, stream=True))
        for _ in range(4)
    }
    assert texts == {whole.choices[0].text}
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**request, frequency_penalty=2.1)
    assert refused.value.param == "frequency_penalty"


def test_heads_and_preflights_pass_serve_s_proxy(endpoint: str) -> None:
    head = httpx.head(f"{endpoint}/health", timeout=150)
    assert (head.status_code, head.content) == (200, b"")
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{endpoint}/v1/completions", headers=asked, timeout=150)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, PAGE)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([], False),
        ([b"mine-1"], True),
        ([b"mine-1", b"mine-2"], True),
        ([b"\xff"], False),
        (["東京".encode()], False),
        ([b""], False),
        ([b"x" * 500], False),
    ],
)
def test_a_request_id_is_sent_once_and_whatever_it_is_the_request_is_answered(
    endpoint: str, given: list[bytes], kept: bool
) -> None:
    headers = [(b"X-Request-Id", value) for value in given]
    for path in ("/health", "/v1/nothing"):
        answer = httpx.get(endpoint + path, headers=headers)
        assert answer.status_code == (200 if path == "/health" else 404)
        [sent] = answer.headers.get_list("x-request-id")
        assert (sent == "mine-1") == kept and len(sent) == (6 if kept else 32)


def test_the_official_client_reads_its_own_request_id(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="a", extra_headers={"X-Request-Id": "mine-3"})
    assert answer._request_id == "mine-3"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in (
            b"Serve-Multiplexed-Model-Id",
            b"X-Session-Id",
            b"X-Request-Timeout-Seconds",
            b"X-Request-Disconnect-Disabled",
            b"Authorization",
            b"traceparent",
        )
        for value in (b"\xff", b"0.00001")
    ],
)
def test_no_header_reaches_what_is_in_front_of_the_app(endpoint: str, name: bytes, value: bytes) -> None:
    assert httpx.get(f"{endpoint}/health", headers=[(name, value)], timeout=150).status_code == 200


def test_a_body_too_large_is_refused_through_the_proxy_too(endpoint: str) -> None:
    for body in (b" " * 2_000_000, iter([b" " * 100_000] * 20)):
        answer = httpx.post(
            f"{endpoint}/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")


def test_requests_of_both_replicas_are_recorded(
    client: openai.OpenAI, tiny_pair: tuple[str, str], redis_url: str
) -> None:
    """Each under its own replica's name, and no more tokens than that replica has counted."""
    store = RedisRecordStore(redis_url)
    feed = RedisAdapterFeed(redis_url, load_pair(tiny_pair[0]).target_revision)

    def records() -> dict[str, GenerationRecord]:
        keys = store.keys()
        kept = [record for key in keys for record in store.draw_replay(key, 10_000, seed=0)]
        return {record.record_id: record for record in kept}

    def new_records() -> list[GenerationRecord]:
        return [record for name, record in records().items() if name not in before]

    def ask_until_both_have_recorded() -> bool:
        message = {"role": "user", "content": "hi"}
        asked.append(client.chat.completions.create(model="tiny", messages=[message], max_tokens=4))
        return len({record.replica_id for record in new_records()}) == 2

    def all_is_counted() -> bool:
        recorded = Counter[str]()
        for record in new_records():
            recorded[record.replica_id] += len(record.output_token_ids)
        counted = {
            status.replica_id: sum(count.num_output_tokens for count in status.counts)
            for status in feed.statuses()
        }
        return recorded.keys() == counted.keys() and all(recorded[name] <= counted[name] for name in counted)

    before = records()
    asked: list[object] = []
    wait_for(ask_until_both_have_recorded)
    wait_for(lambda: len(new_records()) == len(asked))
    wait_for(all_is_counted)
    store.close()
    feed.close()


def test_replicas_log_requests_to_the_process_that_started_them(endpoint: str, logged: list[str]) -> None:
    """As JSON, with the id that the client gave, and of every replica."""
    answers: dict[str, str] = {}

    def told() -> dict[str, str]:
        """By request id, the replica that says it answered it."""
        lines = [line for line in map(json.loads, list(logged)) if line["message"] == "answered"]
        return {line["request_id"]: line["replica"] for line in lines if line["request_id"] in answers}

    def both_have_answered() -> bool:
        request_id = f"logged-{len(answers)}"
        answer = httpx.post(
            f"{endpoint}/v1/completions",
            json={"prompt": "a", "max_tokens": 1},
            headers={"X-Request-Id": request_id},
            timeout=150,
        )
        answers[request_id] = answer.json()["id"]
        return len(set(told().values())) == 2

    wait_for(both_have_answered)
    wait_for(lambda: told().keys() == answers.keys())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(endpoint: str, stream: bool) -> None:
    running, aborted = "everdraft_num_requests_running", r'everdraft_request_success_total\{.*"abort"'
    body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "num_draft_tokens": 0, "stream": stream}

    def num_aborted() -> float:
        return sum(by_replica(endpoint, aborted).values())

    def leaves(patience_s: float) -> None:
        with httpx.Client(timeout=httpx.Timeout(150, read=None if stream else patience_s)) as hasty:
            if stream:
                with hasty.stream("POST", f"{endpoint}/v1/completions", json=body) as response:
                    next(response.iter_raw())
            else:
                with suppress(httpx.ReadTimeout):
                    hasty.post(f"{endpoint}/v1/completions", json=body)

    before = num_aborted()
    for patience_s in (0.1, 0.2, 0.4, 0.8, 1.6):  # how long a request takes to begin is the machine's affair
        leaves(patience_s)
        wait_for(lambda: sum(by_replica(endpoint, running).values()) == 0)
        if num_aborted() > before:
            return
    pytest.fail("none of those that left was aborted")


def test_two_replicas_converge_on_one_version_and_back_to_the_floor(
    client: openai.OpenAI, tiny_pair: tuple[str, str], redis_url: str
) -> None:
    target_revision = load_pair(tiny_pair[0]).target_revision
    feed = RedisAdapterFeed(redis_url, target_revision)

    def served() -> list[int]:
        return [status.serving_versions["default"] for status in feed.statuses()]

    def text() -> str:
        answer = client.completions.create(model="tiny", prompt="abc", max_tokens=40, temperature=0)
        return answer.choices[0].text

    wait_for(lambda: served() == [0, 0])
    on_the_floor = text()
    for version in (1, 2):
        feed.publish(*tiny_adapter(tiny_pair[1], draft_version=version, target_revision=target_revision))
    wait_for(lambda: served() == [2, 2])
    assert {text() for _ in range(4)} == {on_the_floor}
    assert len({status.replica_id for status in feed.statuses()}) == 2
    feed.rollback("default", "a test", to_version=0)
    wait_for(lambda: served() == [0, 0])
    feed.close()


def test_shutdown_waits_for_the_requests_under_way(endpoint: str) -> None:
    """Last: it takes the application down."""
    began, events = threading.Event(), []
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "num_draft_tokens": 0, "stream": True}

    def read() -> None:
        with httpx.stream("POST", f"{endpoint}/v1/completions", json=body, timeout=150) as response:
            for line in response.iter_lines():
                events.append(line)
                began.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(150)
    serve.delete("default")
    reader.join()
    *_, last, _, done, _ = events
    assert done == "data: [DONE]"
    assert '"finish_reason":"length"' in last
