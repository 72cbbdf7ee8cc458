"""Text to token ids, and each token id to the exact bytes it stands for. Wraps a transformers tokenizer.

Knows no requests. Invariant: a token's bytes do not depend on its neighbours, so text decoded in pieces
equals text decoded at once; a special token has none. Thread-safe.
"""

import copy
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from serving.api.response_schema import TokenizerInfo

_PRIVATE_USE = range(0xE000, 0xF8FF)
"""Characters that mean nothing to anybody: one marks what must not be read as a special token."""


class TokenCodec:
    """`tokenizer`: a transformers tokenizer; the fast kind runs without a lock."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._lock = threading.Lock()
        added = tokenizer.added_tokens_decoder
        self._added = {int(i): str(token) for i, token in added.items()}
        special = (int(i) for i, token in added.items() if getattr(token, "special", False))
        self._special_ids = frozenset(tokenizer.all_special_ids) | frozenset(special)
        spelled = sorted(
            (self._added[i] for i in self._special_ids if i in self._added), key=len, reverse=True
        )
        self._id_of_special = {self._added[i]: i for i in self._special_ids if i in self._added}
        self._special = re.compile("|".join(map(re.escape, spelled))) if spelled else None
        self._byte_of = _byte_alphabet() if self._is_byte_level() else None
        self._bytes: dict[int, bytes] = {}
        self._names_ids = False
        template = getattr(tokenizer, "chat_template", None)
        self.has_chat_template = template is not None
        self.chat_template = template if isinstance(template, str) else json.dumps(template or "")
        """Of several, all of them."""

    def naming_ids(self) -> "TokenCodec":
        """The same codec, which shows a token as `token_id:123`, so that tokens of equal text differ."""
        naming = copy.copy(self)
        naming._names_ids = True
        return naming

    @cached_property
    def info(self) -> TokenizerInfo:
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        spelled = {name: getattr(self._tokenizer, name, None) for name in names}
        template = getattr(self._tokenizer, "chat_template", None)
        return TokenizerInfo(
            tokenizer_class=type(self._tokenizer).__name__,
            chat_template=template if isinstance(template, str) else None,
            **{name: None if token is None else str(token) for name, token in spelled.items()},
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def chat_token_ids(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **template_arguments: Any
    ) -> list[int]:
        """The prompt that the model's chat template makes. A special token that a client's text spells stays
        text, so that no message can end its turn or begin another's. Exceptions of the template are passed
        on."""
        asked = {"messages": list(messages), **template_arguments}
        said = list(_texts(asked))
        render = partial(self._chat_text, add_generation_prompt=add_generation_prompt)
        if self._special is None or not any(self._special.search(text) for text in said):
            return self.encode(render(asked), add_special_tokens=False)
        texts: list[str] = []
        mark = next(chr(code) for code in _PRIVATE_USE if not any(chr(code) in text for text in said))

        def put_aside(found: re.Match[str]) -> str:
            texts.append(found[0])
            return f"{mark}{len(texts) - 1}{mark}"

        pieces = render(_with_texts(asked, partial(self._special.sub, put_aside))).split(mark)
        token_ids: list[int] = []
        for number, piece in enumerate(pieces):
            if number % 2:
                token_ids += self._encode_as_text(texts[int(piece)])
            elif piece:
                token_ids += self.encode(piece, add_special_tokens=False)
        return token_ids

    def _encode_as_text(self, text: str) -> list[int]:
        """A special token is spelled out."""
        if self._plain_backend is not None:
            return list(self._plain_backend.encode(text, add_special_tokens=False).ids)
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    @cached_property
    def _plain_backend(self) -> Any:
        """A second one, because what it knows of special tokens is its state, which threads share."""
        if self._backend is None:
            return None
        plain = type(self._backend).from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    def _chat_text(self, asked: Mapping[str, Any], *, add_generation_prompt: bool) -> str:
        arguments = {key: value for key, value in asked.items() if key != "messages"}
        text: str = self._tokenizer.apply_chat_template(
            asked["messages"], tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
        )
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokenizer's own decoding, special tokens as they are written: the inverse of `encode`."""
        with self._lock:
            text: str = self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return text

    def special_token_ids(self, texts: Sequence[str]) -> list[int]:
        """Of those texts that spell exactly one special token."""
        return [self._id_of_special[text] for text in texts if text in self._id_of_special]

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to an answer: none if it is special."""
        return b"" if token_id in self._special_ids else self.raw_bytes(token_id)

    def raw_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for, special ones as they are written; empty for an id without a
        token."""
        token_bytes = self._bytes.get(token_id)
        if token_bytes is None:
            token_bytes = self._bytes[token_id] = self._spell(token_id)
        return token_bytes

    def token_text(self, token_id: int) -> str:
        """The single token for display; an incomplete character shows as U+FFFD."""
        if self._names_ids:
            return f"token_id:{token_id}"
        return self.raw_bytes(token_id).decode("utf-8", errors="replace")

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""
        if self._byte_of is not None and all(char in self._byte_of for char in token):
            return bytes(self._byte_of[char] for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return self._spell_by_difference(token_id)

    def _spell_by_difference(self, token_id: int) -> bytes:
        """The bytes of the second of two equal tokens, because a decoder may treat the first token of a text
        differently."""
        once, twice = self.decode([token_id]), self.decode([token_id, token_id])
        return twice[len(once) :].encode()

    def _is_byte_level(self) -> bool:
        if self._backend is None:
            return False
        return '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str()).get("decoder"))


def _texts(said: Any) -> Iterator[str]:
    """All texts in what a client sent, but for the roles of messages."""
    if isinstance(said, str):
        yield said
    elif isinstance(said, Mapping):
        for key, value in said.items():
            yield from (() if key == "role" else _texts(value))
    elif isinstance(said, list):
        for value in said:
            yield from _texts(value)


def _with_texts(said: Any, change: Callable[[str], str]) -> Any:
    """The same with each of these texts changed."""
    if isinstance(said, str):
        return change(said)
    if isinstance(said, Mapping):
        return {key: value if key == "role" else _with_texts(value, change) for key, value in said.items()}
    return [_with_texts(value, change) for value in said] if isinstance(said, list) else said


def _byte_alphabet() -> dict[str, int]:
    """The printable characters for the 256 bytes that byte-level BPE has used since GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
