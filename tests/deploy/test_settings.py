"""Settings: one file, the environment, the command line; every fault named with its place."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from buffer.redaction import SECRET_NAME
from buffer.store import Bounds
from deploy.errors import SettingsError
from deploy.learning import registered_base_name
from deploy.settings import Settings
from deploy.settings_source import load_settings
from deploy.wiring import learner_settings
from learner.settings import LearnerSettings

TARGET = {"EVERDRAFT__SERVING__TARGET": "models/target"}


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_the_command_line_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "everdraft.toml",
        "[serving]\ntarget = 'a'\nnum_slots = 2\nmax_seq_len = 64\n[cluster]\nport = 1001\n",
    )
    environment = {"EVERDRAFT__SERVING__NUM_SLOTS": "3", "EVERDRAFT__CLUSTER__PORT": "1002"}
    settings = load_settings(file, environment, {"cluster": {"port": 1003, "host": None}})
    assert settings.serving.max_seq_len == 64
    assert settings.serving.num_slots == 3
    assert settings.cluster.port == 1003
    assert settings.cluster.host == "127.0.0.1"


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_yaml_says_the_same_as_toml(tmp_path: Path, suffix: str) -> None:
    as_toml = written(tmp_path, "a.toml", "[serving]\ntarget = 'a'\n[learner]\nlora_rank = 4\n")
    as_yaml = written(tmp_path, f"a.{suffix}", "serving:\n  target: a\nlearner:\n  lora_rank: 4\n")
    assert load_settings(as_toml) == load_settings(as_yaml)


def test_an_unknown_key_in_the_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    file = written(tmp_path, "a.toml", "[serving]\ntarget = 'a'\nnum_slot = 4\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(file)
    message = str(caught.value)
    assert str(file) in message
    assert "serving.num_slot=4" in message
    assert "did you mean serving.num_slots?" in message
    assert "nothing was started" in message


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("EVERDRAFT__SERVNG__TARGET", "did you mean serving?"),
        ("EVERDRAFT__LEARNER__LORA_RNK", "did you mean learner.lora_rank?"),
        ("EVERDRAFT__REDIS__ADDRESS__HOST", "redis has url"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(variable: str, nearest: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(environment={**TARGET, variable: "1"})
    assert variable in str(caught.value)
    assert nearest in str(caught.value)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, "a.yaml", "serving: {target: a, num_slots: many}\ncluster: {port: 99999}\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(file, {"EVERDRAFT__LEARNER__HELD_OUT_SHARE": "2"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert f"{file}: serving.num_slots='many'" in lines[0]
    assert any(line.startswith("EVERDRAFT__LEARNER__HELD_OUT_SHARE: ") for line in lines)


def test_a_secret_never_appears_in_a_message(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(environment={**TARGET, "EVERDRAFT__SERVING__API_KEYS": "open-sesame"})
    assert "sesame" not in str(caught.value)
    settings = load_settings(environment={**TARGET, "EVERDRAFT__SERVING__API_KEYS": '["open-sesame"]'})
    assert settings.serving.revealed_api_keys() == ("open-sesame",)
    assert "sesame" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("ADMIN_KEY", "", "unset it to keep /admin shut, or give another"),
        ("ADMIN_KEY", "sesame", "unset it to keep /admin shut, or give another"),
        ("API_KEYS", "", "unset it to leave the endpoint open"),
        ("API_KEYS", '[""]', "take it out, or give another"),
        ("API_KEYS", '["open-sesame", "sesame"]', "take it out, or give another"),
    ],
)
def test_a_key_that_guards_nothing_is_refused_at_start(
    tmp_path: Path, name: str, text: str, remedy: str
) -> None:
    variable, setting = f"EVERDRAFT__SERVING__{name}", f"serving.{name.lower()}"
    file = written(tmp_path, "a.yaml", f"serving: {{target: a, {name.lower()}: {text or repr('')}}}\n")
    for place, sources in ((variable, (None, {**TARGET, variable: text})), (str(file), (file, {}))):
        with pytest.raises(SettingsError) as caught:
            load_settings(*sources)
        message = str(caught.value)
        assert message.startswith(f"{place}: {setting}=(hidden): ")
        assert remedy in message and "nothing was started" in message
        assert "sesame" not in message


@pytest.mark.parametrize(
    "setting",
    [
        "serving.target",
        "serving.draft",
        "serving.device",
        "redis.url",
        "mlflow.tracking_uri",
        "cluster.host",
        "cluster.ray_address",
        "cluster.state_dir",
    ],
)
@pytest.mark.parametrize("text", ["", " "])
def test_a_text_that_is_empty_is_refused(setting: str, text: str) -> None:
    """An unset variable of a compose file; taken for a value, it would listen on every interface."""
    variable = "EVERDRAFT__" + setting.upper().replace(".", "__")
    with pytest.raises(SettingsError, match=f"{variable}: {setting}=.* is empty; leave it out"):
        load_settings(environment={**TARGET, variable: text})


def test_a_missing_target_says_how_to_give_it() -> None:
    with pytest.raises(SettingsError, match=r"serving\.target is missing .*EVERDRAFT__SERVING__TARGET"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.toml", "= 3"), ("a.yaml", "a: [1"), ("a.yaml", "- 1"), ("a.ini", "[serving]"), ("a.toml", None)],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str | None) -> None:
    file = tmp_path / name
    if text is not None:
        written(tmp_path, name, text)
    with pytest.raises(SettingsError, match=name):
        load_settings(file)


def test_a_section_given_as_a_value_is_refused() -> None:
    with pytest.raises(SettingsError, match="is a section, not a value"):
        load_settings(environment={**TARGET, "EVERDRAFT__LEARNER": "fast"})


def test_null_switches_an_optional_value_off(tmp_path: Path) -> None:
    file = written(tmp_path, "a.toml", "[serving]\ntarget = 'a'\ndraft = 'b'\n")
    assert load_settings(file, {"EVERDRAFT__SERVING__DRAFT": "null"}).serving.draft is None


def test_tracking_goes_to_an_absolute_sqlite_path_in_the_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(environment=TARGET)
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/.everdraft/mlflow/mlflow.db"
    off = load_settings(environment={**TARGET, "EVERDRAFT__MLFLOW__ENABLED": "false"})
    assert off.tracking_uri == ""


def test_tracking_has_one_name() -> None:
    with pytest.raises(SettingsError, match=r"set by mlflow\.tracking_uri"):
        load_settings(environment={**TARGET, "EVERDRAFT__LEARNER__TRACKING_URI": "sqlite:///a.db"})


def test_learners_of_two_state_folders_have_two_names_among_those_that_share_records(tmp_path: Path) -> None:
    names = {
        learner_settings(
            Settings.model_validate({"serving": {"target": "t"}, "cluster": {"state_dir": tmp_path / folder}})
        ).consumer_name
        for folder in ("one", "other", "one")
    }
    assert len(names) == 2


def test_two_targets_on_one_mlflow_have_registered_models_of_their_own() -> None:
    learner, revisions = LearnerSettings(), ("a" * 64, "b" * 64)
    names = {registered_base_name(learner, "/models/Qwen 3:8B/", revision) for revision in revisions}
    assert names == {"everdraft-draft-Qwen-3-8B-aaaaaaaa", "everdraft-draft-Qwen-3-8B-bbbbbbbb"}


def test_what_the_buffer_holds_is_a_setting() -> None:
    serving = {"target": "t", "record_ttl_s": 60, "max_records_per_route": 5, "max_record_routes": 2}
    bounds = Settings.model_validate(
        {"serving": {**serving, "max_record_mib_per_route": 1}}
    ).serving.record_bounds()
    assert bounds == Bounds(max_records=5, max_bytes=2**20, max_age_s=60.0, max_routes=2)


SECRETS = {
    "a section written as one value": {"EVERDRAFT__SERVING": '{"api_keys": ["sesame"]}'},
    "a section whose JSON is broken": {"EVERDRAFT__SERVING": '{"api_keys": ["sesame"'},
    "a misspelt name": {"EVERDRAFT__SERVING__API_KEYZ": "sesame", "EVERDRAFT__SERVING__ADMINKEY": "sesame"},
    "a name of no kind": {"EVERDRAFT__REDIS__PASSWD": "sesame", "EVERDRAFT__MLFLOW__AUTH_TOKEN": "sesame"},
    "a URL under a misspelt name": {"EVERDRAFT__REDIS__URLL": "redis://:sesame@host:1/0"},
    "a URL in the wrong place": {"EVERDRAFT__CLUSTER__PORT": "redis://host:1/0?password=sesame"},
    "a list of URLs": {"EVERDRAFT__REDIS__URL": '["redis://:sesame@host"]'},
    "an object": {"EVERDRAFT__REDIS__URL": '{"host": "h", "password": "sesame"}'},
    "a section given as a URL": {"EVERDRAFT__REDIS": "redis://:sesame@host"},
    "a URL without a scheme": {"EVERDRAFT__CLUSTER__PORT": ":sesame@host:1"},
    "a tracker's URI": {"EVERDRAFT__MLFLOW__TRACKING_URI": '["https://me:sesame@host"]'},
}


@pytest.mark.parametrize("way", SECRETS)
def test_no_fault_shows_a_secret_wherever_it_was_written(way: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(environment={**TARGET, **SECRETS[way]})
    assert "sesame" not in str(caught.value)
    assert "nothing was started" in str(caught.value)


def test_a_yaml_fault_names_the_line_and_does_not_quote_it(tmp_path: Path) -> None:
    file = written(tmp_path, "a.yaml", "serving:\n  target: a\n  api_keys: [sesame, ]]\n")
    with pytest.raises(SettingsError, match="line 3, column") as caught:
        load_settings(file)
    assert "sesame" not in str(caught.value)


def test_settings_with_addresses_are_printed_without_them() -> None:
    environment = {
        **TARGET,
        "EVERDRAFT__REDIS__URL": "redis://:sesame@host",
        "EVERDRAFT__MLFLOW__TRACKING_URI": "https://me:sesame@host",
    }
    settings = load_settings(environment=environment)
    assert settings.redis.url == "redis://:sesame@host"
    assert "sesame" not in repr(settings) + str(settings)


def test_every_secret_setting_is_known_by_its_name() -> None:
    """Else a fault in it, or a name close to it, would show the value."""
    for section in Settings.model_fields.values():
        assert isinstance(section.annotation, type) and issubclass(section.annotation, BaseModel)
        for name, field in section.annotation.model_fields.items():
            is_secret = "SecretStr" in repr(field.annotation)
            assert bool(SECRET_NAME.search(name)) == is_secret, name
