"""A request's route: its tag, else its header, else what its prompt is nearest to, else `default`."""

import numpy as np
import pytest

from serving.router import PromptRouter, choose_route
from tests.buffer.samples import make_table


@pytest.mark.parametrize(
    ("metadata", "header", "route"),
    [
        (None, None, None),
        ({"team": "a"}, None, None),
        ({"route": "default"}, "code", "default"),
        ({"route": "sql"}, None, "sql"),
        (None, "code", "code"),
        ({"route": "sql"}, "code", "sql"),
    ],
)
def test_the_tag_goes_before_the_header(
    metadata: dict[str, str] | None, header: str | None, route: str | None
) -> None:
    assert choose_route(metadata, header) == route


@pytest.mark.parametrize("name", ["", "a b", "{x}", "a/b", "-a", "ü", "a" * 65, "a\n"])
def test_a_name_that_could_not_be_a_key_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="route="):
        choose_route({"route": name}, None)


def test_a_prompt_goes_to_the_default_route_until_a_table_says_otherwise() -> None:
    router, embedding_H = PromptRouter("revision"), np.array([11.0, 10.0, 10.0], dtype=np.float16)
    assert router(embedding_H) == "default"
    router.use(make_table("sql", "code"))
    assert router(embedding_H) == "sql"
    router.use(None)
    assert router(embedding_H) == "default"


def test_a_table_made_for_another_target_routes_nothing() -> None:
    router, embedding_H = PromptRouter("revision"), np.array([11.0, 10.0, 10.0], dtype=np.float16)
    router.use(make_table("sql", target_revision="another"))
    assert router(embedding_H) == "default"


def test_no_prompt_is_of_a_closed_route_whatever_the_table_says() -> None:
    router, embedding_H = PromptRouter("revision"), np.array([11.0, 10.0, 10.0], dtype=np.float16)
    router.use(make_table("sql", "code"))
    router.closed_routes = frozenset({"sql"})
    assert router(embedding_H) == "default"
    assert router(embedding_H[[1, 0, 2]]) == "code"
