"""``ckptmgr check`` on directories without a journal: statuses, text, JSON, and that a run's own journal decides."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import layouts_on_disk as made
import pytest
from layouts_on_disk import LAYOUTS, text

from ckptmgr import foreign
from ckptmgr.journal import Journal
from ckptmgr.rundir import RUN_ID_NAME, RunDirectory

Theirs = Callable[[str], Path]
Command = Callable[..., tuple[int, str, str]]


def spoil(directory: Path, name: str, *paths: str) -> None:
    """Make one file of each checkpoint empty."""
    for path in paths:
        whole = directory / path
        file = whole if whole.is_file() else min(file for file in whole.rglob("*") if file.is_file())
        os.truncate(file, 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_status_says_what_there_is(name: str, theirs: Theirs, ckptmgr: Command) -> None:
    layout = LAYOUTS[name]
    directory = theirs(name)
    code, out, _ = ckptmgr("check", directory)
    assert code == 0
    assert out.endswith(f"complete as far as its files tell: {directory / layout.newest}\n")

    spoil(directory, name, layout.newest)
    code, out, _ = ckptmgr("check", directory)
    assert code == 4
    assert out.endswith(f"an older one is: {directory / layout.older}\n")

    spoil(directory, name, layout.older)
    code, out, _ = ckptmgr("check", directory)
    assert code == 5
    assert out.endswith("not safe to resume: none is complete\n")

    assert ckptmgr("check", directory, "--step", 77)[0] == 3


def test_other_ranks_than_fit_are_not_safe(theirs: Theirs, ckptmgr: Command) -> None:
    code, out, _ = ckptmgr("check", theirs("deepspeed"), "--world-size", 16)

    assert code == 3
    assert "F014" in out


def test_nothing_is_recognised(tmp_path: Path, ckptmgr: Command) -> None:
    text(tmp_path / "notes.txt", "nothing")
    code, _, said = ckptmgr("check", tmp_path)

    assert code == 10
    for layout in foreign.LAYOUTS:
        assert layout.LAYOUT in said


@pytest.mark.parametrize("kind", ["file", "missing", "link to nothing"])
def test_what_is_no_directory_is_refused(kind: str, tmp_path: Path, ckptmgr: Command) -> None:
    place = tmp_path / "place"
    if kind == "file":
        made.torch_save(place)
    elif kind != "missing":
        place.symlink_to("elsewhere")

    assert ckptmgr("check", place)[0] == (2 if kind == "file" else 10)


def test_a_link_to_the_directory_itself_is_followed(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory = theirs("deepspeed")
    (tmp_path / "link").symlink_to(directory)
    code, out, _ = ckptmgr("check", tmp_path / "link")

    assert (code, str(directory / "global_step10") in out) == (0, True)


def run_of_ours(path: Path) -> RunDirectory:
    path.mkdir(parents=True)
    rundir = RunDirectory(path)
    with Journal.open(rundir.journal_path) as journal:
        rundir.pair(journal.run_id)
    return rundir


def test_a_run_with_a_journal_is_judged_by_it(tmp_path: Path, ckptmgr: Command) -> None:
    """What looks like a checkpoint of somebody's is one only if the journal says so."""
    rundir = run_of_ours(tmp_path / "run")
    made.torchtitan(rundir.path)
    code, out, _ = ckptmgr("check", rundir.path, "--json")

    assert code == 3
    assert [each["series"] for each in json.loads(out)["reports"]] == ["checkpoint"]
    assert "layouts" not in json.loads(out)


def test_a_journal_beside_the_directory_is_never_passed_by(tmp_path: Path, ckptmgr: Command) -> None:
    """Not even where the mark that ties them together is gone."""
    rundir = run_of_ours(tmp_path / "run")
    made.torchtitan(rundir.path)
    (rundir.path / RUN_ID_NAME).unlink()
    _, out, _ = ckptmgr("check", rundir.path, "--json")

    assert "layouts" not in json.loads(out)


def test_a_run_that_lost_its_journal_is_told_to_rebuild_it(tmp_path: Path, ckptmgr: Command) -> None:
    rundir = run_of_ours(tmp_path / "run")
    made.torchtitan(rundir.path)
    rundir.journal_path.unlink()
    assert (rundir.path / RUN_ID_NAME).exists()
    code, _, said = ckptmgr("check", rundir.path)

    assert code == 10
    assert "--rebuild" in said


def test_a_journal_that_is_named_is_meant(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    code, _, said = ckptmgr("check", theirs("deepspeed"), "--journal", tmp_path / "none.db")

    assert code == 10
    assert "none.db" in said


def test_a_series_can_be_chosen(tmp_path: Path, ckptmgr: Command) -> None:
    made.hf_trainer(tmp_path)
    made.shards(tmp_path)
    os.truncate(tmp_path / "model-00001-of-00002.safetensors", 3)

    assert ckptmgr("check", tmp_path)[0] == 0
    assert ckptmgr("check", tmp_path, "--series", "checkpoint")[0] == 0
    assert ckptmgr("check", tmp_path, "--series", "hf")[0] == 5
    code, _, said = ckptmgr("check", tmp_path, "--series", "snapshot")
    assert (code, "it has checkpoint, hf" in said) == (2, True)


def test_findings_are_a_table_that_says_what_to_do(theirs: Theirs, ckptmgr: Command) -> None:
    directory = theirs("hf_trainer")
    (directory / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 1')
    _, out, err = ckptmgr("check", directory)
    header, row, *_ = out.splitlines()

    assert header.split() == ["LEVEL", "ID", "LAYOUT", "CHECKPOINT", "FINDING"]
    assert row.split()[:2] == ["error", "F006"]
    assert "trainer_state.json (it ends in the middle)" in row
    assert "hint: " in row
    assert "complete, for Hugging Face Trainer: " in err
    assert f"`ckptmgr check {directory} --deep`" in err


def test_names_that_could_steer_a_terminal_do_not(tmp_path: Path, ckptmgr: Command) -> None:
    name = "epoch=1\x1b[2J\u202e\n-step=3.ckpt"
    (tmp_path / name).write_bytes(b"")
    (tmp_path / os.fsdecode(b"\xff\xfe=4.ckpt")).write_bytes(b"")
    for words in ((), ("--json",)):
        code, out, err = ckptmgr("check", tmp_path, *words)
        assert code == 5
        assert all(char.isprintable() or char == "\n" for char in out + err)


def test_it_needs_no_torch_and_starts_fast(theirs: Theirs) -> None:
    code = (
        "import sys; from ckptmgr.cli import main; assert main(['check', sys.argv[1], '--deep']) == 0;"
        "heavy = {'torch', 'numpy', 'sqlalchemy', 'alembic', 'transformers', 'safetensors'} & {*sys.modules};"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, theirs("xtuner")], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_a_checkpoint_that_vanishes_meanwhile_is_no_crash(
    theirs: Theirs, ckptmgr: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's retention removes it between the listing and the look."""
    directory = theirs("deepspeed")
    real = foreign._candidate

    def remove_first(checkpoint: foreign.Checkpoint, asked: foreign.Asked) -> foreign.Candidate:
        shutil.rmtree(directory / "global_step10", ignore_errors=True)
        return real(checkpoint, asked)

    monkeypatch.setattr(foreign, "_candidate", remove_first)

    assert ckptmgr("check", directory)[0] == 4
