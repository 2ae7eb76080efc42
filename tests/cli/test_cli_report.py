"""``ckptmgr report``: a page from a real run, where it may be written, and what it does without its library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_on_disk import Call, Run, S

from ckptmgr.lifecycle import Format, RetirementMark


@pytest.fixture
def told(run: Run) -> Run:
    """A run with a checkpoint on disk, one that has gone, a failure, an export and one in flight."""
    first = run.save(500)
    run.save(1000, until=S.FAILED, failures=[{"rank": 1, "host": "node-7", "cause": "disk full", "silent": False}])
    second = run.save(1000, retire=[RetirementMark(first.id, "no rule keeps it")])
    shutil.rmtree(run.directory / first.directory)
    run.journal.finish_retirement(first.id, epoch=run.epoch)
    run.save(1000, series="hf", layout=Format.HUGGINGFACE)
    run.save(1500, until=S.WRITING)
    assert second.is_live
    return run


def test_the_page_says_what_is_safe_and_what_happened(told: Run, ckptmgr: Call, tmp_path: Path) -> None:
    done = ckptmgr("report", told.directory, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")

    assert (done.code, done.err) == (0, "")
    assert str(tmp_path / "report.html") in done.out
    assert "Safe to resume" in text
    assert f"{told.directory}/checkpoint/step-1000" in text
    assert "rank 1 on node-7: disk full" in text
    assert "in flight, epoch 1" in text
    assert [name.name for name in tmp_path.iterdir() if "report" in name.name] == ["report.html"]


def test_the_page_says_why_not_the_newest(told: Run, ckptmgr: Call, tmp_path: Path) -> None:
    third = told.save(2000, series="hf", layout=Format.HUGGINGFACE)
    (told.directory / third.directory / "model.bin").unlink()
    told.journal.close()
    shutil.rmtree(told.directory / "checkpoint/step-1000")
    done = ckptmgr("report", told.directory, "-o", tmp_path / "report.html", "--json")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")

    assert done.code == 0
    assert (done.json["series"], done.json["verdict"], done.json["path"]) == ("checkpoint", "corrupt", None)
    assert "error R002" in text[: text.index("<figure>")]
    assert "The newest is not safe; an older one is" in text


def test_a_journal_is_enough_and_so_is_a_run_that_never_saved(run: Run, ckptmgr: Call, tmp_path: Path) -> None:
    assert ckptmgr("report", run.directory, "-o", tmp_path / "empty.html").code == 0
    assert "Nothing was ever saved" in (tmp_path / "empty.html").read_text()
    run.save(500)
    shutil.rmtree(run.directory)

    assert ckptmgr("report", run.journal_path, "-o", tmp_path / "gone.html").code == 0
    assert "No checkpoint is intact" in (tmp_path / "gone.html").read_text()


def test_a_report_may_be_written_again_and_nothing_else_is_overwritten(
    told: Run, ckptmgr: Call, tmp_path: Path
) -> None:
    place = tmp_path / "report.html"
    place.write_text("<html>my own page</html>")
    refused = ckptmgr("report", told.directory, "-o", place)

    assert (refused.code, refused.out) == (2, "")
    assert "--force" in refused.err
    assert place.read_text() == "<html>my own page</html>"
    assert ckptmgr("report", told.directory, "-o", place, "--force").code == 0
    assert ckptmgr("report", told.directory, "-o", place).code == 0
    assert "Safe to resume" in place.read_text()


@pytest.mark.parametrize(
    "name",
    [
        "runs/alpha/report.html",
        "runs/alpha/checkpoint/report.html",
        "runs/alpha.journal.db",
        "runs/alpha.journal.lock",
        "runs/alpha.journal.db-journal",
        "link.html",
        "pipe",
        "folder",
        "missing/report.html",
        "",
        "folder/",
        "through/report.html",
    ],
)
def test_nothing_is_written_where_a_run_or_something_odd_is(
    told: Run, ckptmgr: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.html").symlink_to("elsewhere")
    (tmp_path / "through").symlink_to("runs/alpha")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    told.journal.close()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    journal = told.journal_path.read_bytes()
    done = ckptmgr("report", told.directory, "-o", name, "--force")

    assert done.code in (2, 3)
    assert done.out == ""
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert told.journal_path.read_bytes() == journal


def test_without_a_journal_it_ends_with_10_and_writes_nothing(ckptmgr: Call, tmp_path: Path) -> None:
    (tmp_path / "alpha").mkdir()

    assert ckptmgr("report", tmp_path / "alpha", "-o", tmp_path / "report.html").code == 10
    assert [path.name for path in tmp_path.iterdir()] == ["alpha"]


def test_it_imports_no_torch(told: Run, tmp_path: Path) -> None:
    script = (
        "import sys; from ckptmgr.cli import main;"
        "print(main(sys.argv[1:]), 'torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    words = ["report", str(told.directory), "-o", str(tmp_path / "report.html")]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.splitlines()[-1] == "0 False False"


def test_a_folder_that_is_a_link_is_followed_once(told: Run, ckptmgr: Call, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    assert ckptmgr("report", told.directory, "-o", tmp_path / "link" / "report.html").code == 0
    assert (tmp_path / "real" / "report.html").is_file()


@pytest.mark.parametrize(
    ("command", "library", "extra"),
    [
        ("report", "matplotlib", "report"),
        ("serve", "matplotlib", "report"),
        ("metrics", "prometheus_client", "metrics"),
    ],
)
def test_without_its_library_a_command_names_what_to_install(
    told: Run, tmp_path: Path, command: str, library: str, extra: str
) -> None:
    words = [command, str(told.directory), *(["-o", str(tmp_path / "r")] if command == "report" else [])]
    script = f"import sys; sys.modules[{library!r}] = None; from ckptmgr.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout) == (1, "")
    assert f"pip install 'ckptmgr[{extra}]'" in done.stderr
    assert library in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()
