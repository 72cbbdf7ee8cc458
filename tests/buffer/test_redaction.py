"""No password of a URL is shown, however it was written, and what is shown tells nothing of it."""

import logging
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from buffer.errors import StoreUnavailableError
from buffer.redaction import redacted, redacted_url, shows_credentials
from buffer.redis_store import RedisLink, RedisRecordStore

FORMS = {
    "user": "redis://:{}@host:6379/0",
    "user and name": "rediss://name:{}@host:6379/0",
    "query": "redis://host:6379/0?password={}",
    "query among others": "redis://host/0?username=name&password={}&db=1",
    "both": "redis://:{0}@host:6379/0?password={0}",
    "unix": "unix:///run/redis.sock?password={}&db=2",
    "unix user": "unix://:{}@/run/redis.sock",
    "cluster": "redis+cluster://:{}@host:7000",
    "cluster query": "rediss+cluster://host:7000?password={}",
    "sentinel": "redis+sentinel://:{}@one:1,two:2/service",
    "sentinel query": "redis+sentinel://one:1,two:2/service?password={}",
    "tracking": "https://name:{}@mlflow.example/path",
    "database": "postgresql+psycopg2://name:{}@host:5432/runs",
    "no scheme": "name:{}@host:6379",
}
PUBLIC = set("".join(redacted_url(form.format("")) for form in FORMS.values()))

passwords = st.text(min_size=1) | st.text(alphabet="@/?#:&=%+ '\"ab1", min_size=1)
tricky = ["p@ss", "p/w", "p?w", "p#w", "a@b?c/d:e&f=g", "6379", "a b", "%40", "x://y", "?", "@", "'"]


def in_any_spelling(password: str) -> list[str]:
    return [password, quote(password), quote(password, safe="")]


@pytest.mark.parametrize("form", FORMS)
@given(password=passwords)
def test_what_is_shown_of_a_url_does_not_depend_on_its_password(form: str, password: str) -> None:
    scheme = FORMS[form].partition("://")[0] + "://" if "://" in FORMS[form] else ""
    tells_nothing = {redacted_url(FORMS[form].format("sesame")), f"{scheme}***"}
    for spelling in in_any_spelling(password):
        shown = redacted_url(FORMS[form].format(spelling))
        assert shown in tells_nothing, spelling


@pytest.mark.parametrize("form", FORMS)
@given(password=passwords)
def test_a_text_about_a_known_url_holds_neither_the_url_nor_its_password(form: str, password: str) -> None:
    for spelling in in_any_spelling(password):
        url = FORMS[form].format(spelling)
        text = f"Error 7 connecting to {url!r}: {password!r} or {spelling} is wrong"
        said = redacted(text, url)
        if set(spelling) <= PUBLIC | set("Error 7 connecting to : or is wrong'"):
            continue  # a word of the sentence itself
        assert spelling not in said


@pytest.mark.parametrize("form", [form for form in FORMS if form != "no scheme"])
@given(password=st.text(alphabet=st.characters(exclude_categories=["Cc", "Cs", "Z"]), min_size=1))
@example(password="p@s/s?w")
def test_a_url_in_any_text_is_found_and_redacted(form: str, password: str) -> None:
    url = FORMS[form].format(quote(password, safe="") + "sesame")
    assert "sesame" not in redacted(f"API request to {url} failed ('{url}').")
    assert redacted(redacted(url)) == redacted(url)


@pytest.mark.parametrize("password", tricky)
@pytest.mark.parametrize("form", FORMS)
def test_a_link_to_any_address_says_nothing_of_its_password(form: str, password: str) -> None:
    """Whether it takes the address or refuses it."""
    marked = f"sesame{password}kitten"
    for spelling in in_any_spelling(marked):
        try:
            said = RedisLink(FORMS[form].format(spelling), 1.0).shown_url
        except ValueError as error:
            said = "".join(traceback.format_exception(error))
        assert "sesame" not in said and "kitten" not in said


def test_a_password_where_a_port_should_be_is_hidden() -> None:
    assert redacted_url("redis://:sesame") == redacted_url("redis://host:sesame") == "redis://***"
    with pytest.raises(ValueError, match="not host:port") as caught:
        RedisLink("redis://:sesame", 1.0)
    assert "sesame" not in str(caught.value) and caught.value.__suppress_context__


def test_addresses_without_credentials_are_shown_as_they_are() -> None:
    for url in (
        "redis://127.0.0.1:6379/0",
        "redis+cluster://[::1]:7000",
        "sqlite:////a/b c/mlflow.db",
        "h:1",
    ):
        assert redacted_url(url) == url
    assert redacted("see http://127.0.0.1:8000/v1, or (https://a.b/c).") == (
        "see http://127.0.0.1:8000/v1, or (https://a.b/c)."
    )


@contextmanager
def old_server() -> Iterator[int]:
    """A server that knows no AUTH, and repeats what it was sent, as Redis does."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                words = connection.recv(4096).decode().split("\r\n")[2::2]
                said = " ".join(f"`{word}`," for word in words[1:])
                text = f"-ERR unknown command `{words[0]}`, with args beginning with: {said}\r\n"
                connection.sendall(text.encode())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("form", ["redis://:{}@127.0.0.1:{}/0", "redis://127.0.0.1:{1}/0?password={0}"])
def test_a_server_that_repeats_the_password_is_not_repeated(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    with old_server() as port:
        store = RedisRecordStore(form.format(quote("s3s@me/?", safe=""), port))
        with pytest.raises(StoreUnavailableError) as caught:
            store.keys()
        store.close()
    logging.getLogger("worker").error("the loop died", exc_info=caught.value)
    assert "unknown command" in str(caught.value)
    for said in ("".join(traceback.format_exception(caught.value)), caplog.text):
        assert "s3s" not in said and "127.0.0.1" in said


def test_a_chain_of_exceptions_is_searched_to_its_end() -> None:
    inner = ValueError("redis://:sesame@host")
    outer = RuntimeError("no answer")
    outer.__cause__ = KeyError("nothing here")
    assert not shows_credentials(outer)
    outer.__cause__.__context__ = inner
    assert shows_credentials(outer)
