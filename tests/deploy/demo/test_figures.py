"""The demo's arithmetic: what it compares, averages, reports and claims, on outcomes made by hand."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from buffer.memory_store import MemoryAdapterFeed
from deploy.demo.comparison import ARMS, ArmTurn, Comparison, Identity, first_difference, identity, verdict
from deploy.demo.corpus import DOMAINS, Prompt
from deploy.demo.figures import metrics_of, save_plot, series
from deploy.demo.load import Load, ProcessorTimes, load_between, processor_times
from deploy.demo.plan import Timekeeper
from deploy.demo.plot import moving_acceptance, plot_acceptance, swaps
from deploy.demo.report import write_report
from deploy.demo.screen import DemoScreen
from deploy.demo.session import DemoResult, Phase
from deploy.demo.summary import speed_sentence, summarise
from deploy.demo.traffic import Ask, Clients, RequestOutcome


def _outcome(version: int = 0, attempted: int = 10, accepted: int = 5, tokens: int = 4) -> RequestOutcome:
    prompt = Prompt("sql", "key", ({"role": "user", "content": "how many?"},), "one")
    return RequestOutcome(
        Ask(prompt, 8),
        token_ids=tuple(range(tokens)),
        num_attempted=attempted,
        num_accepted=accepted,
        draft_version=version,
    )


def _pair(number: int, domain: str, seconds: tuple[float, ...] = (1.0, 1.0, 1.0)) -> list[ArmTurn]:
    """One turn of every arm that a duration is given for."""
    return [
        ArmTurn(number, arm, domain, [_outcome()], wall_s) for arm, wall_s in zip(ARMS, seconds, strict=False)
    ]


def _summary(result: DemoResult) -> str:
    """What a person without a terminal reads at the end."""
    written = io.StringIO()
    console = Console(file=written, soft_wrap=True, width=80)
    screen = DemoScreen(console)
    for phase in result.phases:
        screen.begin(phase.name, phase.num_planned)
    summarise(console, screen, result, metrics_of(result, MemoryAdapterFeed(), wall_s=1.0))
    return written.getvalue()


def test_the_first_difference_is_a_token_or_the_shorter_end() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_near_ties_count_as_identical_and_a_real_difference_does_not() -> None:
    assert Identity(10, 9, 1).fraction == 1.0
    assert Identity(10, 9, 0).fraction == 0.9


def test_a_difference_that_there_was_no_time_to_look_into_is_no_near_tie() -> None:
    alone = replace(_outcome(), ask=replace(_outcome().ask, num_draft_tokens=0))
    other = _outcome(tokens=3)
    limit = Timekeeper(lambda: 0.0).begin(1.0)
    assert identity([alone, other], lambda ask, position: 0.0, limit) == Identity(1, 0, 1)
    over = Timekeeper(lambda: 0.0).begin(0.0)
    assert identity([alone, other], lambda ask, position: 0.0, over) == Identity(1, 0, 0, 1)


def test_an_answer_whose_counterpart_was_cut_or_failed_is_not_compared() -> None:
    alone = replace(_outcome(), ask=replace(_outcome().ask, num_draft_tokens=0))
    limit = Timekeeper(lambda: 0.0).begin(1.0)
    failed = RequestOutcome(alone.ask, error="503")
    assert identity([_outcome()], lambda ask, position: 0.0, limit).fraction is None
    assert identity([failed, _outcome()], lambda ask, position: 0.0, limit).fraction is None


def test_acceptance_is_pooled_over_tokens_and_speed_is_the_median_of_turns() -> None:
    floor = [
        ArmTurn(0, "floor", "sql", [_outcome(accepted=1), _outcome(attempted=90, accepted=80)], 2.0),
        ArmTurn(1, "floor", "sql", [_outcome()], 1.0),
        ArmTurn(2, "floor", "sql", [_outcome()], 0.1),
    ]
    others = [turn for number in range(3) for turn in _pair(number, "sql") if turn.arm != "floor"]
    comparison = Comparison([*floor, *others])
    assert comparison.acceptance_rate("sql", "floor") == (1 + 80 + 5 + 5) / (10 + 90 + 10 + 10)
    assert comparison.num_attempted("sql", "floor") == 120
    assert comparison.tokens_per_s("sql", "floor") == 4.0
    assert comparison.domains == ["sql"] and comparison.num_turns == 3


def test_a_speed_up_is_the_median_of_the_pairs_own_ratios() -> None:
    # The machine grows ten times slower from turn to turn; the medians of both arms' speeds would say 1.
    seconds = [(1.0, 1.0, 0.5), (10.0, 10.0, 5.0), (5.0, 100.0, 50.0)]
    comparison = Comparison([turn for n, s in enumerate(seconds) for turn in _pair(n, "sql", s)])
    assert comparison.ratios("sql") == pytest.approx([2.0, 2.0, 0.1])
    assert comparison.speed_up("sql") == pytest.approx(2.0)


def test_only_what_every_arm_answered_counts() -> None:
    whole, cut = _pair(0, "sql"), _pair(1, "sql", (1.0, 1.0))
    failed = [
        replace(turn, outcomes=[RequestOutcome(_outcome().ask, error="503")]) for turn in _pair(2, "sql")
    ]
    comparison = Comparison([*whole, *cut, *failed])
    assert comparison.num_pairs("sql") == 1 and len(comparison.ratios("sql")) == 1
    assert len(comparison.outcomes) == 3 + 2 + 3


def test_faster_is_said_only_where_a_coin_would_hardly_do_as_well() -> None:
    assert verdict([1.5] * 5) == "faster" and verdict([0.9] * 5) == "slower"
    assert verdict([1.5] * 4) == "no difference shown"
    assert verdict([1.5, 1.5, 1.5, 1.5, 0.9]) == "no difference shown"
    assert verdict([]) == "no difference shown"
    assert verdict([2.0] * 9 + [0.9]) == "faster"


def test_the_sentence_on_speed_says_what_the_pairs_say() -> None:
    fast = Comparison([turn for n in range(5) for turn in _pair(n, "sql", (1.0, 1.0, 0.5))])
    assert "faster (more tokens a second in 5 of 5 pairs, 2.00x" in speed_sentence(fast)
    few = Comparison(_pair(0, "sql", (1.0, 1.0, 0.5)))
    assert "no difference shown (more tokens a second in 1 of 1 pairs" in speed_sentence(few)
    assert "was not measured: its 60 s were used" in speed_sentence(
        Comparison([], shortage="its 60 s were used")
    )


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


def test_a_story_in_which_nothing_came_to_pass_claims_nothing(tmp_path: Path) -> None:
    result = DemoResult(
        phases=[Phase(name, 0, 320, 0) for name in (*DOMAINS, "mixed")],
        comparisons={1: Comparison([], ARMS[:-1], "its 60 s were used")},
        passes=["eager (no C++ compiler is installed)"],
    )
    told = _summary(result)
    for domain in DOMAINS:
        assert f"{domain} " in told
    assert told.count("0 of 320") == 6
    assert f"not measured: {', '.join(DOMAINS)} (its 60 s were used)" in told
    assert f"no draft was promoted during the traffic of {', '.join(DOMAINS)}" in told
    assert "adapted against no speculation was not measured: no draft was promoted" in told
    assert "no answer was compared" in told and "no pause was measured" in told
    assert "%" not in told and "0.0 ms" not in told and "0.00" not in told
    assert "eager (no C++ compiler is installed)" in told
    metrics = metrics_of(result, MemoryAdapterFeed(), wall_s=1.0)
    assert metrics["speed_up"] == metrics["acceptance_rate_floor"] == dict.fromkeys(DOMAINS)
    assert metrics["greedy_identical_fraction"] is metrics["swap_pause_s_max"] is None
    assert metrics["num_pairs"] == dict.fromkeys(DOMAINS, 0)
    save_plot(result, tmp_path / "empty.png")
    write_report(tmp_path / "r.json", "demo", metrics, series(result))


def test_a_domain_that_saw_no_promotion_says_so_and_a_cut_one_says_why() -> None:
    phases = [Phase("prose", 320, 320, 1), Phase("sql", 90, 320, 0), Phase("maths", 80, 320, 2)]
    turns = [turn for domain in ("prose", "code", "sql") for turn in _pair(0, domain)]
    turns += _pair(0, "maths", (1.0, 1.0))
    result = DemoResult(phases, comparisons={1: Comparison(turns, shortage="its 60 s were used")})
    told = _summary(result)
    assert "no draft was promoted during the traffic of sql\n" in told
    assert "not measured: maths, chat (its 60 s were used)" in told
    assert max(map(len, told.partition("\nnot measured")[0].splitlines())) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line.startswith(DOMAINS)}
    assert rows["maths"] == ["-"] * 7
    assert rows["sql"] == ["0.50", "0.50", "4", "4", "4", "1.00x", "0", "of", "1"]


def test_the_summary_tells_the_load_beside() -> None:
    result = DemoResult(loads={"measuring": Load(wall_s=90.0, num_cores=2, own_cores=0.31, other_cores=1.68)})
    told = _summary(result)
    assert "while measuring, other processes used 1.7 of 2 cores, everdraft's own 0.3" in told
    loads = metrics_of(result, MemoryAdapterFeed(), wall_s=1.0)["loads"]
    assert loads["measuring"]["other_cores"] == 1.68


def test_the_load_beside_is_the_machines_less_our_own() -> None:
    load = load_between(ProcessorTimes(10.0, 100.0, 20.0), ProcessorTimes(20.0, 117.0, 24.0))
    assert load.other_cores == pytest.approx(1.3) and load.own_cores == pytest.approx(0.4)


def test_processor_times_count_this_process_and_children_that_ended() -> None:
    before = processor_times()
    # The child burns a fixed amount of processor time, however long that takes.
    code = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    after = processor_times()
    assert after.own_s - before.own_s >= 0.45
    assert after.machine_s - before.machine_s >= 0.4


def test_a_client_without_a_server_reports_an_error_and_raises_none() -> None:
    [outcome] = Clients("http://127.0.0.1:9", 1).send([_outcome().ask])
    assert outcome.error and not outcome.token_ids
