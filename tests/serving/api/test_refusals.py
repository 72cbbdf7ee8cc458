"""Bad input gets 400 with the field's name, and nothing of it reaches the engine."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.live_server import LiveServer

COMPLETIONS = "/v1/completions"


def refusal(server: LiveServer, body: object, path: str = COMPLETIONS) -> dict[str, str | None]:
    submitted = server.parts.engine.stats().num_prompt_tokens
    answer = httpx.post(
        server.url + path, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    assert server.parts.engine.stats().num_prompt_tokens == submitted
    error: dict[str, str | None] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", "7"),
        ("max_tokens", 2.5),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2),
        ("seed", 2**64),
        ("seed", "one"),
        ("logprobs", 21),
        ("logprobs", True),
        ("stop", ["x"] * 17),
        ("stop", ""),
        ("stop_token_ids", [-1]),
        ("min_tokens", 17),
        ("num_draft_tokens", -1),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("metadata", {"a": 1}),
        ("best_of", 2),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ""),
        ("prompt", ["a", 1]),
        ("prompt", [-1]),
        ("prompt", {"text": "a"}),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", "1"),
        ("presence_penalty", -2.5),
        ("presence_penalty", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e9),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": float("-inf")}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"the": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {"100000": 1}),
        ("logit_bias", [[5, 1]]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", [5, 100000]),
        ("suffix", "end"),
        ("use_beam_search", True),
        ("guided_json", {}),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", True),
        ("temprature", 1),
    ],
)
def test_a_bad_field_is_named(server: LiveServer, field: str, value: object) -> None:
    error = refusal(server, {"prompt": "a", field: value})
    assert (error["param"] or "").startswith(field)
    assert field in (error["message"] or "")


@pytest.mark.parametrize("body", [{"prompt": "\ud800"}, {"\ud800": 1}, {"prompt": ["a", "b\udc00"]}])
def test_half_a_surrogate_pair_is_no_text(server: LiveServer, body: dict[str, object]) -> None:
    assert "surrogate" in (refusal(server, body)["message"] or "")


def test_what_is_not_supported_yet_says_so(server: LiveServer) -> None:
    for field, value in (("use_beam_search", True), ("bad_words", ["a"])):
        assert "not supported yet" in (refusal(server, {"prompt": "a", field: value})["message"] or "")


def test_stops_that_cover_all_that_is_allowed_cannot_be_held_back(server: LiveServer) -> None:
    body = {"prompt": "a", "allowed_token_ids": [7, 8], "stop_token_ids": [7, 8], "min_tokens": 2}
    assert refusal(server, body)["param"] == "min_tokens"


def test_a_misspelt_field_is_answered_with_the_nearest(server: LiveServer) -> None:
    assert "did you mean temperature?" in (refusal(server, {"prompt": "a", "temprature": 1})["message"] or "")
    error = refusal(server, {"prompt": "a", "stream": True, "stream_options": {"include_usge": True}})
    assert error["param"] == "stream_options.include_usge"


def test_a_missing_prompt_and_a_body_that_is_no_object_are_refused(server: LiveServer) -> None:
    assert refusal(server, {})["param"] == "prompt"
    for body in ([], "a", 1, None):
        refusal(server, body)
    broken = httpx.post(server.url + COMPLETIONS, content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_route_that_could_not_be_a_key_is_refused(server: LiveServer) -> None:
    assert refusal(server, {"prompt": "a", "metadata": {"route": "a/b"}})["param"] == "metadata.route"


def test_nulls_are_unset(server: LiveServer) -> None:
    nulls = dict.fromkeys(
        ["max_tokens", "n", "seed", "stop", "logprobs", "logit_bias", "suffix", "temperature"]
    )
    assert httpx.post(server.url + COMPLETIONS, json={"prompt": "a", **nulls}).status_code == 200


text = st.text(max_size=5) | st.just("\ud800")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    "prompt max_tokens n stop stream seed temperature top_p top_k logprobs echo metadata stop_token_ids "
    "messages stream_options logit_bias allowed_token_ids presence_penalty repetition_penalty tokens "
    "min_tokens whatever".split()
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([COMPLETIONS, "/v1/chat/completions", "/tokenize", "/detokenize"]),
    body=st.dictionaries(fields, json_values, max_size=5),
)
def test_no_body_whatever_makes_the_server_fail(server: LiveServer, path: str, body: object) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(server.url + path, content=json.dumps(body), headers=headers, timeout=30)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
