"""The scheme that only these tests know is registered while each of them runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from toy import Toy

from fairseq_qn.schemes import SCHEMES


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    """`toy` beside the schemes of the package."""
    SCHEMES["toy"] = Toy
    yield
    del SCHEMES["toy"]
