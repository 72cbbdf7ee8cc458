"""Clients that leave, deadlines, full queues and shutdown: the slot is free within a round."""

import asyncio
import threading
import time

import httpx
import openai
import pytest
from fastapi import Request

from serving.api.answering import CLIENT_LEFT, respond
from serving.api.completions import CompletionRenderer
from serving.api.request_plan import RequestPlan, sampling_of
from serving.api.request_schema import CompletionBody
from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server

LONG = {"prompt": "a", "max_tokens": 230, "ignore_eos": True, "num_draft_tokens": 0}
MANY = 32


def busy(server: LiveServer, num_running: int = 1) -> None:
    deadline_s = time.monotonic() + 5
    while server.parts.engine.stats().num_running < num_running:
        assert time.monotonic() < deadline_s, "the request did not start"
        time.sleep(0.001)


def aborted(server: LiveServer) -> float:
    for line in server.parts.context.metrics.render().decode().splitlines():
        if line.startswith("everdraft_request_success_total") and 'finished_reason="abort"' in line:
            return float(line.rpartition(" ")[2])
    return 0.0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.asyncio
async def test_a_client_that_leaves_frees_its_slot(server: LiveServer, stream: bool) -> None:
    before = aborted(server)
    tokens_before = server.parts.engine.stats().num_output_tokens
    async with httpx.AsyncClient(timeout=30) as client:
        task = asyncio.ensure_future(
            client.post(f"{server.url}/v1/completions", json=LONG | {"stream": stream, "n": MANY})
        )
        await asyncio.to_thread(busy, server, 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    server.wait_until_idle(timeout_s=2.0)
    # Far more choices than slots: however fast the engine is, most of them had not begun.
    assert server.parts.engine.stats().num_output_tokens - tokens_before < MANY * 230 // 2
    assert aborted(server) >= before + MANY // 2
    assert server.parts.context.admission.num_in_flight == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.asyncio
async def test_a_client_that_leaves_ends_the_submission_of_its_request(
    server: LiveServer, stream: bool
) -> None:
    """No generation is submitted once it has left, and before that others have their turns."""
    context, turns = server.parts.context, 0

    async def receive() -> dict[str, str]:
        """It leaves when the event loop has come round twice."""
        nonlocal turns
        while turns < 2:
            turns += 1
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    request = Request({"type": "http", "headers": []}, receive)
    body = CompletionBody.model_validate(LONG | {"n": 64, "stream": stream})
    plan = RequestPlan(
        api_id="cmpl-test",
        created=0,
        model="tiny",
        body=body,
        prompts=((5,),),
        sampling=sampling_of(context, body, 230, None, None),
        route=None,
        capture="off",
    )
    before = aborted(server)
    response = await respond(context, request, plan, CompletionRenderer(context.codec, plan, [""]))
    assert response.status_code == CLIENT_LEFT
    assert 0 < aborted(server) - before < 64
    assert context.admission.num_in_flight == 0
    server.wait_until_idle(timeout_s=5.0)


def test_a_deadline_ends_the_request_with_408(tiny_pair: tuple[str, str]) -> None:
    settings = ServingSettings(
        compile="off",
        target=tiny_pair[0],
        draft=tiny_pair[1],
        num_slots=1,
        max_seq_len=512,
        request_timeout_s=0.05,
    )
    with live_server(settings) as server:
        body = LONG | {"max_tokens": 500}
        refused = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert refused.status_code == 408
        assert refused.json()["error"]["type"] == "timeout_error"
        streamed = httpx.post(f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=30)
        *_, error, done, end = streamed.text.split("\n\n")
        assert '"type":"timeout_error"' in error
        assert (done, end) == ("data: [DONE]", "")
        server.wait_until_idle(timeout_s=2.0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_may_give_itself_less_time_also_where_it_never_gets_a_slot(
    tiny_pair: tuple[str, str], stream: bool
) -> None:
    """The one that runs holds the only slot for longer than a test may take."""
    settings = ServingSettings(
        compile="off", target=tiny_pair[0], draft=tiny_pair[1], num_slots=1, max_seq_len=256
    )
    with live_server(settings) as server:
        num_prompt_tokens = server.parts.engine.stats().num_prompt_tokens
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"n": 60, "stream": True}):
            busy(server)
            url, body = (
                f"{server.url}/v1/completions",
                LONG | {"prompt": "b" * 40, "max_tokens": 200, "stream": stream},
            )
            late = httpx.post(url, json=body, headers={"X-Request-Timeout": "0.05"}, timeout=30)
            assert "took longer than 0.05 s" in late.text and '"type":"timeout_error"' in late.text
            assert late.status_code == (200 if stream else 408)
        server.wait_until_idle(timeout_s=30.0)
        taken_in = server.parts.engine.stats().num_prompt_tokens - num_prompt_tokens
        assert taken_in <= 60, "its prompt of 40 tokens was never computed"


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_a_timeout_that_is_none_is_refused(server: LiveServer, value: str) -> None:
    headers = {"X-Request-Timeout": value}
    answer = httpx.post(f"{server.url}/v1/completions", json=LONG, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Request-Timeout")


def test_no_request_gives_itself_more_time_than_there_is(tiny_pair: tuple[str, str]) -> None:
    settings = ServingSettings(
        compile="off",
        target=tiny_pair[0],
        draft=tiny_pair[1],
        num_slots=1,
        max_seq_len=512,
        request_timeout_s=0.05,
    )
    with live_server(settings) as server:
        body, headers = LONG | {"max_tokens": 500, "n": 8}, {"X-Request-Timeout": "600"}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=30)
        assert answer.status_code == 408 and "0.05 s" in answer.json()["error"]["message"]


def test_a_full_queue_answers_429_with_retry_after_and_recovers(tiny_pair: tuple[str, str]) -> None:
    settings = ServingSettings(
        compile="off",
        target=tiny_pair[0],
        draft=tiny_pair[1],
        num_slots=1,
        max_seq_len=256,
        max_queued_requests=1,
    )
    with live_server(settings) as server:
        url = f"{server.url}/v1/completions"
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(httpx.post(url, json=LONG).status_code))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        deadline_s = time.monotonic() + 5
        while server.parts.context.admission.num_in_flight < 2:
            assert time.monotonic() < deadline_s, "the requests did not start"
            time.sleep(0.001)
        refused = httpx.post(url, json=LONG)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=5) as patient:
            assert patient.completions.create(model=settings.served_name, prompt="a").choices
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        assert "everdraft_requests_rejected_total" in httpx.get(f"{server.url}/metrics").text


def test_what_cannot_be_queued_is_refused_before_its_prompt_is_tokenised(tiny_pair: tuple[str, str]) -> None:
    """Only its tokens could tell that each of these is too long: idle, the server says so."""
    settings = ServingSettings(
        compile="off",
        target=tiny_pair[0],
        draft=tiny_pair[1],
        num_slots=1,
        max_seq_len=256,
        max_queued_requests=0,
    )
    text = "fox " * 20_000
    bodies: dict[str, dict[str, object]] = {
        "completions": {"prompt": text},
        "chat/completions": {"messages": [{"role": "user", "content": text}]},
        "responses": {"input": text},
    }

    def statuses() -> set[int]:
        posts = (
            httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60) for path, body in bodies.items()
        )
        return {answer.status_code for answer in posts}

    with live_server(settings) as server:
        assert statuses() == {400}
        ticket = server.parts.context.admission.admit(1, 1)
        assert statuses() == {429}
        ticket.release()
        assert statuses() == {400}


def test_a_draining_replica_ends_what_it_has_and_takes_no_more(tiny_pair: tuple[str, str]) -> None:
    settings = ServingSettings(
        compile="off", target=tiny_pair[0], draft=tiny_pair[1], num_slots=2, max_seq_len=256
    )
    with live_server(settings) as server:
        answers: list[httpx.Response] = []
        url = f"{server.url}/v1/completions"
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url, json=LONG, timeout=30)))
        thread.start()
        busy(server)
        assert server.parts.context.drain() == 1
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 200
        refused = httpx.post(url, json=LONG)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.headers["connection"] == "close", "the next request finds another server"
        thread.join()
        assert server.parts.context.drain() == 0
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 230


def test_an_engine_that_closes_ends_open_requests_with_an_error(tiny_pair: tuple[str, str]) -> None:
    settings = ServingSettings(
        compile="off", target=tiny_pair[0], draft=tiny_pair[1], num_slots=2, max_seq_len=256
    )
    with live_server(settings) as server:
        answers: list[httpx.Response] = []
        url = f"{server.url}/v1/completions"
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url, json=LONG, timeout=30)))
        thread.start()
        busy(server)
        server.parts.close()
        thread.join()
        assert answers[0].status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503
