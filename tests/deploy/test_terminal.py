"""Texts from outside are shown by every command as they are: no markup, no emoji, nothing obeyed."""

import ast
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import example, given
from hypothesis import strategies as st
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner, Result

from benchmarks.screen import ProgressScreen
from benchmarks.throughput_views import table as throughput_table
from buffer.records import AdapterEvent, AdapterManifest, DrafterCounts, ServingStatus
from buffer.redis_server import EmbeddedRedis
from deploy.cli import app
from deploy.commands.console import fail
from deploy.commands.invitation import invite
from deploy.demo.corpus import Prompt
from deploy.demo.screen import DemoScreen
from deploy.demo.traffic import Ask, RequestOutcome
from deploy.running import own_note, write_learner_snapshot, write_note
from deploy.settings_source import load_settings
from deploy.terminal import Terminal, lines, visible
from deploy.wiring import RunningSystem, open_feed
from tests.deploy.everdraft_process import ROOT

HOSTILE = [
    "see [/ops/1]",
    "[bold]loud[/bold]",
    "[red",
    "a [link=http://x]b[/]",
    "one\ntwo",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "over\rwritten\x08\x7f\x9b2J",
    ":smile: back\\slash\\[x]",
    "\u202etxt.exe",
]
ALL = " | ".join(HOSTILE)
SHOWN = visible(ALL)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state folder of a running everdraft of which every word is hostile."""
    folder = tmp_path_factory.mktemp("state")
    with EmbeddedRedis() as server:
        feed = open_feed(server.url, "t" * 64)
        feed.publish(manifest(1), b"weights")
        feed.add_event(AdapterEvent("refused", ALL, 1, ALL, time.time()))
        feed.pin(ALL, 1, ALL)
        counts = DrafterCounts(
            "draft", ALL, 1, num_rounds=2, num_attempted=8, num_accepted=4, num_output_tokens=6
        )
        status = ServingStatus(
            replica_id=ALL,
            at_s=time.time(),
            serving_versions={ALL: 1},
            counts=(counts,),
            last_error=ALL,
        )
        feed.report(status)
        feed.close()
        note = {"url": f"http://{ALL}", "target": ALL, "draft": ALL, "tracking_uri": ALL, "learns": True}
        note["target_revision"] = "t" * 64
        write_note(folder, own_note(redis_url=server.url, **note))  # type: ignore[arg-type]
        decision = {"kind": ALL, "draft_version": 1, "reason": ALL}
        write_learner_snapshot(folder, {"state": ALL, "last_decision": decision})
        yield folder


def manifest(version: int) -> AdapterManifest:
    return AdapterManifest(
        route=ALL,
        draft_version=version,
        parent_version=version - 1,
        draft_id=ALL,
        draft_revision=ALL,
        target_revision=ALL,
        rank=8,
        alpha=16.0,
        target_modules=(ALL,),
        adapter_config_json="{}",
        sha256=ALL,
        num_bytes=1,
        created_at_s=time.time(),
        evidence={ALL: 0.5},
        mlflow_run_id=ALL,
    )


def is_harmless(text: str) -> bool:
    return visible(text.replace("\n", "")) == text.replace("\n", "")


def run(folder: Path, *arguments: str) -> Result:
    # wide enough for no cell to be cut
    return CliRunner().invoke(app, [*arguments, "--state-dir", str(folder)], env={"COLUMNS": "4000"})


@pytest.mark.parametrize(
    ("command", "times"),
    [
        (("status",), 10),
        (("drafts", "list"), 3),
        (("drafts", "list", "--route", "nowhere"), 1),
        (("drafts", "list", "--route", ALL), 3),
        (("drafts", "show", "1", "--route", ALL), 9),
        (("drafts", "pin", "1", "--route", ALL, "--reason", ALL), 1),
        (("drafts", "rollback", "--route", ALL, "--reason", ALL), 1),
        (("drafts", "unpin", "--route", ALL, "--reason", ALL), 1),
        (("drafts", "show", "7", "--route", ALL), 0),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, tuple) else None,
)
def test_every_command_shows_what_it_was_told_and_obeys_none_of_it(
    run_dir: Path, command: tuple[str, ...], times: int
) -> None:
    shown = run(run_dir, *command)
    assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.exception
    assert is_harmless(shown.output)
    assert shown.output.count(SHOWN) >= times, shown.output


def test_json_keeps_every_character_and_sends_none_to_the_terminal(run_dir: Path) -> None:
    shown = run(run_dir, "status", "--json")
    assert is_harmless(shown.output)
    content = json.loads(shown.output)
    assert content["replicas"][0]["last_error"] == ALL
    assert [list(routes) for routes in content["routes"].values()] == [[ALL]]


def test_a_fault_is_told_a_line_each_and_without_a_password(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        fail("first [/ops/1] \x1b[31m\nsecond redis://:sesame@host:1/0")
    assert capsys.readouterr().err.splitlines() == [
        "error: first [/ops/1] ␛[31m",
        "error: second redis://***@host:1/0",
    ]


def test_the_doctor_shows_what_went_wrong_as_it_was_said(tmp_path: Path) -> None:
    missing = f"/no/such/{HOSTILE[0]} \x1b[31m"
    shown = run(tmp_path, "doctor", "--target", missing)
    assert shown.exit_code == 1 and is_harmless(shown.output)
    assert "[/ops/1]" in shown.output


def test_an_invitation_shows_names_as_they_are_and_no_password() -> None:
    environment = {
        "EVERDRAFT__SERVING__TARGET": ALL,
        "EVERDRAFT__SERVING__MODEL_NAME": ALL,
        "EVERDRAFT__SERVING__DRAFT": ALL,
        "EVERDRAFT__MLFLOW__TRACKING_URI": "postgresql://me:sesame@host/runs",
    }
    learner: Any = object()  # only whether there is one is asked
    system = RunningSystem(load_settings(environment=environment), f"http://{ALL}", "redis://", learner, "t")
    console = terminal()
    invite(console, system)
    assert is_harmless(said(console)) and said(console).count(SHOWN) >= 3
    assert "postgresql://***@host/runs" in said(console) and "sesame" not in said(console)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_demos_screen_shows_events_and_phases_as_they_are(is_terminal: bool) -> None:
    console = terminal(force_terminal=is_terminal, color_system=None)
    with DemoScreen(console) as screen:
        screen.begin(ALL, 5)
        ask = Ask(Prompt(ALL, ALL, ({"role": "user", "content": ALL},), ALL), 4)
        screen.add(ALL, RequestOutcome(ask, error=ALL))
        screen.show_events([AdapterEvent("refused", "default", 1, ALL, 0.0)])
        console.print(screen.traffic_table())
        console.print(screen._render())
    assert said(console).count(SHOWN) >= 4


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_benchmarks_views_show_notes_and_doings_as_they_are(is_terminal: bool) -> None:
    console = terminal(force_terminal=is_terminal, color_system=None)
    with ProgressScreen(console, num_steps=1, num_requests=1) as screen:
        screen.report(ALL)
        if is_terminal:
            console.print(screen._bars)
    row: dict[str, Any] = dict.fromkeys(
        ("tokens_per_s", "acceptance_rate", "block_efficiency", "measured_speedup", "predicted_speedup")
    )
    row |= {"concurrency": 1, "dtype": "float32", "temperature": 0.0, "prompt_tokens": 8, "mode": "m"}
    console.print(throughput_table([row | {"note": ALL}]))  # type: ignore[list-item]
    assert said(console).count(SHOWN) >= 2


@given(text=st.text())
@example("\udc80")
def test_no_text_controls_the_terminal_wherever_it_stands(text: str) -> None:
    console = terminal(width=100_000)
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    table.add_row(lines([text, text]))
    console.print(text, Text(text), table)
    with Live(Text(text), console=console, auto_refresh=False):
        pass
    assert is_harmless(said(console))
    said(console).encode()


def test_a_text_on_one_line_stays_on_one_line() -> None:
    console = terminal()
    console.print("reason\nreplica r9: serves draft 7")
    assert said(console) == "reason␊replica r9: serves draft 7\n"


def test_styles_of_our_own_still_reach_a_terminal() -> None:
    console = terminal(force_terminal=True, color_system="standard")
    console.print(Text("serves", "bold green"))
    assert said(console) == "\x1b[1;32mserves\x1b[0m\n"


CONSOLE_MAKERS = {"Console", "get_console", "from_markup", "render_markup"}


def test_no_other_console_is_made_and_no_markup_is_asked_for() -> None:
    """So that the next command cannot forget: whoever prints gets the terminal of `deploy.terminal`."""
    sources = [file for folder in ("deploy", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    faults = [
        f"{file.relative_to(ROOT)}:{node.lineno} {fault}"
        for file in sources
        if file.name != "terminal.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (fault := _fault(node))
    ]
    assert faults == []


@pytest.mark.parametrize(
    "source",
    [
        "Console()",
        "from rich.markup import escape",
        "from rich import print",
        "console.print(a, markup=True)",
        "TextColumn('{task.description}')",
        "console.print('first\\nsecond')",
        "console.print(f'\\n{name}')",
        "console.print(f'[bold]{name}[/]')",
        "Text.from_markup(name)",
        "Progress()",
    ],
)
def test_a_source_that_asks_for_markup_is_caught(source: str) -> None:
    assert any(_fault(node) for node in ast.walk(ast.parse(source)))


def _fault(node: ast.AST) -> str | None:
    if isinstance(node, ast.ImportFrom):
        return "imports what knows markup" if node.module in ("rich", "rich.markup") else None
    if not isinstance(node, ast.Call):
        return None
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in CONSOLE_MAKERS:
        return f"calls {name}"
    if "markup" in given and ast.unparse(given["markup"]) != "False":
        return "asks for markup"
    if name == "TextColumn" and "markup" not in given:
        return "a TextColumn takes its text for markup unless told otherwise"
    if name in ("Progress", "Live") and "console" not in given:
        return f"{name} makes a console of its own"
    if name == "print" and isinstance(node.func, ast.Attribute):
        return _printed_fault(node)
    return None


def _printed_fault(call: ast.Call) -> str | None:
    texts = [
        part.value
        for argument in call.args
        if isinstance(argument, ast.Constant | ast.JoinedStr)
        for part in ast.walk(argument)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    if any("\n" in text for text in texts):
        return "a str is one line: print several"
    return "markup is shown as it is" if any("[/" in text for text in texts) else None


def terminal(**options: Any) -> Terminal:
    return Terminal(file=io.StringIO(), **{"width": 4000, **options})


def said(console: Terminal) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()
