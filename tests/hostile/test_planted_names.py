"""Lock, journal and run directory where somebody else got there first; and the modes of what is made."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckptmgr import DCP, CheckpointError, CheckpointManager, HuggingFace, Permissions, Series

KINDS = ("link", "link to nothing", "hard link", "pipe", "directory")


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file that is nobody's business; it must be the same at the end."""
    made = tmp_path / "victim"
    made.write_text("somebody's work")
    yield made
    assert made.read_text() == "somebody's work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "victim"]


def plant(kind: str, path: Path, victim: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "link to nothing":
        path.symlink_to(victim.with_name("nothing"))
    elif kind == "hard link":
        path.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


def save(run: Path, permissions: Permissions | None = None) -> None:
    series = [Series("checkpoint", DCP()), Series("hf", HuggingFace())]
    with CheckpointManager(run, series, permissions=permissions) as manager:
        model = torch.nn.Linear(2, 2)
        for name in ("checkpoint", "hf"):
            pending = manager.save(1, {"model": model}, name)
            assert pending is not None
            pending.wait(60)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["alpha.journal.lock", "alpha.journal.db", "alpha.journal.db-journal"])
def test_nothing_is_written_through_what_was_planted(tmp_path: Path, victim: Path, name: str, kind: str) -> None:
    plant(kind, tmp_path / "runs" / name, victim)
    with pytest.raises(CheckpointError) as refused:
        save(tmp_path / "runs" / "alpha")

    assert name.removesuffix("-journal") in str(refused.value)
    assert not list((tmp_path / "runs").glob("alpha/*/*"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "directory"])
@pytest.mark.parametrize("name", ["meta.json", ".ckptmgr-run-id", "checkpoint", ".meta.json.new"])
def test_names_of_a_run_that_were_planted(tmp_path: Path, victim: Path, name: str, kind: str) -> None:
    """Either it is refused, or replaced by a file of ours; what it leads to stays as it is."""
    plant(kind, tmp_path / "runs" / "alpha" / name, victim)
    with contextlib.suppress(CheckpointError):
        save(tmp_path / "runs" / "alpha")

        assert not (tmp_path / "runs" / "alpha" / name).is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
@pytest.mark.parametrize("name", ["alpha.journal.lock", "alpha.journal.db", "alpha"])
def test_another_users_file_in_a_shared_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o1777)
    path = tmp_path / "runs" / name
    path.mkdir() if name == "alpha" else path.touch()
    os.chown(path, 65534, 65534)
    with pytest.raises(CheckpointError, match="belongs to user 65534"):
        save(tmp_path / "runs" / "alpha")


@pytest.mark.parametrize(
    ("umask", "permissions", "file", "directory"),
    [
        (0o022, None, 0o644, 0o755),
        (0o077, None, 0o600, 0o700),
        (0o027, None, 0o640, 0o750),
        (0o000, None, 0o666, 0o777),
        (0o000, Permissions(file_mode=0o600, directory_mode=0o700), 0o600, 0o700),
        (0o077, Permissions(file_mode=0o640, directory_mode=0o2750), 0o640, 0o2750),
    ],
)
def test_everything_that_is_made_has_the_mode_that_was_asked_for(
    tmp_path: Path, umask: int, permissions: Permissions | None, file: int, directory: int
) -> None:
    before = os.umask(umask)
    try:
        save(tmp_path / "runs" / "alpha", permissions)
    finally:
        os.umask(before)
    found = {path: path.lstat().st_mode for path in (tmp_path / "runs").rglob("*") if not path.is_symlink()}

    assert len(found) > 12
    assert {oct(stat.S_IMODE(mode)) for mode in found.values() if stat.S_ISREG(mode)} == {oct(file)}
    assert {oct(stat.S_IMODE(mode)) for mode in found.values() if stat.S_ISDIR(mode)} == {oct(directory)}
