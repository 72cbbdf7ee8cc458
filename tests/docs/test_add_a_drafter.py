"""The code of `docs/add-a-drafter.md`, as it stands, through the real engine on a tiny pair."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engine import proposal
from tests.support.tiny_models import save_tiny_pair

PAGE = Path(__file__).parent.parent.parent / "docs" / "add-a-drafter.md"
PROMPTS = [[11, 12, 13], [40, 41, 42, 43], [100, 101], [7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))[0]


def on_the_page() -> dict[str, Any]:
    """What all Python blocks of the page define, run in their order."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 3, "the drafter, the engine, the check"
    namespace: dict[str, Any] = {"__name__": "add_a_drafter"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    return namespace


def test_the_drafter_of_the_page_changes_no_token_and_saves_rounds(target: str) -> None:
    drafted = on_the_page()["check_phrase_drafter"](target, PROMPTS)
    num_tokens = sum(len(generation.output_token_ids) for generation in drafted)
    assert sum(generation.num_rounds for generation in drafted) < num_tokens


def test_the_check_of_the_page_finds_a_drafter_that_is_never_asked(target: str) -> None:
    """A negative control: where nothing is drafted, equal texts show nothing."""
    page = on_the_page()
    page["PhraseDrafter"].matches = lambda self, batch: [0] * len(batch)
    with pytest.raises(AssertionError, match="accepted and rejected"):
        page["check_phrase_drafter"](target, PROMPTS)


def test_the_drafter_of_the_page_has_every_method_of_the_protocol_with_its_arguments() -> None:
    drafter = on_the_page()["PhraseDrafter"]
    for protocol in (proposal.Drafter, proposal.LookupDrafter):
        for name, method in vars(protocol).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                asked = list(inspect.signature(method).parameters)
                assert list(inspect.signature(getattr(drafter, name)).parameters) == asked, name
