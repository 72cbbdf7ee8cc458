"""A request's route: its tag, else its header, else `default`."""

import pytest

from serving.router import choose_route


@pytest.mark.parametrize(
    ("metadata", "header", "route"),
    [
        (None, None, "default"),
        ({"team": "a"}, None, "default"),
        ({"route": "sql"}, None, "sql"),
        (None, "code", "code"),
        ({"route": "sql"}, "code", "sql"),
    ],
)
def test_the_tag_goes_before_the_header(
    metadata: dict[str, str] | None, header: str | None, route: str
) -> None:
    assert choose_route(metadata, header) == route


@pytest.mark.parametrize("name", ["", "a b", "{x}", "a/b", "-a", "ü", "a" * 65, "a\n"])
def test_a_name_that_could_not_be_a_key_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="route="):
        choose_route({"route": name}, None)
