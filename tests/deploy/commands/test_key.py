"""`everdraft key new`: a key that the settings never see."""

from pathlib import Path

from typer.testing import CliRunner

from deploy.cli import app
from deploy.settings_source import load_settings
from serving.tenants import digest_of


def test_a_key_is_shown_once_and_what_is_printed_is_a_settings_file(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["key", "new", "--name", "acme"])
    assert shown.exit_code == 0
    key, *lines = shown.stdout.splitlines()
    assert key not in "\n".join(lines)
    file = tmp_path / "everdraft.toml"
    file.write_text("\n".join(['[serving]\ntarget = "t"', *lines]))
    [tenant] = load_settings(file).serving.tenants
    assert (tenant.name, tenant.keys) == ("acme", (digest_of(key),))


def test_no_two_keys_are_alike() -> None:
    keys = {CliRunner().invoke(app, ["key", "new", "--name", "a"]).stdout.split()[0] for _ in range(3)}
    assert len(keys) == 3 and min(map(len, keys)) > 40


def test_a_name_that_is_none_is_refused() -> None:
    refused = CliRunner().invoke(app, ["key", "new", "--name", "two words"])
    assert refused.exit_code == 2
    assert "'two words'" in refused.stderr and "no key was made" in refused.stderr
    assert refused.stdout == ""


def test_a_wrong_tenant_is_named_with_its_place_and_no_key(tmp_path: Path) -> None:
    file = tmp_path / "everdraft.toml"
    file.write_text(
        '[serving]\ntarget = "t"\n[[serving.tenants]]\nname = "acme"\nkeys = ["the-key-itself"]\nlimit = 3\n'
    )
    shown = CliRunner().invoke(app, ["serve", "--config", str(file)])
    assert shown.exit_code == 2
    assert "serving.tenants" in shown.stderr and "limit" in shown.stderr
    assert "the-key-itself" not in shown.output
