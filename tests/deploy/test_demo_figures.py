"""The demo's arithmetic: what it compares, averages and reports, on outcomes made by hand."""

import json
from pathlib import Path

from deploy.demo.comparison import Comparison, Identity, Turn, first_difference
from deploy.demo.corpus import Prompt
from deploy.demo.plot import moving_acceptance, plot_acceptance, swaps
from deploy.demo.report import write_report
from deploy.demo.traffic import Ask, Clients, Outcome


def _outcome(version: int = 0, attempted: int = 10, accepted: int = 5, tokens: int = 4) -> Outcome:
    prompt = Prompt("sql", "key", ({"role": "user", "content": "how many?"},), "one")
    return Outcome(
        Ask(prompt, 8),
        token_ids=tuple(range(tokens)),
        num_attempted=attempted,
        num_accepted=accepted,
        draft_version=version,
    )


def test_the_first_difference_is_a_token_or_the_shorter_end() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_near_ties_count_as_identical_and_a_real_difference_does_not() -> None:
    assert Identity(10, 9, 1).fraction == 1.0
    assert Identity(10, 9, 0).fraction == 0.9


def test_acceptance_is_pooled_over_tokens_and_speed_is_the_median_of_turns() -> None:
    turns = [
        Turn("floor", "sql", [_outcome(accepted=1), _outcome(attempted=90, accepted=80)], 2.0),
        Turn("floor", "sql", [_outcome()], 1.0),
        Turn("floor", "sql", [_outcome()], 0.1),
        Turn("adapted", "sql", [_outcome(accepted=10)], 1.0),
    ]
    comparison = Comparison(turns)
    assert comparison.acceptance_rate("sql", "floor") == (1 + 80 + 5 + 5) / (10 + 90 + 10 + 10)
    assert comparison.tokens_per_s("sql", "floor") == 4.0
    assert comparison.domains == ["sql"]


def test_swaps_are_marked_where_a_version_first_answers() -> None:
    outcomes = [_outcome(version) for version in (0, 0, 1, 0, 1, 2, 2)]
    assert swaps(outcomes) == [(2, 1), (5, 2)]


def test_the_moving_average_forgets_what_left_its_window() -> None:
    outcomes = [_outcome(accepted=0)] * 30 + [_outcome(accepted=10)] * 30
    average = moving_acceptance(outcomes)
    assert average[29] == 0.0 and average[44] == 0.5 and average[59] == 1.0


def test_there_is_no_average_where_hardly_anything_was_drafted() -> None:
    outcomes = [_outcome(attempted=1, accepted=1)] * 9 + [_outcome(attempted=5, accepted=0)]
    assert moving_acceptance(outcomes) == [None] * 9 + [9 / 14]


def test_the_picture_and_the_report_are_written(tmp_path: Path) -> None:
    plot_acceptance([_outcome(v // 3) for v in range(12)], [("prose", 6), ("sql", 6)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    write_report(tmp_path / "r.json", "demo", {"num_requests": 3}, {"swaps": [[1, 2]]})
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report) == {"name", "command", "environment", "metrics", "series"}
    assert report["environment"]["num_cores"] >= 1 and report["environment"]["libraries"]["torch"]


def test_a_client_without_a_server_reports_an_error_and_raises_none() -> None:
    [outcome] = Clients("http://127.0.0.1:9", 1).send([_outcome().ask])
    assert outcome.error and not outcome.token_ids
