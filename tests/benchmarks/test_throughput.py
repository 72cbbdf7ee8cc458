"""The throughput benchmark on a tiny random pair: its rows, its formula, its prompts, and its honesty."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.adapted import Adapter, Recipe, adapt
from benchmarks.commands import app
from benchmarks.engine_modes import ask_by_clients
from benchmarks.forwards import ForwardTimes, measure_forwards, pass_runners
from benchmarks.lineup import Lineup
from benchmarks.modes import MODES, ModeOutcome, Rounds
from benchmarks.prompts import SHORT_TOKENS, demo_prompts, folder_prompts
from benchmarks.rows import KEYS, MeasuredSetting, Setting
from benchmarks.throughput import ThroughputPlan, figures, full_settings, measure, quick_settings
from benchmarks.throughput_views import plot_throughput, table
from deploy.demo.question_rows import DataError
from serving.engine import SamplingParams
from serving.local import load_engine
from serving.models.loading import ModelPair, load_pair
from serving.options import EngineOptions
from tests.support.tiny_learner import quick_settings as quick_learner
from tests.support.tiny_models import save_tiny_pair

TIMES = ForwardTimes((0, 1, 2, 4, 8), (10.0, 11.0, 12.0, 14.0, 18.0), (0.0, 2.0, 2.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def pair(folders: tuple[str, str]) -> ModelPair:
    return load_pair(*folders)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few and short rows, so that a prompt needs several and the file more than one pass."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"add {number} and {number}", "response": str(2 * number)} for number in range(5)]
    lines = [json.dumps(row) for row in rows]
    (folder / "sums.jsonl").write_text("\n".join(["no json", *lines, json.dumps({"question": "?"})]))
    return folder


@pytest.fixture(scope="module")
def adapter(pair: ModelPair, data: Path) -> Adapter:
    """Learnt by the product's own loop, with a gate that lets anything pass."""
    prompts = folder_prompts(pair.tokenizer, data, 16)
    settings = quick_learner(min_records_per_cycle=8, gate_min_gain=0.0, gate_level=0.49, gate_min_records=2)
    recipe = Recipe(num_requests=96, requests_per_cycle=24, max_tokens=12, prompt_tokens=16)
    cycles = []
    adaptation = adapt(pair, prompts, settings, recipe, cycles.append)
    assert [cycle.num_requests for cycle in cycles] == [24, 48, 72, 96]
    assert adaptation.history == cycles
    assert adaptation.adapter is not None, "no candidate passed"
    return adaptation.adapter


@pytest.fixture(scope="module")
def measured(
    folders: tuple[str, str], data: Path, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ThroughputPlan, list[MeasuredSetting]]:
    """All modes, at one request and at three, two turns each."""
    adapter_folder = tmp_path_factory.mktemp("adapter")
    adapter.save(adapter_folder)
    plan = ThroughputPlan(
        target=folders[0],
        draft=folders[1],
        settings=(Setting(1, "float32", 0.0, 16), Setting(3, "float32", 0.0, 16)),
        turns=2,
        num_output_tokens=12,
        data=data,
        adapter=adapter_folder,
        compile="off",
    )
    said: list[str] = []
    found = list(measure(plan, on_cycle=lambda cycle: None, report=said.append))
    assert len(said) == plan.num_steps
    return plan, found


@pytest.mark.slow
def test_every_setting_has_one_row_a_mode_with_exactly_the_promised_keys(
    measured: tuple[ThroughputPlan, list[MeasuredSetting]],
) -> None:
    metrics, _ = figures(*measured)
    assert [row["mode"] for row in metrics["rows"]] == [*MODES, *MODES]
    assert [row["concurrency"] for row in metrics["rows"]] == [1] * len(MODES) + [3] * len(MODES)
    for row in metrics["rows"]:
        assert set(row) - {"note"} == set(KEYS)
        assert ("note" in row) == (row["tokens_per_s"] is None)
        assert row["mode"] == "engine_ngram" or row["tokens_per_s"] > 0.0, row


@pytest.mark.slow
def test_every_mode_says_what_the_target_says_in_float32(
    measured: tuple[ThroughputPlan, list[MeasuredSetting]],
) -> None:
    metrics, _ = figures(*measured)
    fractions = metrics["greedy_float32_identical_fraction"]
    assert set(MODES) - set(fractions) <= {"engine_ngram"}
    assert set(fractions.values()) == {1.0}


@pytest.mark.slow
def test_figures_of_rounds_are_there_where_a_mode_has_rounds(
    measured: tuple[ThroughputPlan, list[MeasuredSetting]],
) -> None:
    rows = {row["mode"]: row for row in measured[1][0].rows()}
    assert rows["engine_off"]["block_efficiency"] == 1.0
    assert rows["engine_off"]["measured_speedup"] == 1.0
    assert rows["engine_off"]["predicted_speedup"] == 1.0
    assert rows["engine_off"]["acceptance_rate"] is None
    assert 0.0 <= rows["engine_adapted"]["acceptance_rate"] <= 1.0
    for mode in MODES:
        if mode.startswith("transformers"):
            assert rows[mode]["block_efficiency"] is rows[mode]["predicted_speedup"] is None
            assert rows[mode]["measured_speedup"] > 0.0


@pytest.mark.slow
def test_the_report_is_plain_json_and_can_be_drawn(
    measured: tuple[ThroughputPlan, list[MeasuredSetting]], tmp_path: Path
) -> None:
    metrics, series = figures(*measured)
    assert json.loads(json.dumps([metrics, series])) is not None
    assert [len(turns["tokens_per_s"]) for turns in series["turns"] if turns["mode"] == "engine_off"] == [
        2,
        2,
    ]
    plot_throughput(metrics["rows"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert table(measured[1][0].rows()).row_count == len(MODES)


def test_predicted_speedup_by_hand() -> None:
    # 3 tokens a round: 3 x 10 / (14 + 4 x 1)
    assert TIMES.predicted_speedup(3.0, 4.0, 4.0) == pytest.approx(30.0 / 18.0)
    # between 2 and 4: a target pass of 13 and draft passes of 1.5
    assert TIMES.predicted_speedup(2.0, 3.0, 3.0) == pytest.approx(20.0 / (13.0 + 3 * 1.5))
    # under one draft token a pass costs what the first does
    assert TIMES.predicted_speedup(1.2, 0.5, 0.5) == pytest.approx(12.0 / (10.5 + 0.5 * 2.0))
    assert TIMES.predicted_speedup(1.2, 0.5, 0.0) == pytest.approx(12.0 / 10.5)
    assert TIMES.predicted_speedup(1.0, 0.0, 0.0) == 1.0
    assert TIMES.predicted_speedup(5.0, 8.0, 8.0) == pytest.approx(50.0 / 26.0)


def test_forwards_are_timed_at_every_length(pair: ModelPair) -> None:
    assert pair.draft is not None
    runners = pass_runners(pair, num_slots=2, max_seq_len=64, compile="off")
    times = measure_forwards(runners, batch_size=2, context_tokens=16, repeats=2)
    assert len(times.target_pass_s) == len(times.draft_pass_s) == len(times.num_draft_tokens)
    assert all(seconds > 0.0 for seconds in times.target_pass_s)
    assert times.draft_pass_s[0] == 0.0 and all(seconds > 0.0 for seconds in times.draft_pass_s[1:])


@pytest.mark.parametrize("num_tokens", [64, 1000])
def test_demo_prompts_end_with_the_question_and_long_ones_have_exactly_the_length(
    pair: ModelPair, num_tokens: int
) -> None:
    prompts = list(islice(demo_prompts(pair.tokenizer, num_tokens), 10))
    lengths = [len(prompt) for prompt in prompts]
    assert max(lengths) <= num_tokens if num_tokens == SHORT_TOKENS else lengths == [num_tokens] * 10
    ending = pair.tokenizer.encode("<|end|><|assistant|>")
    assert all(prompt[-len(ending) :] == ending for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) == 10


def test_prompts_of_a_folder_have_the_length_and_never_end(pair: ModelPair, data: Path) -> None:
    long = list(islice(folder_prompts(pair.tokenizer, data, SHORT_TOKENS + 1), 12))
    assert [len(prompt) for prompt in long] == [SHORT_TOKENS + 1] * 12
    short = list(islice(folder_prompts(pair.tokenizer, data, 40), 12))
    assert all(0 < len(prompt) <= 40 for prompt in short)


def test_clients_keep_so_many_requests_under_way_and_answers_stay_in_order(
    folders: tuple[str, str],
) -> None:
    prompts = [[5 + index, 9] for index in range(7)]
    greedy = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with load_engine(*folders, EngineOptions(num_slots=4, max_seq_len=64)) as engine:
        asked = ask_by_clients(engine, prompts, greedy, 3)
        alone = engine.generate(prompts, greedy)
    assert [g.output_token_ids for g in asked] == [g.output_token_ids for g in alone]
    assert [g.prompt_token_ids for g in asked] == [tuple(prompt) for prompt in prompts]


def test_a_folder_without_prompts_is_refused(pair: ModelPair, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no"):
        folder_prompts(pair.tokenizer, tmp_path, 64)


@pytest.mark.parametrize("option", ["--data", "--adapter"])
def test_the_command_refuses_a_folder_that_holds_nothing(option: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["throughput", "--quick", option, str(tmp_path / "nowhere")])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {option.strip('-')}={tmp_path / 'nowhere'}")
    assert "nothing was measured" in done.stderr


def test_settings_are_the_promised_grid() -> None:
    assert {setting.concurrency for setting in quick_settings()} == {1, 8}
    assert {vars(setting)["dtype"] for setting in quick_settings()} == {"float32"}
    assert len(set(full_settings())) == 4 * 2 * 2 * 2
    assert set(quick_settings()) <= set(full_settings())


class Failing:
    """Works once, then breaks; counts how often it was made."""

    num_made = 0

    def __init__(self) -> None:
        Failing.num_made += 1
        self._calls = iter([ModeOutcome(2.0, [[1, 2]], Rounds(2, 1, 1, 0))])

    def generate(
        self, prompts: list[list[int]], *, concurrency: int, num_tokens: int, temperature: float
    ) -> ModeOutcome:
        return next(self._calls)

    def close(self) -> None:
        pass


def test_a_mode_that_fails_becomes_a_note_and_is_made_anew() -> None:
    lineup = Lineup({"shaky": Failing})
    assert lineup.run("shaky", [[1]], concurrency=1, num_tokens=2, temperature=0.0) == ModeOutcome(
        2.0, [[1, 2]], Rounds(2, 1, 1, 0)
    )
    assert "StopIteration" in str(lineup.run("shaky", [[1]], concurrency=1, num_tokens=2, temperature=0.0))
    assert isinstance(lineup.run("shaky", [[1]], concurrency=1, num_tokens=2, temperature=0.0), ModeOutcome)
    assert Failing.num_made == 2


def test_a_row_of_a_failed_mode_has_no_figures_but_a_note() -> None:
    outcomes = {mode: [ModeOutcome(2.0, [[1, 2, 3, 4]])] for mode in MODES}
    notes = {"transformers_continuous": "RuntimeError: no"}
    rows = MeasuredSetting(Setting(1, "bfloat16", 1.0, 64), outcomes, notes, TIMES).rows()
    row = rows[MODES.index("transformers_continuous")]
    assert row["note"] == "RuntimeError: no" and row["tokens_per_s"] is row["measured_speedup"] is None
    assert rows[0]["tokens_per_s"] == 2.0 and rows[0]["measured_speedup"] == 1.0


def test_speedups_are_medians_of_ratios_within_turns() -> None:
    def turns(*walls_s: float) -> Iterator[ModeOutcome]:
        return (ModeOutcome(wall_s, [[0] * 12]) for wall_s in walls_s)

    outcomes = {mode: list(turns(1.0, 2.0, 4.0)) for mode in MODES}
    outcomes["engine_adaptive"] = list(turns(0.5, 2.0, 1.0))
    rows = MeasuredSetting(Setting(1, "float32", 0.0, 64), outcomes, {}, TIMES).rows()
    row = rows[MODES.index("engine_adaptive")]
    assert row["measured_speedup"] == 2.0
    assert row["tokens_per_s"] == 12.0
