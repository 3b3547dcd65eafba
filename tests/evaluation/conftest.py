"""Small files of every scenario, and a model whose answers follow from its prompts."""

from pathlib import Path

import pytest

import toy_data
from toy_model import ToyModel


@pytest.fixture
def toy_model() -> ToyModel:
    """A fresh made-up model."""
    return ToyModel()


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with small files of every scenario."""
    root = tmp_path_factory.mktemp("toy")
    toy_data.make(root)
    return root


@pytest.fixture(scope="session")
def published() -> Path:
    """A data root with made-up lines that have every field and oddity of the published files."""
    return Path(__file__).with_name("published")
