"""The fork server under the shim, made once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "crash")]

from torture import faults, shim  # noqa: E402


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Ground]:
    """Where torture happens."""
    if reason := shim.why_not():
        pytest.skip(reason)
    made = faults.Ground(tmp_path_factory.mktemp("ground"), shim.build())
    yield made
    made.close()
