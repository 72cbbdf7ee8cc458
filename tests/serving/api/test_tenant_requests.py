"""Requests of several tenants at one real server: whose key tags what, what is recorded, who is refused."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from buffer.records import GenerationRecord
from serving.settings import ServingSettings
from serving.tenants import digest_of
from tests.support.live_server import LiveServer, live_server

ISOLATED, SHARED, LIMITED, UNRECORDED, NOBODY = (f"key-number-{number}" for number in range(5))
SHORT = {"prompt": "the quick brown fox", "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def tenants_server(tiny_pair: tuple[str, str]) -> Iterator[LiveServer]:
    tenants: list[dict[str, Any]] = [
        {"name": "acme", "keys": [digest_of(ISOLATED)], "isolated": True, "routes": ["law", "verse"]},
        {"name": "globex", "keys": [digest_of(SHARED)], "routes": ["code"]},
        {
            "name": "initech",
            "keys": [digest_of(LIMITED)],
            "requests_per_minute": 3,
            "tokens_per_minute": 1000,
            "max_concurrent": 2,
        },
        {"name": "hooli", "keys": [digest_of(UNRECORDED)], "capture": "off"},
    ]
    settings = ServingSettings.model_validate(
        {
            "compile": "off",
            "target": tiny_pair[0],
            "draft": tiny_pair[1],
            "model_name": "tiny",
            "num_slots": 2,
            "max_seq_len": 512,
            "num_draft_tokens": 2,
            "api_keys": [NOBODY],
            "tenants": tenants,
        }
    )
    with live_server(settings) as live:
        yield live


def ask(
    server: LiveServer, key: str | None, headers: dict[str, str] | None = None, **body: Any
) -> httpx.Response:
    sent = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(
        f"{server.url}/v1/completions", json=SHORT | body, headers=sent | (headers or {}), timeout=60
    )


def record_of(server: LiveServer, answer: httpx.Response) -> GenerationRecord | None:
    """The only record of an answer, if there is one soon."""
    wanted, deadline_s = answer.json()["id"], time.monotonic() + 60
    exporter = server.parts._exporters["replay"]
    while exporter.num_exported < exporter.num_submitted:
        assert time.monotonic() < deadline_s, "records were not exported"
        time.sleep(0.01)
    streams = server.store.keys()
    kept = [one for key in streams for one in server.store.draw_replay(key, 10_000, 0)]
    return next((one for one in kept if one.request_id.startswith(wanted)), None)


def test_the_endpoint_asks_for_a_key_and_knows_each(tenants_server: LiveServer) -> None:
    for key in (ISOLATED, SHARED, UNRECORDED, NOBODY):
        assert ask(tenants_server, key).status_code == 200
    for wrong in (None, "key-number-9", digest_of(SHARED)):
        assert ask(tenants_server, wrong).status_code == 401


@pytest.mark.parametrize(
    ("key", "route", "status"),
    [
        (ISOLATED, "law", 200),
        (ISOLATED, "verse", 200),
        (ISOLATED, "code", 403),
        (ISOLATED, "default", 403),
        (SHARED, "code", 200),
        (SHARED, "law", 403),
        (SHARED, "other", 403),
        (UNRECORDED, "other", 200),
        (UNRECORDED, "verse", 403),
        (NOBODY, "other", 200),
        (NOBODY, "code", 200),
        (NOBODY, "law", 403),
    ],
)
@pytest.mark.parametrize("as_header", [True, False])
def test_a_key_tags_its_own_routes_alone(
    tenants_server: LiveServer, key: str, route: str, status: int, as_header: bool
) -> None:
    headers = {"X-Everdraft-Route": route} if as_header else {}
    metadata = None if as_header else {"route": route}
    answer = ask(tenants_server, key, headers, metadata=metadata)
    assert answer.status_code == status, answer.text
    if status == 403:
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("permission_error", "route_not_allowed")
        assert error["param"] == "metadata.route" and repr(route) in error["message"]


def test_chat_and_responses_look_at_the_key_too(tenants_server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{tenants_server.url}/v1", api_key=SHARED, max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": "hi"}]
        with pytest.raises(openai.PermissionDeniedError):
            client.chat.completions.create(model="tiny", messages=messages, metadata={"route": "law"})
        with pytest.raises(openai.PermissionDeniedError):
            client.responses.create(model="tiny", input="hi", metadata={"route": "law"})


def test_a_record_of_an_isolated_tenant_is_of_its_own_route_and_says_so(tenants_server: LiveServer) -> None:
    untagged = record_of(tenants_server, ask(tenants_server, ISOLATED))
    assert untagged is not None and (untagged.route, untagged.isolated) == ("law", True)
    tagged = record_of(tenants_server, ask(tenants_server, ISOLATED, metadata={"route": "verse"}))
    assert tagged is not None and (tagged.route, tagged.isolated) == ("verse", True)
    other = record_of(tenants_server, ask(tenants_server, SHARED, metadata={"route": "code"}))
    assert other is not None and (other.route, other.isolated) == ("code", False)


def test_a_tenant_whose_capture_is_off_is_not_recorded(tenants_server: LiveServer) -> None:
    assert record_of(tenants_server, ask(tenants_server, UNRECORDED)) is None
    assert record_of(tenants_server, ask(tenants_server, NOBODY)) is not None


def test_an_isolated_tenant_shares_no_prefix(tenants_server: LiveServer) -> None:
    prompt = "a prompt of some blocks, which others have sent before " * 4

    def reused(key: str) -> int:
        usage = ask(tenants_server, key, prompt=prompt, max_tokens=1).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert reused(SHARED) == 0
    assert reused(NOBODY) > 0, "the control: others share theirs"
    assert reused(ISOLATED) == 0
    assert reused(ISOLATED) > 0
    texts = {
        ask(tenants_server, key, prompt=prompt, temperature=0).text.split('"text"')[1][:40]
        for key in (SHARED, ISOLATED)
    }
    assert len(texts) == 1


def test_limits_are_told_on_answers_and_over_them_there_is_429(tenants_server: LiveServer) -> None:
    """In this order: what is refused with 400 takes nothing."""
    too_many = ask(tenants_server, LIMITED, n=3)
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")
    assert "max_concurrent" in too_many.json()["error"]["message"]
    answer = ask(tenants_server, LIMITED)
    assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert int(answer.headers["x-ratelimit-remaining-requests"]) <= 2
    assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 1000
    assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
    while (answer := ask(tenants_server, LIMITED, stream=True)).status_code == 200:
        assert "x-ratelimit-remaining-tokens" in answer.headers
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "requests_per_minute=3" in answer.json()["error"]["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 20
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    other = ask(tenants_server, SHARED)
    assert other.status_code == 200, "others are not"
    assert not [name for name in other.headers if name.startswith("x-ratelimit")]
