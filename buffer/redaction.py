"""Removes credentials from text that people read: URLs, and texts that may contain them. Pure functions.

All errors, notes, logs and screens use these functions. They hide too much rather than too little: of a URL
only scheme, hosts, ports and path are shown, and only the scheme if the rest cannot be distinguished from a
password with certainty. Invariant: what is shown of a URL is the same whatever its password.
"""

import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, quote, quote_plus, unquote, unquote_plus

HIDDEN = "***"
SECRET_NAME = re.compile(r"key|secret|pass(wd|word|phrase)|pwd|credential|auth|bearer|(^|_)token$", re.I)
"""Names of settings and of parameters whose values are never shown."""

_SCHEME = re.compile(r"[A-Za-z][\w+.\-]*://")
_URL = re.compile(r"(?<![\w+.\-])[A-Za-z][\w+.\-]*://(?:.*@)?\S*")
"""A URL in a text: up to the last @ of its line, because a password may contain anything, including spaces
and quotes."""
_HOST = r"(?:\[[\da-fA-F:.%]+\]|[\w.\-]*)(?::\d*)?"
_PLACE = re.compile(rf"{_HOST}(?:,{_HOST})*(?:/[^:]*)?")
_TRAILING = ".,:;)]}>'\""


def redacted_url(url: str) -> str:
    """`url` with *** for a user and a password, and for all of a query, where a password may be too."""
    scheme, rest = _split_scheme(url)
    user, at, place = rest.rpartition("@")
    place, query, _ = _split_query(place)
    if not _PLACE.fullmatch(place) or _split_query(user)[1]:
        return f"{scheme}{HIDDEN}"
    return f"{scheme}{HIDDEN if at else ''}{at}{place}{query}{HIDDEN if query else ''}"


def redacted(text: str, *urls: str) -> str:
    """`text` without the credentials of `urls` and of every other URL in it."""
    for url in urls:
        shown = redacted_url(url)
        text = text.replace(url, shown) if url else text
        for secret in sorted(_secrets(url), key=len, reverse=True):
            # a password that also occurs in the address reveals nothing there
            text = text if secret in shown else text.replace(secret, HIDDEN)
    return _URL.sub(_found_url, text)


def shows_credentials(error: BaseException, *urls: str) -> bool:
    """Whether a traceback of `error`, with everything that it was raised from, would show some."""
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None:
            if redacted(str(link), *urls) != str(link):
                return True
            chain += [link.__cause__, link.__context__]
    return False


def _split_scheme(url: str) -> tuple[str, str]:
    scheme = _SCHEME.match(url)
    return (scheme[0], url[scheme.end() :]) if scheme else ("", url)


def _split_query(text: str) -> tuple[str, str, str]:
    """The text before the first ? or #, that character, and the rest."""
    found = re.search(r"[?#]", text)
    return (text[: found.start()], found[0], text[found.end() :]) if found else (text, "", "")


def _found_url(match: re.Match[str]) -> str:
    """Punctuation after a URL belongs to the sentence around it, not to the URL."""
    url = match[0].rstrip(_TRAILING)
    return redacted_url(url) + match[0][len(url) :]


def _secrets(url: str) -> set[str]:
    """The passwords of a URL in every spelling in which a library may repeat them."""
    return {
        spelling
        for secret in _raw_secrets(url)
        for plain in (secret, unquote(secret), unquote_plus(secret))
        for spelling in (plain, quote(plain), quote(plain, safe=""), quote_plus(plain), repr(plain)[1:-1])
        if spelling
    }


def _raw_secrets(url: str) -> Iterator[str]:
    _, rest = _split_scheme(url)
    if "@" in rest:
        for user in (rest.rpartition("@")[0], rest.partition("@")[0]):
            yield user.partition(":")[2] if ":" in user else user  # there may be only a token, without a user
    query = _split_query(rest)[2]
    for name, value in parse_qsl(query, keep_blank_values=True):
        if SECRET_NAME.search(name):
            yield value
            # one with an & in it ends at any of those that follow
            parts = query.partition(f"{name}=")[2].split("&")
            yield from ("&".join(parts[: number + 1]) for number in range(len(parts)))
