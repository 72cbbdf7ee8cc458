"""What a server makes of its model: its names, its own sampling defaults; and who may call from a browser."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr, ValidationError

from serving.generation_defaults import generation_defaults
from serving.models.errors import UnsupportedModelError
from serving.replica_parts import ReplicaParts
from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server

OWN = {"temperature": 0.8, "top_k": 3, "top_p": 0.7, "repetition_penalty": 1.5}
KEY = "sk-browser"
PAGE = "https://chat.example.org"


def with_defaults(target: str, folder: Path, **fields: Any) -> str:
    shutil.copytree(target, folder, dirs_exist_ok=True)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return str(folder)


def settings_of(target: str, **more: Any) -> ServingSettings:
    return ServingSettings(compile="off", target=target, num_slots=2, max_seq_len=128, **more)


@pytest.fixture(scope="module")
def tuned(tiny_pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A target with defaults of its own, two names, a key, and a page that may call it."""
    folder = with_defaults(tiny_pair[0], tmp_path_factory.mktemp("tuned"), do_sample=True, **OWN)
    settings = settings_of(
        folder,
        model_name=("first", "org/second"),
        api_keys=(SecretStr(KEY),),
        allowed_origins=(PAGE,),
    )
    with live_server(settings) as live:
        yield live


@pytest.fixture(scope="module")
def client(tuned: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tuned.url}/v1", api_key=KEY, max_retries=0) as opened:
        yield opened


def text(client: openai.OpenAI, **fields: Any) -> str:
    asked = {"model": "first", "prompt": "the quick", "max_tokens": 24, "seed": 3, **fields}
    extra = {"ignore_eos": True, **asked.pop("extra_body", {})}
    return client.completions.create(**asked, extra_body=extra).choices[0].text


def test_fields_left_out_are_the_model_s_own_and_fields_sent_are_the_client_s(client: openai.OpenAI) -> None:
    unset = text(client)
    assert unset == text(
        client, temperature=0.8, top_p=0.7, extra_body={"top_k": 3, "repetition_penalty": 1.5}
    )
    assert unset == text(client, temperature=None, extra_body={"top_k": None})
    for neutral in (
        {"temperature": 1.0},
        {"top_p": 1.0},
        {"extra_body": {"top_k": 0}},
        {"extra_body": {"repetition_penalty": 1.0}},
    ):
        differ = [text(client, seed=seed, **neutral) != text(client, seed=seed) for seed in range(8)]
        assert any(differ), f"{neutral} was sent, and is no default of the model"


def test_without_them_the_api_s_defaults_hold(
    tuned: LiveServer, client: openai.OpenAI, tiny_pair: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    plain = text(
        client, temperature=1.0, top_p=1.0, extra_body={"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    )
    target = str(tuned.parts._settings.target)
    caplog.set_level(logging.WARNING)
    for settings in (settings_of(target, generation_config="none"), settings_of(tiny_pair[0])):
        with (
            live_server(settings) as server,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") as other,
        ):
            name = settings.served_name
            assert text(other, model=name) == plain
            assert other.models.retrieve(name).model_extra["sampling_defaults"] == {}
    assert not any("generation_config" in message for message in caplog.messages)


def test_the_defaults_are_said_at_start_and_listed(
    tuned: LiveServer, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    assert client.models.list().data[0].model_extra["sampling_defaults"] == OWN
    parts = ReplicaParts(tuned.parts._settings, store=None, open_feed=None, replica_id="r")
    parts.close()
    [said] = [message for message in caplog.messages if "generation_config.json" in message]
    assert "temperature=0.8" in said and "repetition_penalty=1.5" in said


@pytest.mark.parametrize(
    ("fields", "named"), [({"temperature": 1000.0}, "temperature=1000.0"), ({"top_p": "x"}, "top_p='x'")]
)
def test_defaults_that_no_request_could_have_are_refused_at_start(
    tiny_pair: tuple[str, str], tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    folder = with_defaults(tiny_pair[0], tmp_path, **fields)
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json") as refused:
        generation_defaults(folder)
    assert named in str(refused.value) and "'none'" in str(refused.value)


def test_a_model_without_the_file_has_none(tiny_pair: tuple[str, str], tmp_path: Path) -> None:
    shutil.copytree(tiny_pair[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").unlink()
    assert generation_defaults(str(tmp_path)) == {}


def test_every_name_is_answered_by_and_listed(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["first", "org/second"]
    for name in ("first", "org/second"):
        assert client.models.retrieve(name).id == name
        assert client.completions.create(model=name, prompt="a", max_tokens=1).model == name
        chunks = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "a"}], max_tokens=2, stream=True
        )
        assert {chunk.model for chunk in chunks} == {name}
    with pytest.raises(openai.NotFoundError, match="'first', 'org/second'"):
        text(client, model="second")
    unnamed = client.post("/completions", body={"prompt": "a", "max_tokens": 1}, cast_to=httpx.Response)
    assert unnamed.json()["model"] == "first"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"target": "Qwen/Qwen3-8B"}, ("Qwen3-8B", "Qwen/Qwen3-8B")),
        ({"target": "/models/Qwen3-8B"}, ("Qwen3-8B",)),
        ({"target": "Qwen/Qwen3-8B", "model_name": "mine"}, ("mine",)),
        ({"target": "t", "model_name": ["a", "b/c", "a"]}, ("a", "b/c")),
    ],
)
def test_a_hub_id_is_a_name_whole_and_by_its_last_part(given: dict[str, Any], names: tuple[str, ...]) -> None:
    assert ServingSettings.model_validate(given).served_names == names


@pytest.mark.parametrize("name", ["", [], [""], ["a", ""]])
def test_a_name_that_is_none_is_refused(name: Any) -> None:
    with pytest.raises(ValidationError, match="model_name"):
        ServingSettings.model_validate({"target": "t", "model_name": name})


def preflight(server: LiveServer, origin: str) -> httpx.Response:
    return httpx.options(
        f"{server.url}/v1/chat/completions",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        },
    )


def test_a_browser_may_ask_without_a_key_whether_its_page_may_call(tuned: LiveServer) -> None:
    allowed = preflight(tuned, PAGE)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-origin" not in preflight(tuned, "https://elsewhere.example.org").headers


def test_its_script_reads_answers_errors_and_the_request_id(tuned: LiveServer) -> None:
    for key, status in ((KEY, 200), ("sk-wrong-1", 401)):
        answer = httpx.get(
            f"{tuned.url}/v1/models", headers={"Origin": PAGE, "Authorization": f"Bearer {key}"}
        )
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert answer.headers.get_list("x-request-id", split_commas=True)


def test_without_the_setting_no_page_may(server: LiveServer) -> None:
    assert preflight(server, PAGE).status_code == 405
    answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://", "", "https://a b"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="allowed_origins"):
        ServingSettings.model_validate({"target": "t", "allowed_origins": [origin]})


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/v1/models/tiny"])
def test_a_head_is_a_get_without_its_body(server: LiveServer, path: str) -> None:
    head, get = httpx.head(server.url + path), httpx.get(server.url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
