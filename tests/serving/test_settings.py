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
        {"max_generations_per_request": 0},
        {"max_generations_per_request": 257},
        {"max_generations_per_request": 2, "max_queued_requests": 0},
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


@pytest.mark.parametrize(
    "key", ["", " ", "       ", "hush-hu", " hush-hush", "hush-hush\n", "hush hush", "hüsch-hüsch"]
)
def test_a_key_that_guards_nothing_is_refused_by_name_and_never_shown(key: str) -> None:
    for name, given in (("admin_key", key), ("api_keys", [key]), ("api_keys", ["good-enough", key])):
        with pytest.raises(ValidationError) as refused:
            ServingSettings.model_validate({"target": "t", name: given})
        assert name in str(refused.value)
        assert not key.strip() or key.strip() not in str(refused.value)


def test_no_client_key_is_the_admin_key() -> None:
    with pytest.raises(ValidationError, match="every client could open /admin"):
        ServingSettings.model_validate({"target": "t", "api_keys": ["hush-hush"], "admin_key": "hush-hush"})


@pytest.mark.parametrize(
    ("given", "num_generations", "num_tokens"),
    [
        ({}, 64, 65_536),
        ({"max_queued_requests": 0}, 1, 65_536),
        ({"max_queued_requests": 1, "max_seq_len": 100_000}, 1, 100_000),
        ({"max_generations_per_request": 256}, 256, 65_536),
        ({"max_queued_prompt_tokens": 1, "max_seq_len": 64}, 64, 64),
    ],
)
def test_one_request_may_ask_for_a_quarter_of_the_queue_and_any_one_prompt(
    given: dict[str, int], num_generations: int, num_tokens: int
) -> None:
    settings = ServingSettings.model_validate({"target": "t"} | given)
    assert settings.generations_per_request == num_generations
    assert settings.prompt_tokens_per_request == num_tokens
