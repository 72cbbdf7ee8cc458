"""Text from tokens: whole characters, stop strings, and the same text however the tokens are split."""

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from serving.api.text_stream import StopStrings, TextStream
from serving.api.token_codec import TokenCodec
from tests.support.tiny_models import tiny_tokenizer

VOCAB_SIZE = 320
SENTENCEPIECE = [
    "<s>",
    "</s>",
    "▁the",
    "▁cat",
    "s",
    "▁",
    "!",
    "é",
    *(f"<0x{byte:02X}>" for byte in range(256)),
]


@cache
def byte_level() -> TokenCodec:
    return TokenCodec(tiny_tokenizer(VOCAB_SIZE))


@cache
def sentencepiece() -> TokenCodec:
    """Pieces with a leading '▁', bytes as a fallback, and a decoder that drops the text's first space."""
    vocabulary = {token: token_id for token_id, token in enumerate(SENTENCEPIECE)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TokenCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"))


def streamed(codec: TokenCodec, chunks: list[list[int]], stops: tuple[str, ...] = ()) -> str:
    stream = TextStream(codec, stops)
    return "".join([stream.feed(chunk).text for chunk in chunks]) + stream.finish()


def split(token_ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(cut % (len(token_ids) + 1) for cut in cuts), len(token_ids)]
    return [token_ids[start:end] for start, end in pairwise(edges)]


tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40)
cuts = st.lists(st.integers(0, 40), max_size=6)
texts = st.text(max_size=30)


@given(tokens, cuts)
def test_streamed_text_is_the_tokenizers_own_decoding(token_ids: list[int], cuts: list[int]) -> None:
    tokenizer = byte_level()._tokenizer
    expected = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert streamed(byte_level(), split(token_ids, cuts)) == expected


@given(texts, cuts)
def test_any_text_comes_back_whatever_the_chunks(text: str, cuts: list[int]) -> None:
    token_ids = byte_level().encode(text, add_special_tokens=False)
    assert streamed(byte_level(), split(token_ids, cuts)) == text


@given(tokens, cuts, st.lists(st.text(max_size=4).filter(bool), max_size=3))
def test_stop_strings_cut_at_the_same_place_whatever_the_chunks(
    token_ids: list[int], cuts: list[int], stops: list[str]
) -> None:
    whole = streamed(byte_level(), [token_ids], tuple(stops))
    assert streamed(byte_level(), split(token_ids, cuts), tuple(stops)) == whole
    assert streamed(byte_level(), [[token] for token in token_ids], tuple(stops)) == whole


@given(texts, st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3))
def test_released_text_never_holds_a_stop_string(text: str, stops: list[str]) -> None:
    token_ids = byte_level().encode(
        text.translate({ord(c): "ab"[i % 2] for i, c in enumerate(text)}), add_special_tokens=False
    )
    released = streamed(byte_level(), [[token] for token in token_ids], tuple(stops))
    assert not any(stop in released for stop in stops)


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_first_stop_string_completed_wins(text: str, stops: list[str]) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    finder = StopStrings(stops)
    released = ""
    for char in text:
        piece, found = finder.push(char)
        released += piece
        if found is not None:
            break
    assert released + finder.flush() == expected


def test_half_a_character_is_held_back() -> None:
    stream = TextStream(byte_level())
    token_ids = byte_level().encode("🙃é", add_special_tokens=False)
    pieces = [stream.feed([token_id]).text for token_id in token_ids]
    assert "".join(pieces) == "🙃é"
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(token_ids) > 2


def test_a_character_that_never_ends_shows_at_the_end() -> None:
    first_byte = byte_level().encode("語", add_special_tokens=False)[:1]
    stream = TextStream(byte_level())
    assert stream.feed(first_byte).text == ""
    assert stream.finish() == "\ufffd"


def test_a_possible_beginning_of_a_stop_string_is_held_back_and_released() -> None:
    stream = TextStream(byte_level(), ["</end>"])
    feed = [byte_level().encode(text, add_special_tokens=False) for text in ("ok </", "en", "x")]
    assert [stream.feed(token_ids).text for token_ids in feed] == ["ok ", "", "</enx"]


def test_tokens_after_a_stop_string_are_not_consumed() -> None:
    token_ids = [
        token
        for text in ("a", "b", "c", "d")
        for token in byte_level().encode(text, add_special_tokens=False)
    ]
    piece = TextStream(byte_level(), ["c"]).feed(token_ids)
    assert (piece.text, piece.num_consumed, piece.stop_string) == ("ab", 3, "c")


def test_the_stop_string_is_kept_when_asked_for() -> None:
    stream = TextStream(byte_level(), ["c"], include_stop_string=True)
    assert stream.feed(byte_level().encode("abcd", add_special_tokens=False)).text == "abc"


def test_a_stop_string_within_min_tokens_does_not_stop() -> None:
    token_ids = [byte_level().encode(char, add_special_tokens=False)[0] for char in "abab"]
    stream = TextStream(byte_level(), ["a"], min_tokens=2)
    assert stream.feed(token_ids).text == "ab"


def test_special_tokens_are_skipped() -> None:
    codec = byte_level()
    end = codec.encode("<|end|>", add_special_tokens=False)
    assert len(end) == 1
    assert streamed(codec, [codec.encode("a", add_special_tokens=False) + end]) == "a"
    assert codec.token_text(end[0]) == "<|end|>"


def test_offsets_say_where_each_token_begins() -> None:
    token_ids = byte_level().encode("aé!", add_special_tokens=False)
    offsets = TextStream(byte_level()).feed(token_ids).text_offsets
    assert offsets[0] == 0 and offsets[-1] == 2
    assert list(offsets) == sorted(offsets)


@given(st.lists(st.integers(0, len(SENTENCEPIECE) - 1), max_size=20), cuts)
def test_sentencepiece_text_does_not_depend_on_the_chunks(token_ids: list[int], cuts: list[int]) -> None:
    whole = streamed(sentencepiece(), [token_ids])
    assert streamed(sentencepiece(), split(token_ids, cuts)) == whole


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["▁the", "▁cat", "s", "!"], " the cats!"),
        (["s", "▁the"], "s the"),
        (["▁", "é"], " é"),
        (["<0xE4>", "<0xBD>", "<0xA0>", "▁cat"], "你 cat"),
        (["<s>", "▁the", "</s>"], " the"),
    ],
)
def test_sentencepiece_keeps_the_space_that_continues_a_prompt(pieces: list[str], text: str) -> None:
    token_ids = [SENTENCEPIECE.index(piece) for piece in pieces]
    assert streamed(sentencepiece(), [[token_id] for token_id in token_ids]) == text
