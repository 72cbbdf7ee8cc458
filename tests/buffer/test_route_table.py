"""A prompt goes to the nearest centroid, or to the default route; a misleading table cannot be made."""

from typing import Any

import numpy as np
import pytest

from buffer.codec import decode, encode
from buffer.errors import CorruptRecordError
from buffer.route_table import RouteTable
from tests.buffer.samples import make_table


def embedding(*beyond_mean: float) -> Any:
    return (10.0 + np.array(beyond_mean)).astype(np.float16)


def test_a_prompt_goes_to_the_centroid_nearest_beyond_the_mean() -> None:
    table = make_table("sql", "code")
    assert table.route_of(embedding(1.0, 0.25, 0.0)) == "sql"
    assert table.route_of(embedding(0.25, 5.0, 0.0)) == "code"


def test_what_all_prompts_share_tells_no_routes_apart() -> None:
    """Without the mean taken off, the two embeddings' cosine is above .99 and both would be near both."""
    table = make_table("sql", "code")
    assert table.route_of(embedding(-0.5, -0.5, 1.0)) == "default"
    assert table.route_of(embedding(0.0, 0.0, 0.0)) == "default"


def test_a_prompt_near_no_centroid_is_of_the_default_route() -> None:
    near, far = embedding(1.0, 0.0, 1.5), embedding(1.0, 0.0, 2.0)  # cosines .555 and .447
    assert make_table("sql").route_of(near) == "sql"
    assert make_table("sql").route_of(far) == "default"
    assert make_table("sql", min_similarity=0.4).route_of(far) == "sql"


def test_an_empty_table_and_an_embedding_that_is_not_finite_give_the_default_route() -> None:
    assert make_table().route_of(embedding(1.0, 0.0, 0.0)) == "default"
    assert make_table("sql", "code").route_of(embedding(1.0, np.nan, 0.0)) == "default"


def test_another_models_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="another model's"):
        make_table("sql").route_of(embedding(1.0, 0.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"routes": ("sql", "sql")},
        {"routes": ("sql", "a b")},
        {"routes": ("sql",)},
        {"mean_H": np.zeros(4)},
        {"mean_H": np.zeros(0), "centroids_RH": np.zeros((2, 0))},
        {"centroids_RH": np.full((2, 3), np.inf)},
        {"mean_H": np.array([0.0, 0.0, np.nan])},
        {"min_similarity": 1.5},
        {"min_similarity": float("nan")},
    ],
)
def test_a_table_that_could_mislead_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mean_H|routes|route=|min_similarity"):
        make_table("sql", "code", **changes)


def test_a_table_comes_back_from_its_bytes_and_torn_bytes_are_corrupt() -> None:
    data = encode(make_table("sql", "code"))
    found = decode(RouteTable, data)
    assert found.routes == ("sql", "code")
    assert found.route_of(embedding(0.0, 1.0, 0.0)) == "code"
    with pytest.raises(CorruptRecordError, match="nothing was decoded"):
        decode(RouteTable, data[:-1])
