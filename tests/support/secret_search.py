"""Looks for a secret wherever it may have been left: as text, and as token ids in every form there is."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import redis

NUM_CONSECUTIVE = 4
"""Token ids in a row that are taken for the secret's."""
_CHUNK_BYTES, _OVERLAP_BYTES = 1 << 24, 1 << 10


class Secret:
    """Texts, and sequences of token ids, of which any NUM_CONSECUTIVE different ones in a row count."""

    def __init__(self, texts: Iterable[str], token_ids: Iterable[Sequence[int]]) -> None:
        self.patterns: dict[bytes, str] = {}
        for text in texts:
            self.patterns[text.encode()] = "text"
            self.patterns[json.dumps(text)[1:-1].encode()] = "text"
        for ids in token_ids:
            for start in range(len(ids) - NUM_CONSECUTIVE + 1):
                run = [int(token) for token in ids[start : start + NUM_CONSECUTIVE]]
                if len(set(run)) == NUM_CONSECUTIVE:
                    self._add_ids(run)
        assert {*self.patterns.values()} >= {"text", "int32", "msgpack", "JSON"}

    def _add_ids(self, run: list[int]) -> None:
        self.patterns[np.array(run, dtype="<i4").tobytes()] = "int32"
        self.patterns[np.array(run, dtype="<i8").tobytes()] = "int64"
        self.patterns[b"".join(map(msgpack.packb, run))] = "msgpack"
        self.patterns[json.dumps(run)[1:-1].encode()] = "JSON"
        self.patterns[json.dumps(run, separators=(",", ":"))[1:-1].encode()] = "JSON"

    def forms_in(self, content: bytes) -> set[str]:
        return {form for pattern, form in self.patterns.items() if pattern in content}

    def found_in(self, *folders: Path, since_s: float = 0.0) -> dict[str, set[str]]:
        """File -> forms found in it, of files written since then."""
        found: dict[str, set[str]] = {}
        for path in (path for folder in folders for path in folder.rglob("*")):
            try:
                if not path.is_file() or path.stat().st_mtime < since_s:
                    continue
                forms = {form for chunk in _chunks(path) for form in self.forms_in(chunk)}
            except OSError:  # it is gone, or a socket
                continue
            if forms:
                found[str(path)] = forms
        return found

    def found_at(self, redis_url: str) -> set[str]:
        """Forms found in any key or value of a server."""
        with redis.Redis.from_url(redis_url) as client:
            return {form for content in _contents(client) for form in self.forms_in(content)}


def _chunks(path: Path) -> Iterator[bytes]:
    """Overlapping, so that nothing is cut in two."""
    with path.open("rb") as file:
        before = b""
        while chunk := file.read(_CHUNK_BYTES):
            yield before + chunk
            before = chunk[-_OVERLAP_BYTES:]


def _contents(client: Any) -> Iterator[bytes]:
    """Every key, and all that its value holds. Not DUMP, which compresses."""
    for key in client.scan_iter():
        yield key
        kind = client.type(key)
        if kind == b"stream":
            yield from (part for _, fields in client.xrange(key) for pair in fields.items() for part in pair)
        elif kind == b"hash":
            yield from (part for pair in client.hgetall(key).items() for part in pair)
        elif kind == b"zset":
            yield from client.zrange(key, 0, -1)
        elif kind == b"set":
            yield from client.smembers(key)
        elif kind == b"list":
            yield from client.lrange(key, 0, -1)
        else:
            yield client.get(key)
