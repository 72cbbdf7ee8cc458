"""Models, tokens, health, keys, ids, errors."""

from collections.abc import Iterator

import httpx
import openai
import pytest
from pydantic import SecretStr

from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server


@pytest.fixture(scope="module")
def locked(tiny_pair: tuple[str, str]) -> Iterator[LiveServer]:
    """A server with keys."""
    settings = ServingSettings(
        compile="off",
        target=tiny_pair[0],
        draft=tiny_pair[1],
        num_slots=1,
        max_seq_len=64,
        api_keys=(SecretStr("sk-one-1"), SecretStr("sk-two-2")),
        admin_key=SecretStr("sk-admin"),
        capture_rate=0.0,
    )
    with live_server(settings) as live:
        yield live


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert (card.id, card.object, card.owned_by) == ("tiny", "model", "everdraft")
    assert client.models.retrieve("tiny").model_extra["max_model_len"] == 256
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("org/other")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")


def test_a_client_can_do_without_a_tokenizer_of_its_own(server: LiveServer) -> None:
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert info["eos_token"] == "<|end|>" and info["bos_token"] is None
    assert "add_generation_prompt" in info["chat_template"]
    assert httpx.post(f"{server.url}/tokenize", json={"prompt": info["eos_token"]}).json()["count"] == 1


def test_tokenize_and_detokenize_are_inverse(server: LiveServer) -> None:
    text = "Grüße, 東京 <|end|>"
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": text}
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    assert chat["count"] == 4
    assert "token_strs" not in chat


def test_a_long_text_is_tokenised_like_a_short_one(server: LiveServer) -> None:
    text = "fox and hound " * 1000
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    assert tokens == server.parts.context.codec.encode(text, add_special_tokens=True)


def test_health_and_version_are_open_and_the_api_is_not(locked: LiveServer) -> None:
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert httpx.get(locked.url + path).status_code == 200
    for path in ("/v1/models", "/v1/nothing", "/admin/status"):
        refused = httpx.get(locked.url + path)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    body = "no json"
    assert httpx.post(f"{locked.url}/v1/completions", content=body).status_code == 401
    for key in ("sk-one-1", "sk-two-2"):
        assert httpx.get(f"{locked.url}/v1/models", headers=bearer(key)).status_code == 200


def test_only_the_admin_key_opens_the_status(locked: LiveServer, server: LiveServer) -> None:
    url = f"{locked.url}/admin/status"
    assert httpx.get(url, headers=bearer("sk-one-1")).status_code == 401
    status = httpx.get(url, headers=bearer("sk-admin")).json()
    assert status["replica_id"] == "replica-0"
    assert status["serving_versions"] == {"default": 0}
    assert httpx.get(f"{locked.url}/v1/models", headers=bearer("sk-admin")).status_code == 401
    assert httpx.get(f"{server.url}/admin/status").status_code == 401


def test_a_capture_rate_of_zero_records_nothing(locked: LiveServer) -> None:
    answer = httpx.post(f"{locked.url}/v1/completions", json={"prompt": "a"}, headers=bearer("sk-one-1"))
    assert answer.status_code == 200
    locked.wait_until_idle()
    assert locked.store.keys() == []


@pytest.mark.parametrize("path", ["/health", "/v1/nothing", "/v1/models"])
def test_a_request_id_comes_back_or_is_made(locked: LiveServer, path: str) -> None:
    url = locked.url + path
    assert httpx.get(url, headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = {httpx.get(url).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2


@pytest.mark.parametrize(
    "given", [b"x" * 500, b"", b"two words", b"\xff", "東京".encode(), b"\x80\x81", b"tab\there"]
)
def test_an_id_that_does_not_fit_a_header_is_replaced(server: LiveServer, given: bytes) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers=[(b"X-Request-Id", given)])
    assert answer.status_code == 200
    [made] = answer.headers.get_list("x-request-id")
    assert len(made) == 32


def test_of_two_ids_the_first_comes_back_once(server: LiveServer) -> None:
    answer = httpx.get(f"{server.url}/health", headers=[("X-Request-Id", "a"), ("X-Request-Id", "b")])
    assert answer.headers.get_list("x-request-id") == ["a"]


@pytest.mark.parametrize("key", [b"Bearer \xff\xfe", "Bearer schlüssel".encode(), b"Bearer", b"\xff", b""])
def test_a_key_of_any_bytes_is_a_wrong_key(locked: LiveServer, key: bytes) -> None:
    for path in ("/v1/models", "/admin/status"):
        answer = httpx.get(locked.url + path, headers=[(b"Authorization", key)])
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("route", [b"\xff", "東京".encode(), b"a/b", b"", b"x" * 5000])
def test_a_route_header_that_could_not_be_a_key_is_refused(server: LiveServer, route: bytes) -> None:
    headers = [(b"X-Everdraft-Route", route)]
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata.route")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("DELETE", "/health", 405)],
)
def test_the_frameworks_errors_are_openai_objects(
    server: LiveServer, method: str, path: str, status: int
) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_failure_of_our_own_is_a_500_that_tells_nothing(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> bytes:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(server.parts.context.metrics, "render", fail)
    answer = httpx.get(f"{server.url}/metrics", headers={"X-Request-Id": "mine-2"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine-2")
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
