"""The served document turned into requests by schemathesis, valid and invalid ones: each is answered, as the
document says, by no failure of the server's own, and every refusal is OpenAI's error object.

`make test` draws a few for each endpoint; `make test-all` two thousand and more.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from pydantic import SecretStr
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving.api.errors import ErrorBody
from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
FEW, MANY = 20, 250
ADMIN_KEY = "sk-admin"
PATIENCE_S = 30.0
"""A case is a handful of tokens; one that takes longer hangs."""


@pytest.fixture(scope="module")
def small(tiny_pair: tuple[str, str]) -> Iterator[LiveServer]:
    """Requests are short, so that many of them take seconds."""
    settings = ServingSettings(
        compile="off",
        target=tiny_pair[0],
        draft=tiny_pair[1],
        model_name="tiny",
        num_slots=8,
        max_seq_len=32,
        num_draft_tokens=2,
        max_generations_per_request=4,
        admin_key=SecretStr(ADMIN_KEY),
    )
    with live_server(settings) as live:
        yield live
        live.wait_until_idle()


@pytest.fixture(scope="module")
def document(small: LiveServer) -> schemathesis.BaseSchema:
    made = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    made.config.max_stream_events = 10_000  # streams are read to their end
    return made


Statuses = Counter[tuple[str, int]]
"""How often each path was answered how."""


def ask(case: schemathesis.Case) -> int:
    key = {"Authorization": f"Bearer {ADMIN_KEY}"} if case.path.startswith("/admin") else {}
    answer = case.call(headers=key, timeout=PATIENCE_S)
    streamed = answer.headers["content-type"][0].startswith("text/event-stream")
    # of a stream it would take the schema of the text for that of an event
    case.validate_response(
        answer, checks=CHECKS, excluded_checks=[response_schema_conformance] if streamed else []
    )
    assert not streamed or has_ended(case.path, answer.text)
    if answer.status_code >= 400:
        ErrorBody.model_validate(answer.json())
    return answer.status_code


def has_ended(path: str, events: str) -> bool:
    """Whether a stream was not cut short."""
    if path == "/v1/responses":
        return events.rsplit("\nevent: ", 1)[-1].startswith(("response.completed", "response.incomplete"))
    return events.endswith("data: [DONE]\n\n")


def ask_all(document: schemathesis.BaseSchema, num_cases: int) -> Statuses:
    """So many valid and so many invalid cases of every operation that takes any."""
    statuses = Statuses()
    for operation in (result.ok() for result in document.get_all_operations()):
        for mode in GenerationMode:

            @settings(max_examples=num_cases, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def asked(case: schemathesis.Case) -> None:
                statuses[case.path, ask(case)] += 1

            with contextlib.suppress(Unsatisfiable):  # nothing about it could be invalid
                asked()
    return statuses


def test_cases_of_every_operation_are_answered_as_the_document_says(
    document: schemathesis.BaseSchema,
) -> None:
    statuses = ask_all(document, FEW)
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"):
        assert statuses[path, 200] and statuses[path, 400], statuses


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thousands_of_cases_are_answered_so(document: schemathesis.BaseSchema) -> None:
    statuses = ask_all(document, MANY)
    print(statuses)
    assert statuses.total() >= 2000, statuses
