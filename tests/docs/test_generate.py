"""The generated half of the documentation says what the sources say, and `--check` knows when it does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs import generate, map_page

ROOT = Path(__file__).parent.parent.parent
PAGES = tuple(generate.PAGES)


def checked(seed: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONHASHSEED": seed}
    command = [sys.executable, "-m", "docs.generate", "--check"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("seed", ["1", "2"])
def test_no_page_is_stale_whatever_the_order_of_hashes(seed: str) -> None:
    done = checked(seed)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_stale_page_is_named_with_what_to_do_and_generation_keeps_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in PAGES:
        (tmp_path / page).write_text((generate.DOCS / page).read_text(encoding="utf-8"), encoding="utf-8")
    whole = (tmp_path / "metrics.md").read_text(encoding="utf-8")
    head = "# By hand\n\n"
    (tmp_path / "metrics.md").write_text(head + generate.MARKER + "\n\nold\n", encoding="utf-8")
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    assert generate.main(["--check"]) == 1
    told = capsys.readouterr().out
    assert "docs/metrics.md" in told and "`make docs`" in told and "docs/map.md" not in told
    assert generate.main([]) == 0
    assert (tmp_path / "metrics.md").read_text(encoding="utf-8") == head + whole[
        whole.index(generate.MARKER) :
    ]
    assert generate.main(["--check"]) == 0


def test_the_map_names_every_source_file_and_no_other() -> None:
    files = {
        str(file.relative_to(ROOT))
        for floor in map_page.FLOORS
        for file in (ROOT / floor).rglob("*.py")
        if file.name != "__init__.py"
    }
    mapped, folder = set(), ""
    for line in "\n".join(map_page.map_lines()).splitlines():
        if line.startswith("## `"):
            folder = line.split("`")[1]
        elif line.startswith("| `"):
            name, said = line.split("`")[1], line.split("|")[2]
            assert said.strip(), f"{folder}{name} has no module docstring"
            mapped.add(f"{folder}{name}")
    assert mapped == files


def test_every_setting_is_there_with_its_variable_default_and_meaning() -> None:
    lines = "\n".join(generate.settings_lines())
    assert (
        "| `serving.num_slots`<br>`EVERDRAFT__SERVING__NUM_SLOTS` | integer (at least 1) | `8` | "
        "Sequences that run at once in a replica. |" in lines
    )
    assert (
        "| `serving.target`<br>`EVERDRAFT__SERVING__TARGET` | text (length at least 1) | required |" in lines
    )
    assert "`EVERDRAFT__LEARNER__REPLAY_SHARE`" in lines


def test_every_metric_is_there_with_its_labels_as_prometheus_serves_it() -> None:
    lines = "\n".join(generate.metrics_lines())
    assert "| `everdraft_records_dropped_total` | counter | `reason`, `replica` |" in lines
    assert "`draft_version`, `drafter`, `position`, `replica`, `route`" in lines


def test_every_endpoint_is_there_with_its_key_and_statuses() -> None:
    lines = "\n".join(generate.api_lines())
    assert "| `POST /v1/completions` | client | 200, 400, 401, 403, 404, 408, 413, 429, 500, 503 |" in lines
    assert "| `GET /health` | none |" in lines
    assert "| `GET /admin/status` | admin |" in lines
