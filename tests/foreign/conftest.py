"""Directories of other libraries, and the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts_on_disk import LAYOUTS

from ckptmgr.cli import main


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One directory of each layout, made when it is first asked for; nobody may change it."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "theirs"
            LAYOUTS[name].make(made[name])
        return made[name]

    return of


@pytest.fixture
def theirs(tmp_path: Path, pristine: Callable[[str], Path]) -> Callable[[str], Path]:
    """A copy of the directory of a layout."""

    def of(name: str) -> Path:
        shutil.copytree(pristine(name), tmp_path / name)
        return tmp_path / name

    return of


@pytest.fixture
def ckptmgr(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: its status, and what it printed."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return call
