"""`POST /v1/completions` as the official client sees it."""

import time

import openai
import pytest
from openai.types import Completion

from serving.api.token_codec import TokenCodec
from tests.support.live_server import LiveServer
from tests.support.tiny_models import tiny_tokenizer

MODEL = "tiny"
PROMPT = "the quick brown fox"


def complete(client: openai.OpenAI, prompt: object = PROMPT, **fields: object) -> Completion:
    return client.completions.create(**{"model": MODEL, "prompt": prompt, "max_tokens": 24, **fields})


def text_of(completion: Completion) -> str:
    return completion.choices[0].text


def test_an_answer_has_openais_shape_and_counts_its_tokens(client: openai.OpenAI) -> None:
    answer = complete(client, max_tokens=7, extra_body={"ignore_eos": True})
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", MODEL, "cmpl-")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    num_prompt = len(TokenCodec(tiny_tokenizer()).encode(PROMPT, add_special_tokens=True))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt, 7)
    assert answer.usage.total_tokens == num_prompt + 7


def test_an_answer_says_how_much_of_its_prompts_was_known_before(client: openai.OpenAI) -> None:
    beginning = [7] * 40

    def cached(prompts: list[list[int]], n: int = 1) -> int:
        usage = complete(client, prompts, n=n, max_tokens=1).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert cached([[*beginning, 1, 2, 3]]) == 0
    assert cached([[*beginning, 4, 5, 6]], n=2) == 32
    assert cached([[*beginning, 7, 8, 9], [*beginning, 1, 2, 3], [11] * 20]) == 64


def test_a_seed_repeats_the_text_and_another_seed_does_not(client: openai.OpenAI) -> None:
    first, again, other = (text_of(complete(client, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_seed_gives_the_same_text_whatever_the_draft_length_and_the_batch_mates(
    client: openai.OpenAI,
) -> None:
    alone = text_of(complete(client, seed=3))
    undrafted = text_of(complete(client, seed=3, extra_body={"num_draft_tokens": 0}))
    crowded = complete(client, ["a b c", PROMPT, "1 2 3"], seed=3)
    assert alone == undrafted == crowded.choices[1].text


def test_greedy_text_is_the_same_with_and_without_speculation(client: openai.OpenAI) -> None:
    drafted = text_of(complete(client, temperature=0))
    assert drafted == text_of(complete(client, temperature=0, extra_body={"num_draft_tokens": 0}))


def test_n_choices_differ_and_come_in_order(client: openai.OpenAI) -> None:
    answer = complete(client, ["a", "b"], n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    assert len({choice.text for choice in answer.choices[:3]}) == 3
    assert answer.usage is not None and answer.usage.prompt_tokens == 2
    again = complete(client, "b", n=3, seed=5)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices[3:]]


def test_a_prompt_may_be_token_ids(client: openai.OpenAI) -> None:
    token_ids = TokenCodec(tiny_tokenizer()).encode(PROMPT, add_special_tokens=True)
    texts = [text_of(complete(client, prompt, seed=1)) for prompt in (PROMPT, token_ids, [token_ids])]
    assert len(set(texts)) == 1


def test_echo_puts_the_prompt_before_every_choice(client: openai.OpenAI) -> None:
    plain = complete(client, [PROMPT, "a"], n=2, seed=1)
    echoed = complete(client, [PROMPT, "a"], n=2, seed=1, echo=True)
    prompts = [PROMPT, PROMPT, "a", "a"]
    expected = [prompt + choice.text for prompt, choice in zip(prompts, plain.choices, strict=True)]
    assert [choice.text for choice in echoed.choices] == expected
    token_ids = TokenCodec(tiny_tokenizer()).encode(PROMPT, add_special_tokens=True)
    assert text_of(complete(client, token_ids, seed=1, echo=True)) == expected[0]


def test_a_stop_string_cuts_the_text_and_the_count(client: openai.OpenAI) -> None:
    whole = complete(client, seed=1, extra_body={"ignore_eos": True})
    stop = text_of(whole)[6:9]
    cut = complete(client, seed=1, stop=[stop, "never"], extra_body={"ignore_eos": True})
    assert text_of(cut) == text_of(whole)[: text_of(whole).index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].model_extra == {"stop_reason": stop}
    assert cut.usage is not None and cut.usage.completion_tokens < 24
    kept = complete(
        client, seed=1, stop=stop, extra_body={"include_stop_str_in_output": True, "ignore_eos": True}
    )
    assert text_of(kept) == text_of(cut) + stop


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    fields = {"return_token_ids": True, "ignore_eos": True}
    whole = complete(client, seed=1, extra_body=fields).choices[0].model_extra["token_ids"]
    cut = complete(client, seed=1, extra_body=fields | {"stop_token_ids": [whole[4]]})
    extra = cut.choices[0].model_extra
    assert extra["token_ids"] == whole[: whole.index(whole[4]) + 1]
    assert (cut.choices[0].finish_reason, extra["stop_reason"]) == ("stop", whole[4])
    codec = TokenCodec(tiny_tokenizer())
    expected = b"".join(codec.text_bytes(token) for token in extra["token_ids"][:-1])
    assert text_of(cut) == expected.decode(errors="replace")


def test_logprobs_stand_beside_every_token(client: openai.OpenAI) -> None:
    answer = complete(client, seed=1, logprobs=3, extra_body={"return_token_ids": True})
    logprobs, extra = answer.choices[0].logprobs, answer.choices[0].model_extra
    assert logprobs is not None
    codec = TokenCodec(tiny_tokenizer())
    assert logprobs.tokens == [codec.token_text(token) for token in extra["token_ids"]]
    assert len(logprobs.token_logprobs) == len(logprobs.text_offset) == answer.usage.completion_tokens
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert token in top and 1 <= len(top) <= 4
        assert logprob <= 0.0 and max(top.values()) >= logprob
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_greedy_tokens_are_their_own_top_logprob(client: openai.OpenAI) -> None:
    logprobs = complete(client, temperature=0, logprobs=1).choices[0].logprobs
    assert logprobs is not None
    for logprob, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert list(top.values()) == [pytest.approx(logprob)]


def test_speculation_figures_add_up(client: openai.OpenAI) -> None:
    answer = complete(client, temperature=0, n=2, extra_body={"ignore_eos": True})
    figures = answer.model_extra["metrics"]["speculative_decoding"]
    assert figures["num_draft_tokens"] >= figures["num_attempted_draft_tokens"] > 0
    assert figures["num_attempted_draft_tokens"] >= figures["num_accepted_draft_tokens"]
    assert sum(figures["acceptance_histogram"]) == figures["num_spec_steps"]
    accepted = sum(count * number for number, count in enumerate(figures["acceptance_histogram"]))
    assert accepted == figures["num_accepted_draft_tokens"]
    assert figures["num_spec_steps"] + accepted >= answer.usage.completion_tokens
    off = complete(client, temperature=0, extra_body={"num_draft_tokens": 0, "ignore_eos": True})
    assert off.model_extra["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0
    assert off.model_extra["metrics"]["speculative_decoding"]["num_spec_steps"] == 24


def test_weight_versions_cover_every_token_when_asked_for(client: openai.OpenAI) -> None:
    answer = complete(client, seed=1, extra_body={"return_weight_versions": True, "ignore_eos": True})
    assert answer.choices[0].model_extra["weight_versions"] == [{"version": 0, "start": 0, "end": 24}]
    assert "weight_versions" not in complete(client, seed=1).choices[0].model_extra


def test_a_finished_request_is_recorded_unless_it_says_not_to(
    client: openai.OpenAI, server: LiveServer
) -> None:
    exporter = server.parts._exporters["replay"]
    before = exporter.num_submitted
    complete(client, n=2)
    assert exporter.num_submitted == before + 2
    complete(client, extra_body={"store": False})
    assert exporter.num_submitted == before + 2


def test_the_route_is_the_requests_tag(client: openai.OpenAI, server: LiveServer) -> None:
    complete(client, extra_body={"metadata": {"route": "sql"}})
    complete(client, extra_headers={"X-Everdraft-Route": "code"})
    stored = server.store.keys
    deadline_s = time.monotonic() + 10
    while not {"sql", "code"} <= {key.route for key in stored()}:
        assert time.monotonic() < deadline_s, "the records did not arrive"
        time.sleep(0.01)


def test_the_context_is_filled_but_never_overrun(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, [5] * 200, max_tokens=57)
    assert (refused.value.param, refused.value.code) == ("max_tokens", "context_length_exceeded")
    assert "200 tokens, max_tokens=57" in str(refused.value) and "holds 256 tokens" in str(refused.value)
    answer = complete(client, [5] * 200, max_tokens=56, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 256
    short = client.completions.create(model=MODEL, prompt=[5] * 250, extra_body={"ignore_eos": True})
    assert short.usage.completion_tokens == 6
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, [5] * 256)
    assert refused.value.param == "prompt"
    assert "256 tokens" in str(refused.value)
