"""``ckptmgr check`` as a gate: what a launch script demands besides, and the scripts that the documentation gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_on_disk import NO_PROCESS, Call, Run, S

from ckptmgr.journal import Journal
from ckptmgr.lifecycle import Format, RetirementMark

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "before-a-launch.md"


def ids(document: dict) -> list[str]:
    """The findings of all reports that are about no candidate."""
    return [finding["id"] for report in document["reports"] for finding in report["findings"]]


# -- how far, and how long ago ----------------------------------------------------------------------


@pytest.mark.parametrize(("least", "code"), [(0, 0), (999, 0), (1000, 0), (1001, 3)])
def test_an_earlier_step_than_the_least_is_not_safe(run: Run, ckptmgr: Call, least: int, code: int) -> None:
    run.save(500)
    run.save(1000)
    done = ckptmgr("check", run.directory, "--min-step", str(least))

    assert done.code == code
    assert ("R015" in done.out) == bool(code)
    document = ckptmgr("check", run.directory, "--min-step", str(least), "--json").json
    assert document["exit_code"] == code
    assert document["verdict"] == ("unsafe" if code else "safe")
    assert document["path"] == (None if code else f"{run.directory}/checkpoint/step-1000")
    assert ("R015" in ids(document)) == bool(code)


def test_a_run_that_was_set_back_is_not_saved_by_an_older_checkpoint_of_a_later_step(run: Run, ckptmgr: Call) -> None:
    run.save(1000)
    run.save(500)
    done = ckptmgr("check", run.directory, "--min-step", "800", "--json")

    assert done.code == 3
    assert done.json["path"] is None
    assert done.json["reports"][0]["chosen"] is None


def test_the_least_step_is_asked_of_the_older_one_that_would_be_taken(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    newest = run.save(1000)
    (run.directory / newest.directory / "model.bin").unlink()

    assert ckptmgr("check", run.directory, "--min-step", "500").code == 4
    done = ckptmgr("check", run.directory, "--min-step", "501")
    assert done.code == 3
    assert "R004" in done.out
    assert "R015" in done.out


def test_damage_is_still_damage_whatever_is_demanded(run: Run, ckptmgr: Call) -> None:
    (run.directory / run.save(500).directory / "model.bin").unlink()

    assert ckptmgr("check", run.directory, "--min-step", "1000", "--max-age", "1s").code == 5


def test_one_that_was_committed_too_long_ago_is_not_safe(
    run: Run, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(500)
    assert ckptmgr("check", run.directory, "--max-age", "1h").code == 0
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3590)
    assert ckptmgr("check", run.directory, "--max-age", "1h").code == 0
    monkeypatch.setattr(time, "time", lambda: now + 3610)
    done = ckptmgr("check", run.directory, "--max-age", "1h")

    assert done.code == 3
    assert "R016" in done.out
    assert "not what was asked for" in done.out
    monkeypatch.setattr(time, "time", lambda: now - 3590)
    assert ckptmgr("check", run.directory, "--max-age", "1h").code == 0
    monkeypatch.setattr(time, "time", lambda: now - 3700)  # nobody knows how old it is
    done = ckptmgr("check", run.directory, "--max-age", "1h")
    assert (done.code, "by the clock here" in done.out) == (3, True)


# -- other series -----------------------------------------------------------------------------------


def test_what_is_required_must_be_safe_too_and_the_path_is_that_of_the_checkpoint(run: Run, ckptmgr: Call) -> None:
    run.save(1000)
    export = run.save(1000, series="hf", layout=Format.HUGGINGFACE)
    done = ckptmgr("check", run.directory, "--require", "hf,checkpoint")
    assert done.code == 0
    assert done.out.splitlines() == [
        f"safe to resume from {run.directory}/checkpoint/step-1000",
        f"safe to resume from {run.directory}/hf/hf-1000",
    ]

    (run.directory / export.directory / "model.bin").unlink()
    assert ckptmgr("check", run.directory).code == 0
    done = ckptmgr("check", run.directory, "--require", "hf", "--json")
    assert (done.code, done.json["series"], done.json["verdict"], done.json["path"]) == (
        5, "checkpoint", "corrupt", None,
    )  # fmt: skip


def test_the_worst_of_all_that_is_required_counts(run: Run, ckptmgr: Call) -> None:
    run.save(1000)
    run.save(500, series="hf", layout=Format.HUGGINGFACE)
    newest = run.save(1000, series="hf", layout=Format.HUGGINGFACE)
    (run.directory / newest.directory / "model.bin").unlink()

    done = ckptmgr("check", run.directory, "--require", "hf", "--json")
    assert (done.code, done.json["verdict"]) == (4, "older")
    assert done.json["path"] == f"{run.directory}/checkpoint/step-1000"
    assert ckptmgr("check", run.directory, "--require", "hf", "--min-step", "1000").code == 3
    assert ckptmgr("check", run.directory, "--require", "hf,never").code == 3


def test_where_the_series_could_be_any_it_is_the_first_that_is_required(run: Run, ckptmgr: Call) -> None:
    run.save(1, series="small")
    run.save(2, series="large")

    assert ckptmgr("check", run.directory).code == 2
    assert ckptmgr("check", run.directory, "--require", "large,small", "--json").json["step"] == 2
    assert ckptmgr("check", run.directory, "--series", "small", "--require", "large", "--json").json["step"] == 1


@pytest.mark.parametrize(
    "words",
    [("--require", ""), ("--require", "hf,"), ("--require", "../hf"), ("--min-step", "-1"), ("--max-age", "12")],
)
def test_a_demand_that_makes_no_sense_ends_with_2(run: Run, ckptmgr: Call, words: tuple[str, ...]) -> None:
    run.save(1)

    assert ckptmgr("check", run.directory, *words).code == 2


# -- the first start --------------------------------------------------------------------------------


def test_before_the_first_start_there_is_nothing_and_that_is_all_right(tmp_path: Path, ckptmgr: Call) -> None:
    (tmp_path / "runs").mkdir()
    new = tmp_path / "runs" / "new"
    for prepare in (lambda: None, new.mkdir, (tmp_path / "runs" / "new.journal.db").touch):
        prepare()
        assert ckptmgr("check", new).code == 10
        done = ckptmgr("check", new, "--allow-empty", "--require", "hf", "--min-step", "0", "--max-age", "1s")
        assert (done.code, done.out) == (0, "nothing was ever committed here: a first start\n")
        document = ckptmgr("check", new, "--allow-empty", "--json").json
        assert (document["path"], document["verdict"], document["exit_code"]) == (None, "none", 0)


def test_a_run_that_is_not_where_it_should_be_is_no_first_start(tmp_path: Path, run: Run, ckptmgr: Call) -> None:
    run.save(1)
    elsewhere = tmp_path / "not-mounted" / "alpha.journal.db"
    assert ckptmgr("check", tmp_path / "not-mounted" / "alpha", "--allow-empty").code == 2
    assert ckptmgr("check", tmp_path / "alpha", "--allow-empty", "--journal", elsewhere).code == 2
    os.mkfifo(tmp_path / "odd.journal.db")
    assert ckptmgr("check", tmp_path / "odd", "--allow-empty").code == 3
    run.journal.close()
    run.journal_path.rename(tmp_path / "aside")
    assert ckptmgr("check", run.directory, "--allow-empty").code == 10


def test_what_failed_or_was_left_before_the_first_commit_is_a_first_start_still(run: Run, ckptmgr: Call) -> None:
    run.save(1, until=S.FAILED)
    run.save(2, until=S.WRITING)
    run.start(pid=NO_PROCESS)

    assert ckptmgr("check", run.directory).code == 3
    assert ckptmgr("check", run.directory, "--allow-empty").code == 0


def test_a_run_that_had_commits_is_no_first_start_whatever_became_of_them(run: Run, ckptmgr: Call) -> None:
    only = run.save(1)
    run.journal.mark_retiring([RetirementMark(only.id, "by hand")], epoch=run.epoch)

    assert ckptmgr("check", run.directory, "--allow-empty").code == 3
    assert ckptmgr("check", run.directory, "--allow-empty", "--require", "hf").code == 3
    assert ckptmgr("check", run.directory, "--allow-empty", "--series", "chekpoint").code == 3


def test_a_published_checkpoint_that_the_journal_does_not_know_is_no_first_start(run: Run, ckptmgr: Call) -> None:
    run.save(1)
    run.journal.close()
    for path in run.journal_path.parent.glob(f"{run.journal_path.name}*"):
        path.unlink()
    journal = Journal.open(run.journal_path)
    journal.set_run_id(run.rundir.run_id() or "")
    journal.close()

    assert ckptmgr("check", run.directory, "--allow-empty").code == 3


# -- directories of other libraries -----------------------------------------------------------------


def test_what_ckptmgr_did_not_write_is_asked_for_series_and_steps(tmp_path: Path, run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000)
    run.save(1000, series="hf", layout=Format.HUGGINGFACE, files={"model.bin": b"1"})
    copied = tmp_path / "copied"
    (run.directory / "checkpoint").rename(copied)

    assert ckptmgr("check", copied).code == 0
    assert ckptmgr("check", copied, "--min-step", "1000").code == 0
    done = ckptmgr("check", copied, "--min-step", "1001", "--json")
    assert (done.code, done.json["verdict"], done.json["path"]) == (3, "unsafe", None)
    assert [finding["id"] for finding in done.json["layouts"][0]["checkpoints"][0]["findings"]] == ["F018"]
    assert "F018" in ckptmgr("check", copied, "--min-step", "1001").out
    assert ckptmgr("check", copied, "--require", "checkpoint").code == 0
    assert ckptmgr("check", copied, "--require", "hf").code == 3
    assert ckptmgr("check", copied, "--max-age", "1h").code == 2


# -- the scripts of the documentation ---------------------------------------------------------------


def launch(run: Path, tmp_path: Path) -> tuple[int, str]:
    """What the documented job script does, with `srun` that runs one process, and a trainer that prints its words."""
    (script,) = [text for text in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL) if "SBATCH" in text]
    (tmp_path / "train.py").write_text("import sys; print(*sys.argv[1:])\n")
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    for name, words in (("srun", ""), ("python", sys.executable), ("ckptmgr", f"{sys.executable} -m ckptmgr")):
        (tools / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (tools / name).chmod(0o755)
    environment = {
        **os.environ, "RUN": str(run), "SLURM_NTASKS": "2", "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(PAGE.parents[2]),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, "".join(line for line in done.stdout.splitlines() if line.startswith("--run"))


def test_the_job_script_starts_what_is_safe_and_nothing_else(tmp_path: Path, run: Run) -> None:
    assert launch(tmp_path / "runs" / "new", tmp_path) == (0, f"--run {tmp_path}/runs/new")
    run.save(500)
    newest = run.save(1000, per_rank=("rng",))
    assert launch(run.directory, tmp_path) == (0, f"--run {run.directory}")
    (run.directory / newest.directory / "model.bin").unlink()
    assert launch(run.directory, tmp_path) == (0, f"--run {run.directory} --allow-older")
    (run.directory / "checkpoint/step-500/model.bin").unlink()
    assert launch(run.directory, tmp_path) == (1, "")
    assert launch(tmp_path / "nowhere" / "alpha", tmp_path) == (1, "")


def test_the_pod_asks_with_words_that_the_command_knows(tmp_path: Path, run: Run, ckptmgr: Call) -> None:
    run.save(500)
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (command,) = re.findall(r"command: \[ckptmgr, (.*)\]", text)
    words = [word.strip('" ') for word in command.split(",")]

    assert words[:2] == ["check", "/runs/alpha"]
    assert ckptmgr("check", run.directory, *words[2:]).code == 0
    assert re.search(r"values: \[2, 3, 4, 5, 10, 12\]", text)
