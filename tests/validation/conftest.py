"""The validation tools as modules, and exports to try them on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "validation"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint and one export, and beside it what ``save_pretrained`` wrote."""
    from tiny_exports import exported, published
    from tiny_models import mixture_of_experts

    folder = tmp_path_factory.mktemp("exports")
    model = mixture_of_experts(tied=False)
    published(model, folder / "published")
    exported(model, folder / "run")
    return folder
