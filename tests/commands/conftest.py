"""A tiny model for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from labelled import write_model

pytest.importorskip("fairseq")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """fairseq and Hydra are old, and warn of it hundreds of times a run."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for kind in ("UserWarning", "FutureWarning", "DeprecationWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))
