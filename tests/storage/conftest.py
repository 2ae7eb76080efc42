from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from real_storage import Mounts


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    """Real mounts, gone when the test is over. Skips without root."""
    with Mounts(tmp_path) as made:
        yield made
