"""Every call that must survive a power cut does what it says, and never more: no overwriting, no following of links."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ckptmgr import durable


def test_a_directory_is_made_once_and_never_over_a_link(tmp_path: Path) -> None:
    durable.make_directory(tmp_path / "a")
    assert (tmp_path / "a").is_dir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for taken in ("a", "dangling"):
        with pytest.raises(FileExistsError):
            durable.make_directory(tmp_path / taken)
    assert not (tmp_path / "nowhere").exists()


def test_a_directory_is_made_with_the_permissions_it_is_to_have(tmp_path: Path) -> None:
    durable.make_directory(tmp_path / "private", mode=0o700)
    durable.make_directory(tmp_path / "other")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_refused_fsync_says_of_what() -> None:
    for refused, sync in ((Path("/proc"), durable.sync_directory), (Path("/proc/version"), durable.sync_file)):
        with pytest.raises(OSError, match=f"Invalid argument: '{refused}'"):
            sync(refused)


def test_missing_parents_are_made_and_existing_ones_left(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    durable.ensure_directory(tmp_path / "a" / "b" / "c")
    durable.ensure_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert (tmp_path / "a" / "mine").exists()


def test_a_new_file_never_replaces_one_and_is_written_whole(tmp_path: Path) -> None:
    durable.write_new(tmp_path / "f", b"first")
    with pytest.raises(FileExistsError):
        durable.write_new(tmp_path / "f", b"second")
    assert (tmp_path / "f").read_bytes() == b"first"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        durable.write_new(tmp_path / "link", b"x")
    assert not (tmp_path / "elsewhere").exists()


def test_shared_files_are_written_at_offsets_and_links_refused(tmp_path: Path) -> None:
    with durable.new_file(tmp_path / "f") as descriptor:
        assert durable.set_size(descriptor, 10)
        durable.write_at(descriptor, memoryview(b"ab"), 0)
    with durable.shared_file(tmp_path / "f") as descriptor:
        durable.write_at(descriptor, memoryview(b"yz"), 8)
    assert (tmp_path / "f").read_bytes() == b"ab" + bytes(6) + b"yz"
    (tmp_path / "link").symlink_to(tmp_path / "f")
    with pytest.raises(OSError, match="symbolic links") as caught, durable.shared_file(tmp_path / "link"):
        pass
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(FileNotFoundError), durable.shared_file(tmp_path / "missing"):
        pass


def test_an_error_in_the_block_is_the_one_that_is_raised_and_the_descriptor_is_closed(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ZeroDivisionError), durable.new_file(tmp_path / "f"):
        raise ZeroDivisionError
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_full_disk_is_met_when_the_size_is_set_and_not_later(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with durable.new_file(tmp_path / "f") as descriptor:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                durable.set_size(descriptor, 2000)
            durable.set_size(descriptor, 1000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "f").stat().st_size == 1000
    assert (tmp_path / "f").stat().st_blocks * 512 >= 1000, "the space is there, not only the size"


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to take fallocate away")
def test_where_space_cannot_be_reserved_the_size_is_set_and_that_is_said(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from ckptmgr import durable
        with durable.new_file(Path(sys.argv[1])) as descriptor:
            assert not durable.set_size(descriptor, 5000)
    """
    command = [
        *("strace", "-f", "-qq", "-o", str(tmp_path / "trace"), "-e", "trace=fallocate"),
        *("-e", "inject=fallocate:error=EOPNOTSUPP"),
        *(sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "f")),
    ]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "INJECTED" in (tmp_path / "trace").read_text(), "strace did not take the call away"
    assert (tmp_path / "f").stat().st_size == 5000


def test_replacing_a_file_is_atomic_and_clears_what_a_crash_left(tmp_path: Path) -> None:
    target = tmp_path / "meta.json"
    (tmp_path / ".new").write_text("half, from a crash")
    durable.replace_file(target, b"one", scratch=".new")
    inode = target.stat().st_ino
    durable.replace_file(target, b"two", scratch=".new")
    assert (target.read_bytes(), target.stat().st_ino == inode) == (b"two", False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json"]


def test_replacing_a_file_that_is_a_link_replaces_the_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "meta.json").symlink_to("precious")
    (tmp_path / ".new").symlink_to("precious")
    durable.replace_file(tmp_path / "meta.json", b"ours", scratch=".new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "meta.json").is_symlink()


def test_a_note_is_overwritten_in_place_and_never_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("a long note of an earlier holder")
    inode = (tmp_path / "lock").stat().st_ino
    durable.overwrite(tmp_path / "lock", b"new")
    assert ((tmp_path / "lock").read_bytes(), (tmp_path / "lock").stat().st_ino) == (b"new", inode)
    (tmp_path / "link").symlink_to("lock")
    with pytest.raises(OSError, match="symbolic links"):
        durable.overwrite(tmp_path / "link", b"x")


def test_links_are_swapped_and_removed_but_never_what_they_point_to(tmp_path: Path) -> None:
    for name in ("hf-1", "hf-2"):
        (tmp_path / name).mkdir()
    link = tmp_path / "hf-latest"
    (tmp_path / ".scratch").symlink_to("left by a crash")
    for name in ("hf-1", "hf-2"):
        durable.replace_link(link, name, scratch=".scratch")
        assert link.readlink() == Path(name)
    durable.remove_file(link)
    durable.remove_file(link)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-1", "hf-2"]


def _occupants(folder: Path) -> list[Path]:
    """Everything that may stand at a name: a full and an empty directory, a file, an empty file, links."""
    folder.mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "x").touch()
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "empty-file").touch()
    (folder / "link").symlink_to("full")
    (folder / "dangling").symlink_to("nowhere")
    return sorted(folder.iterdir())


def _check_never_over(folder: Path) -> bool:
    for target in _occupants(folder / "there"):
        source = folder / f"source-{target.name}"
        source.mkdir()
        before = target.lstat().st_ino
        with pytest.raises(FileExistsError):
            durable.rename_new(source, target)
        assert source.is_dir()
        assert target.lstat().st_ino == before
    in_one_step = durable.rename_new(folder / "source-full", folder / "free")
    assert (folder / "free").is_dir()
    with pytest.raises(FileNotFoundError):
        durable.rename_new(folder / "missing", folder / "other")
    return in_one_step


def test_a_rename_never_takes_a_name_that_is_taken_even_by_an_empty_directory(tmp_path: Path) -> None:
    assert _check_never_over(tmp_path)


def test_a_rename_over_a_file_or_a_link_replaces_it_and_not_what_the_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    for target in ("link", "free"):
        (tmp_path / "new").write_text("new")
        durable.rename_over(tmp_path / "new", tmp_path / target)
        assert (tmp_path / target).read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free", "link", "precious"]
    assert (tmp_path / "precious").read_text() == "mine"


def test_two_directories_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert durable.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        durable.exchange(tmp_path / "a", tmp_path / "missing")


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to take renameat2 away")
@pytest.mark.parametrize("error", ["EINVAL", "ENOSYS"])
def test_where_the_file_system_lacks_renameat2_a_rename_still_never_replaces(tmp_path: Path, error: str) -> None:
    script = """
        import sys
        from pathlib import Path
        from ckptmgr import durable
        from test_durable import _check_never_over
        folder = Path(sys.argv[1])
        assert not _check_never_over(folder)
        assert not durable.exchange(folder / "free", folder / "there")
    """
    command = [
        *("strace", "-f", "-qq", "-o", str(tmp_path / "trace"), "-e", "trace=renameat2"),
        *("-e", f"inject=renameat2:error={error}"),
        *(sys.executable, "-c", textwrap.dedent(script), str(tmp_path)),
    ]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "INJECTED" in (tmp_path / "trace").read_text(), "strace did not take the call away"


def test_a_tree_is_removed_but_nothing_that_its_links_point_to(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("mine")
    tree = tmp_path / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    (tree / "deep" / "file").touch()
    (tree / "to-directory").symlink_to(tmp_path / "precious")
    (tree / "to-file").symlink_to(tmp_path / "precious" / "x")
    durable.remove_tree(tree)
    durable.remove_tree(tree)
    assert not tree.exists()
    (tmp_path / "link").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic link"):
        durable.remove_tree(tmp_path / "link")
    assert (tmp_path / "precious" / "x").read_text() == "mine"


@pytest.mark.parametrize("place", ["", "below"])
def test_a_tree_is_removed_while_somebody_still_writes_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    rmdir = os.rmdir
    names = iter("abc")

    def late(name: str, *, dir_fd: int) -> None:
        if name == Path("tree", place).name:
            for one in names:  # a writer that has outlived its trainer, at the worst moment
                (tree / place / one).touch()
                break
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", late)
    durable.remove_tree(tree)

    assert not tree.exists()
    assert next(names, None) is None


def test_a_tree_that_is_filled_again_and_again_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    rmdir = os.rmdir

    def late(name: str, *, dir_fd: int) -> None:
        (tree / "one more").touch()
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", late)
    with pytest.raises(OSError, match="not empty"):
        durable.remove_tree(tree)


def test_a_directory_that_cannot_be_listed_is_not_passed_over_unsynced(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.sync_directories(tmp_path / "gone")


def test_only_directories_and_files_are_synced_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "f").touch()
    (tmp_path / "link").symlink_to("a")
    durable.sync_directories(tmp_path)
    durable.sync_file(tmp_path / "a" / "f")
    with pytest.raises(NotADirectoryError):
        durable.sync_directory(tmp_path / "a" / "f")
    for call in (durable.sync_directory, durable.sync_file):
        with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
            call(tmp_path / "link")
