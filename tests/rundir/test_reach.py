"""What cannot be reached is named by its whole path, though the kernel is given one part of it at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptmgr import reach


@pytest.mark.parametrize("missing", ["folder", "folder/below", "folder/below/file"])
def test_an_error_names_the_whole_path(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "folder" / "below" / "file"
    (tmp_path / missing).parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(FileNotFoundError) as caught:
        reach.read(path, 1)
    assert Path(caught.value.filename) in (path, path.parent)


def test_an_error_about_what_is_no_file_names_it_too(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not a regular file") as caught:
        reach.read(tmp_path, 1)
    assert caught.value.filename == str(tmp_path)
