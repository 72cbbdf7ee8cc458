"""One tiny random pair on disk for all tests of serving."""

import pytest
import torch

from tests.support.tiny_models import save_tiny_pair


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(target folder, draft folder)"""
    torch.set_num_threads(1)
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))
