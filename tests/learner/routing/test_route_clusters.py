"""Kinds of prompts are told apart where there are several, and one kind is left whole."""

import numpy as np
import pytest
from numpy.typing import NDArray

from buffer.route_table import RouteTable
from learner.routing.route_clusters import fit_routes, restricted, told_of

SIZE = 24


def prompts(kind: int, num_prompts: int, seed: int, apart: float = 8.0) -> NDArray[np.float64]:
    """Around a common mean far larger than what tells kinds apart, as hidden states are."""
    rng = np.random.default_rng((kind, seed))
    return 50.0 + apart * np.eye(SIZE)[kind] + rng.normal(size=(num_prompts, SIZE))


def purity(table: RouteTable, kinds: list[NDArray[np.float64]]) -> float:
    found = [[table.route_of(prompt_H) for prompt_H in kind] for kind in kinds]
    names = [max(set(routes), key=routes.count) for routes in found]
    assert len(set(names)) == len(kinds)
    return sum(routes.count(name) for routes, name in zip(found, names, strict=True)) / sum(map(len, found))


def test_four_kinds_become_four_routes_that_new_prompts_find_however_rare_some_are() -> None:
    sizes = (400, 200, 100, 60)
    seen = np.concatenate([prompts(kind, size, seed=0) for kind, size in enumerate(sizes)])
    table = fit_routes(np.random.default_rng(0).permutation(seen))
    assert table.routes == ("auto-1", "auto-2", "auto-3", "auto-4")
    assert purity(table, [prompts(kind, 100, seed=1) for kind in range(4)]) > 0.97
    assert {table.route_of(prompt_H) for prompt_H in prompts(5, 100, seed=1)} <= {"default", *table.routes}


@pytest.mark.parametrize("shape", ["round", "long", "skew", "flat"])
def test_one_kind_is_never_split(shape: str) -> None:
    """12 streams of each shape. A pair is told apart by mistake with a probability of at most FALSE_ALARM,
    and two clusters are one pair, looked at NUM_LOOKS times: below .04 a shape in all (more clusters must all
    be told apart, which is rarer still). The seeds are fixed."""
    assert [seed for seed in range(12) if fit_routes(one_kind(shape, seed), seed=seed).routes] == []


def one_kind(shape: str, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(400, SIZE))
    along = {
        "round": rng.normal(size=400),
        "long": 10 * rng.normal(size=400),
        "skew": 10 * rng.exponential(size=400),
        "flat": 20 * rng.uniform(size=400),
    }
    points[:, 0] = along[shape]
    return points


def test_names_stay_when_the_kinds_are_looked_for_again() -> None:
    first = fit_routes(np.concatenate([prompts(0, 150, seed=0), prompts(1, 150, seed=0)]))
    names = {kind: first.route_of(prompts(kind, 1, seed=2)[0]) for kind in range(2)}
    again = np.concatenate([prompts(kind, 120, seed=1) for kind in (2, 1, 0, 3)])
    second = fit_routes(again, previous=first)
    assert {kind: second.route_of(prompts(kind, 1, seed=2)[0]) for kind in range(2)} == names
    assert set(second.routes) == {"auto-1", "auto-2", "auto-3", "auto-4"}


def test_a_coarse_kind_falls_apart_once_its_parts_show_and_the_larger_part_keeps_its_name() -> None:
    def part(num_prompts: int, seed: int) -> NDArray[np.float64]:
        """Like kind 0, and yet apart."""
        return prompts(0, num_prompts, seed) + 8.0 * np.eye(SIZE)[1]

    early = [prompts(2, 120, seed=0), prompts(0, 120, seed=0), part(30, seed=9)]  # 30 are too few for a kind
    first = fit_routes(np.concatenate(early))
    name = first.route_of(prompts(0, 1, seed=2)[0])
    later = [prompts(2, 120, seed=1), prompts(0, 200, seed=1), part(100, seed=8)]
    assert len(first.routes) == 2
    assert [first.route_of(prompt_H) for prompt_H in later[2]].count(name) > 50, "taken for the large kind"
    second = fit_routes(np.concatenate(later), previous=first)
    assert len(second.routes) == 3 and second.route_of(prompts(0, 1, seed=2)[0]) == name
    assert purity(second, [prompts(2, 100, seed=2), prompts(0, 100, seed=2), part(100, seed=7)]) > 0.97


def test_prompts_like_a_tagged_routes_find_it_without_a_tag() -> None:
    seen = np.concatenate([prompts(0, 100, seed=0), prompts(0, 100, seed=1), prompts(1, 100, seed=0)])
    table = fit_routes(seen, ["sql"] * 100 + ["default"] * 200)
    assert table.route_of(prompts(0, 1, seed=2)[0]) == "sql"
    assert "sql" in table.routes
    assert len(table.routes) == 2


def test_a_tag_whose_prompts_are_like_all_others_draws_no_untagged_traffic() -> None:
    table = fit_routes(prompts(0, 300, seed=0), ["europe"] * 100 + ["default"] * 200)
    assert table.routes == ()
    assert table.route_of(prompts(0, 1, seed=1)[0]) == "default"


def test_a_table_is_told_without_its_closed_routes() -> None:
    table = fit_routes(np.concatenate([prompts(kind, 100, seed=0) for kind in range(3)]))
    kept = restricted(table, ["auto-2"])
    assert kept.routes == ("auto-2",)
    kind = next(kind for kind in range(3) if table.route_of(prompts(kind, 1, seed=1)[0]) == "auto-2")
    assert kept.route_of(prompts(kind, 1, seed=1)[0]) == "auto-2"


def test_who_knows_fewer_routes_leaves_the_prompts_of_others_to_the_default() -> None:
    table = fit_routes(np.concatenate([prompts(kind, 100, seed=0) for kind in range(3)]))
    told = told_of(table, ["auto-2"])
    assert sorted(told.routes) == ["auto-2", "default", "default"]
    for kind in range(3):
        prompt_H = prompts(kind, 1, seed=1)[0]
        route = table.route_of(prompt_H)
        assert told.route_of(prompt_H) == (route if route == "auto-2" else "default")


def test_a_known_kind_with_few_prompts_keeps_its_place_and_takes_no_others() -> None:
    first = fit_routes(np.concatenate([prompts(kind, 100, seed=0) for kind in range(2)]))
    rare = first.route_of(prompts(0, 1, seed=2)[0])
    seen = [prompts(0, 5, seed=1), *(prompts(kind, 100, seed=1) for kind in (1, 2, 3))]
    second = fit_routes(np.concatenate(seen), previous=first)
    assert second.route_of(prompts(0, 1, seed=2)[0]) == rare
    assert len({second.route_of(prompts(kind, 1, seed=2)[0]) for kind in range(4)}) == 4
