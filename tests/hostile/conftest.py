"""A run to be spoiled, made once, and a fork server, because what is hostile may take the process along."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_ground
import pytest
from child_process import ForkServer


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    here = Path(__file__).parent
    server = ForkServer("ckptmgr.manager", "hostile_kit", path=(here,))
    yield server
    server.close()


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was saved twice in both formats; nobody may change it."""
    run = tmp_path_factory.mktemp("pristine") / "runs" / "alpha"
    hostile_ground.train(run)
    return run


@pytest.fixture
def alpha(pristine: Path, tmp_path: Path) -> Path:
    """A copy of that run, and beside it `precious`, which is nobody's business."""
    shutil.copytree(pristine.parent, tmp_path / "runs", symlinks=True)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    (precious / "secret").write_bytes(b"secret" * 1000)
    return tmp_path / "runs" / "alpha"


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Checks, now and at the end, that nothing beside the run was written, removed or made."""

    def look() -> dict[str, object]:
        return {
            str(path.relative_to(tmp_path)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
            for path in sorted((tmp_path / "precious").rglob("*"))
        }

    before = look() if (tmp_path / "precious").exists() else {}

    def check() -> None:
        assert look() == before, "something outside the run was changed"

    yield check
    check()
