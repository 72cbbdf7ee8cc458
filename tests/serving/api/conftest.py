"""One live server for all tests of the API that need no settings of their own."""

from collections.abc import Iterator
from importlib.util import find_spec

import openai
import pytest

from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server
from tests.support.tiny_models import save_tiny_caller

collect_ignore = [] if find_spec("schemathesis") else ["test_schema.py"]
"""The extra `clients` is not in vLLM's environment."""


PIECES = [
    "Look:\n",
    "<tool_call>",
    '{"name": "weather", ',
    '"arguments": ',
    '{"city": ',
    '"Oslo"}}',
    "</tool_call>",
]
"""What the caller says, a token each."""


@pytest.fixture(scope="session")
def server(tiny_pair: tuple[str, str]) -> Iterator[LiveServer]:
    target, draft = tiny_pair
    settings = ServingSettings(
        compile="off",
        target=target,
        draft=draft,
        model_name="tiny",
        num_slots=4,
        max_seq_len=256,
        num_draft_tokens=3,
    )
    with live_server(settings) as live:
        yield live


@pytest.fixture(scope="session")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="session")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Of a model that calls a tool by itself, whatever it is asked."""
    target = save_tiny_caller(tmp_path_factory.mktemp("caller"), PIECES)
    settings = ServingSettings(
        compile="off", target=target, draft=None, model_name="tiny", num_slots=4, max_seq_len=512
    )
    with (
        live_server(settings) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened,
    ):
        yield opened
