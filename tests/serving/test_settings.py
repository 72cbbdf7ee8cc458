"""Serving settings: strict, frozen, and silent about secrets."""

import pytest
from pydantic import ValidationError

from serving.settings import ServingSettings


def test_a_secret_is_never_printed() -> None:
    settings = ServingSettings.model_validate(
        {"target": "t", "api_keys": ["sk-client"], "admin_key": "sk-admin"}
    )
    shown = f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert "sk-client" not in shown and "sk-admin" not in shown
    assert settings.revealed_api_keys() == ("sk-client",)
    assert settings.revealed_admin_key() == "sk-admin"


@pytest.mark.parametrize(
    "wrong",
    [
        {"capture_rate": 1.5},
        {"num_slots": 0},
        {"dtype": "int8"},
        {"num_slot": 4},
        {"target": ""},
        {"speculation": "draft"},
        {"stopping": "never"},
        {"stopping_threshold": -1.0},
    ],
)
def test_a_wrong_value_or_an_unknown_key_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as refused:
        ServingSettings.model_validate({"target": "t"} | wrong)
    assert next(iter(wrong)) in str(refused.value)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"target": "/models/big-one/"}, "big-one"),
        ({"target": "org/model"}, "model"),
        ({"target": "/models/x", "model_name": "mine"}, "mine"),
    ],
)
def test_clients_call_the_model_by_its_name_or_its_folder(given: dict[str, str], name: str) -> None:
    assert ServingSettings.model_validate(given).served_name == name
