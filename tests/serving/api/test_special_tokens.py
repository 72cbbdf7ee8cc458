"""Special tokens in answers: shown on demand, stopped at by their text, and named by id."""

from typing import Any

import openai
import pytest

from serving.api.text_stream import TextStream
from tests.serving.api.test_token_codec import CODEC

END, PAD = CODEC.special_token_ids(["<|end|>", "<|pad|>"])
LETTER = CODEC.encode("z", add_special_tokens=False)[0]


def completed(client: openai.OpenAI, allowed: list[int], **fields: Any) -> Any:
    """A generation of these tokens alone."""
    fields = {"prompt": "a", "max_tokens": 12, "seed": 1, "temperature": 2.0, **fields}
    extra = {"allowed_token_ids": allowed, "ignore_eos": True, "return_token_ids": True}
    extra |= fields.pop("extra_body", {})
    return client.completions.create(model="tiny", **fields, extra_body=extra).choices[0]


def test_special_tokens_are_text_only_if_asked_for(client: openai.OpenAI) -> None:
    allowed = [END, PAD, LETTER]
    hidden = completed(client, allowed)
    shown = completed(client, allowed, extra_body={"skip_special_tokens": False})
    ids = hidden.token_ids
    assert ids == shown.token_ids and {END, PAD, LETTER} == set(ids)
    assert hidden.text == "z" * ids.count(LETTER)
    assert shown.text == CODEC.decode(ids) and "<|pad|>" in shown.text


def test_the_end_of_text_is_not_shown_either_way(client: openai.OpenAI) -> None:
    for skip in (True, False):
        asked = {"skip_special_tokens": skip, "ignore_eos": False}
        choice = completed(client, [END], extra_body=asked)
        assert (choice.text, choice.finish_reason, choice.stop_reason) == ("", "stop", None)
    asked |= {"include_stop_str_in_output": True}
    assert completed(client, [END], extra_body=asked).text == "<|end|>"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_that_spells_a_special_token_stops_at_it(
    client: openai.OpenAI, skip: bool, stream: bool, include: bool
) -> None:
    extra = {"skip_special_tokens": skip, "include_stop_str_in_output": include}
    fields = {"max_tokens": 40, "stop": ["nothing", "<|pad|>"], "extra_body": extra}
    extra |= {"allowed_token_ids": [PAD, LETTER], "ignore_eos": True, "return_token_ids": True}
    asked: dict[str, Any] = {"model": "tiny", "prompt": "a", "seed": 4, "temperature": 2.0, **fields}
    if stream:
        choices = [c for chunk in client.completions.create(**asked, stream=True) for c in chunk.choices]
    else:
        choices = client.completions.create(**asked).choices
    text = "".join(choice.text for choice in choices)
    ids = [token for choice in choices for token in choice.model_extra["token_ids"]]
    assert ids.index(PAD) == len(ids) - 1
    assert text == "z" * (len(ids) - 1) + ("<|pad|>" if include else "")
    assert (choices[-1].finish_reason, choices[-1].model_extra["stop_reason"]) == ("stop", "<|pad|>")


def test_a_stop_string_that_spells_the_end_of_text_stops_although_that_is_ignored(
    client: openai.OpenAI,
) -> None:
    choice = completed(client, [END], stop="<|end|>")
    assert (choice.finish_reason, choice.stop_reason, choice.token_ids) == ("stop", "<|end|>", [END])
    longer = completed(
        client, [END], stop="<|end|>", extra_body={"allowed_token_ids": [END, LETTER], "min_tokens": 5}
    )
    assert len(longer.token_ids) > 5


@pytest.mark.parametrize("skip", [True, False])
def test_other_tokens_that_spell_it_stop_as_any_text_does(skip: bool) -> None:
    spelled = CODEC._encode_as_text("z<|pad|>z")
    assert PAD not in spelled
    stream = TextStream(CODEC, ["<|pad|>"], skip_special_tokens=skip)
    assert (stream.feed(spelled).text, stream.stop_string) == ("z", "<|pad|>")


def test_log_probabilities_name_tokens_by_id_if_asked_to(client: openai.OpenAI) -> None:
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = client.completions.create(
        model="tiny", prompt="a", max_tokens=4, logprobs=2, seed=1, extra_body=extra
    ).choices[0]
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert choice.logprobs.tokens == [f"token_id:{i}" for i in choice.token_ids]  # type: ignore[attr-defined]
    assert all(name.startswith("token_id:") for top in choice.logprobs.top_logprobs or [] for name in top)
    said = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "a"}],
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
        seed=1,
        extra_body=extra,
    ).choices[0]
    assert said.logprobs is not None
    entries = said.logprobs.content or []
    assert [entry.token for entry in entries] == [f"token_id:{i}" for i in said.model_extra["token_ids"]]  # type: ignore[index]
    for entry in entries:
        for token in (entry, *entry.top_logprobs):
            assert bytes(token.bytes or []) == CODEC.raw_bytes(int(token.token.removeprefix("token_id:")))
