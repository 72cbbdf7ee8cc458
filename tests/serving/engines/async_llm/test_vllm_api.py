"""The OpenAI surface on vLLM: text, stop strings, log-probabilities and refusals, as on our own engine."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

PAIR = Path(__file__).parents[4] / "deploy" / "demo" / "pair"
PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    settings = ServingSettings(
        engine="vllm",
        target=str(PAIR / "target"),
        draft=str(PAIR / "draft"),
        model_name="demo",
        num_slots=4,
        max_seq_len=256,
        num_draft_tokens=3,
        compile="off",
    )
    with live_server(settings) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_a_stream_says_what_the_answer_says(client: openai.OpenAI) -> None:
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    answer = client.completions.create(**asked)  # type: ignore[call-overload]
    parts = list(client.completions.create(**asked, stream=True))  # type: ignore[call-overload]
    assert "".join(part.choices[0].text for part in parts) == answer.choices[0].text
    assert len(parts) > 3 and answer.usage.completion_tokens == 24
    told = answer.model_extra["metrics"]["speculative_decoding"]
    assert told["num_spec_steps"] > 0 and told["num_draft_tokens"] > 0


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt=PROMPT, max_tokens=32, temperature=0)
    text = whole.choices[0].text
    stop = text[8:12]
    cut = client.completions.create(model="demo", prompt=PROMPT, max_tokens=32, temperature=0, stop=[stop])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_chat_gives_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    for each in logprobs.content:
        assert each.logprob == max(top.logprob for top in each.top_logprobs)
        assert len(each.top_logprobs) == 2


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"num_draft_tokens": 2}, "num_draft_tokens"),
        ({"min_p": 0.2}, "min_p"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"max_tokens": 10_000}, "max_tokens"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(
    client: openai.OpenAI, extra: dict[str, object], words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Hello"}],
            extra_body={"max_tokens": 4, **extra},
        )


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
FORMS = [{"json": SCHEMA}, {"regex": "[a-z]{3,9}=[0-9]{2}"}, {"choice": ["yes", "no"]}]


@pytest.mark.parametrize("form", FORMS)
def test_structured_output_is_our_own_engines_word_for_word(
    client: openai.OpenAI, form: dict[str, object]
) -> None:
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
    answer = client.completions.create(**asked, extra_body={"structured_outputs": form})  # type: ignore[call-overload]
    settings = ServingSettings(
        target=str(PAIR / "target"),
        draft=str(PAIR / "draft"),
        model_name="demo",
        max_seq_len=256,
        compile="off",
    )
    with live_server(settings) as ours, openai.OpenAI(base_url=f"{ours.url}/v1", api_key="none") as other:
        expected = other.completions.create(**asked, extra_body={"structured_outputs": form})  # type: ignore[call-overload]
    assert answer.choices[0].text == expected.choices[0].text
    assert answer.choices[0].finish_reason == expected.choices[0].finish_reason == "stop"


def test_its_records_reach_the_store(server: LiveServer, client: openai.OpenAI) -> None:
    from buffer.store import StreamKey

    client.completions.create(model="demo", prompt=PROMPT, max_tokens=16, temperature=1.0)
    key = StreamKey(server.parts.engine.target_revision, "default")
    server.wait_until_idle()
    found = [delivery.record for delivery in server.store.read_new(key, "test", 1000)]
    assert found and all(record.rounds for record in found)
    assert sum(len(each.emitted_target_logprobs_C) for each in found[-1].rounds) == len(
        found[-1].output_token_ids
    )
