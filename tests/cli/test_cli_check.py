"""``ckptmgr check`` and ``ckptmgr latest``: the verdict, its exit status, and the path."""

from __future__ import annotations

import re
import shutil

import pytest
from run_on_disk import Call, Run, S

from ckptmgr.cli.check import judge
from ckptmgr.cli.output import Output
from ckptmgr.errors import JournalError
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import Format, RetirementMark
from ckptmgr.manifest import Digest
from ckptmgr.resume import Verdict
from ckptmgr.rundir import RunDirectory


def ids(document: dict) -> list[str]:
    """The findings of the first report: about candidates, then about the series."""
    report = document["reports"][0]
    return [f["id"] for each in report["candidates"] for f in each["findings"]] + [f["id"] for f in report["findings"]]


def flip(run: Run, path: str) -> None:
    """Change one byte of a file, which keeps its size."""
    file = run.directory / path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_the_newest_commit_is_safe_and_named(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000)
    path = f"{run.directory}/checkpoint/step-1000"

    check, latest = ckptmgr("check", run.directory), ckptmgr("latest", run.directory)

    assert (check.code, check.out) == (0, f"safe to resume from {path}\n")
    assert (latest.code, latest.out, latest.err) == (0, path + "\n", "")


def test_newest_is_the_last_commit_and_not_the_highest_step(run: Run, ckptmgr: Call) -> None:
    run.save(1000)
    run.save(500)

    assert ckptmgr("latest", run.directory).out.endswith("/step-500\n")


def test_of_many_the_newest_are_looked_at_and_of_the_older_ones_as_many_as_it_takes(run: Run, ckptmgr: Call) -> None:
    for step in range(1, 24):
        run.save(step)
    (run.directory / "checkpoint/step-1/model.bin").unlink()
    done, document = ckptmgr("check", run.directory), ckptmgr("check", run.directory, "--json").json

    assert (done.code, "R004" in done.out) == (0, False)
    assert "3 older ones were not looked at" in done.err
    assert "--all` looks at each" in done.err
    assert len(document["reports"][0]["candidates"]) == 20
    assert document["reports"][0]["not_looked_at"] == 3
    for flag in ("--all", "--deep"):
        done = ckptmgr("check", run.directory, flag)
        assert "R004" in done.out
        assert "not looked at" not in done.err
    for step in range(3, 24):
        shutil.rmtree(run.directory / f"checkpoint/step-{step}")
    done = ckptmgr("check", run.directory)
    assert done.code == 4
    assert done.out.endswith("/checkpoint/step-2\n")
    assert "not looked at" not in done.err


def test_nothing_committed_ends_with_3(run: Run, ckptmgr: Call) -> None:
    run.save(500, until=S.WRITING)

    check, latest = ckptmgr("check", run.directory), ckptmgr("latest", run.directory)

    assert check.code == 3
    assert "R001" in check.out
    assert (latest.code, latest.out) == (3, "")
    assert "nothing to resume from" in latest.err
    document = ckptmgr("latest", run.directory, "--json").json
    assert (document["path"], document["verdict"]) == (None, "none")


def test_a_run_without_any_row_ends_with_3(run: Run, ckptmgr: Call) -> None:
    assert ckptmgr("check", run.directory).code == 3
    assert ckptmgr("latest", run.directory).code == 3


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (shutil.rmtree, "R002"),
        (lambda d: (d / "ckptmgr.json").unlink(), "R003"),
        (lambda d: (d / "ckptmgr.json").write_text("{"), "R003"),
        (lambda d: (d / "model.bin").unlink(), "R004"),
        (lambda d: (d / "model.bin").write_bytes(b"short"), "R004"),
    ],
    ids=["directory", "manifest", "manifest-text", "file", "size"],
)
def test_a_damaged_newest_falls_back_to_the_older_one_with_4(run: Run, ckptmgr: Call, damage, finding: str) -> None:
    run.save(500)
    run.save(1000)
    damage(run.directory / "checkpoint/step-1000")
    older = f"{run.directory}/checkpoint/step-500"

    check, latest = ckptmgr("check", run.directory), ckptmgr("latest", run.directory)

    assert check.code == 4
    assert finding in check.out
    assert check.out.rstrip().endswith(older)
    assert (latest.code, latest.out) == (0, older + "\n")
    assert "newest is not safe" in latest.err
    assert ckptmgr("latest", run.directory, "--json").json["newest_is_safe"] is False


@pytest.mark.parametrize("damaged", [0, 1, 5, 9])
def test_latest_looks_no_further_than_to_a_safe_one(
    run: Run, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch, damaged: int
):
    rows = [run.save(step) for step in range(9)]
    for row in rows[9 - damaged :]:
        (run.directory / row.directory / "model.bin").unlink()
    read: set[str] = set()
    real = RunDirectory.read_manifest
    monkeypatch.setattr(RunDirectory, "read_manifest", lambda self, path: (read.add(path), real(self, path))[1])
    latest = ckptmgr("latest", run.directory)

    whole = [*reversed(rows[: 9 - damaged])]
    assert latest.out == (f"{run.rundir.absolute(whole[0].directory)}\n" if whole else "")
    assert read == {row.directory for row in rows[::-1][: {0: 1, 1: 2, 5: 8, 9: 9}[damaged]]}


def test_all_damaged_ends_with_5(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    (run.directory / "checkpoint/step-500/model.bin").unlink()

    check, latest = ckptmgr("check", run.directory), ckptmgr("latest", run.directory)

    assert check.code == 5
    assert (latest.code, latest.out) == (5, "")
    assert ckptmgr("latest", run.directory, "--json").code == 5


def test_changed_bytes_are_found_by_deep_alone(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000)
    flip(run, "checkpoint/step-1000/model.bin")

    shallow, deep = ckptmgr("check", run.directory), ckptmgr("check", run.directory, "--deep")

    assert shallow.code == 0
    assert deep.code == 4
    assert "R005" in deep.out
    assert "model.bin" in deep.out


def test_deep_damage_of_an_older_checkpoint_ends_with_5_while_the_newest_is_safe(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000)
    flip(run, "checkpoint/step-500/model.bin")

    done = ckptmgr("check", run.directory, "--deep")
    document = ckptmgr("check", run.directory, "--deep", "--json").json

    assert done.code == 5
    assert f"safe to resume from {run.directory}/checkpoint/step-1000" in done.out
    assert "damage was found" in done.out
    assert (document["verdict"], document["damaged"], document["exit_code"]) == ("safe", True, 5)


def test_deep_reads_all_series_unless_one_is_asked_for(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(500, series="hf", layout=Format.HUGGINGFACE)
    flip(run, "hf/hf-500/model.bin")

    assert ckptmgr("check", run.directory).code == 0
    assert ckptmgr("check", run.directory, "--deep").code == 5
    assert ckptmgr("check", run.directory, "--deep", "--series", "checkpoint").code == 0
    assert ckptmgr("check", run.directory, "--deep", "--step", 500).code == 0
    assert ckptmgr("check", run.directory, "--deep", "--series", "hf").code == 5


def test_deep_compares_with_the_journal_and_not_with_a_forged_manifest(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    directory = run.directory / "checkpoint/step-500"
    flip(run, "checkpoint/step-500/model.bin")
    entry = run.journal.files(1)[0]
    text = (directory / "ckptmgr.json").read_text()
    forged = text.replace(entry.digest, Digest((directory / entry.path).read_bytes()).text)
    assert forged != text
    (directory / "ckptmgr.json").write_text(forged)

    found = ids(ckptmgr("check", run.directory, "--deep", "--json").json)

    assert "R003" in found
    assert "R005" in found


def test_step_judges_only_that_step(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000)
    flip(run, "checkpoint/step-1000/model.bin")

    done = ckptmgr("check", run.directory, "--step", 500, "--deep")

    assert (done.code, done.out.strip()) == (0, f"safe to resume from {run.directory}/checkpoint/step-500")
    assert ckptmgr("check", run.directory, "--step", 7).code == 3


def test_world_size_makes_per_rank_state_unsafe(run: Run, ckptmgr: Call) -> None:
    run.save(500, world_size=2, per_rank=["data"])

    assert ckptmgr("check", run.directory, "--world-size", 2).code == 0
    assert ckptmgr("check", run.directory, "--world-size", 4).code == 3
    assert "R006" in ckptmgr("check", run.directory, "--world-size", 4).out
    assert ckptmgr("latest", run.directory, "--world-size", 4).code == 3
    assert ckptmgr("check", run.directory, "--world-size", 0).code == 2


def test_a_newer_failure_and_a_stranger_are_reported_and_harmless(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000, until=S.FAILED)
    (run.directory / "checkpoint" / "backup").mkdir()

    done = ckptmgr("check", run.directory)

    assert done.code == 0
    assert "R007" in done.out
    assert "R008" in done.out
    assert f"ckptmgr show {run.directory} 1000" in done.out


def test_in_flight_or_interrupted_depends_on_the_process_of_the_epoch(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000, until=S.WRITING)

    assert ids(ckptmgr("check", run.directory, "--json").json) == ["R010"]

    run.journal.end_epoch(run.epoch)

    assert ids(ckptmgr("check", run.directory, "--json").json) == ["R009"]


def test_a_retiring_checkpoint_is_no_candidate(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    run.save(1000, retire=[RetirementMark(first.id, "old")])
    shutil.rmtree(run.directory / "checkpoint/step-1000")

    assert ckptmgr("latest", run.directory).code == 5


def test_default_series_is_checkpoint_else_the_only_one_else_asked_for(run: Run, ckptmgr: Call) -> None:
    run.save(500, series="hf", layout=Format.HUGGINGFACE)

    assert ckptmgr("latest", run.directory).out.endswith("/hf/hf-500\n")

    run.save(500, series="snapshot")
    several = ckptmgr("latest", run.directory)

    assert several.code == 2
    assert "hf, snapshot" in several.err
    assert ckptmgr("latest", run.directory, "--series", "snapshot").code == 0

    run.save(900)

    assert ckptmgr("latest", run.directory).out.endswith("/checkpoint/step-900\n")


def test_a_series_that_has_saved_nothing_yet_has_nothing_to_resume_from(run: Run, ckptmgr: Call) -> None:
    run.save(500)

    assert ckptmgr("latest", run.directory, "--series", "hf").code == 3
    assert ckptmgr("check", run.directory, "--series", "../up").code == 2


def test_a_directory_without_its_mark_is_not_judged(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    (run.directory / ".ckptmgr-run-id").unlink()

    for command in ("check", "latest", "recover"):
        done = ckptmgr(command, run.directory)

        assert (done.code, done.out) == (10, "")
        assert "mounted" in done.err


def test_a_linked_series_directory_is_not_followed(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    (run.directory / "checkpoint").rename(run.directory.parent / "elsewhere")
    (run.directory / "checkpoint").symlink_to(run.directory.parent / "elsewhere")

    assert ckptmgr("check", run.directory).code == 3
    assert ckptmgr("latest", run.directory).out == ""


class BusyRun(RunDirectory):
    """A run directory whose manager commits one checkpoint and deletes its predecessor while it is being listed."""

    def __init__(self, run: Run, steps: list[int]) -> None:
        super().__init__(run.directory)
        self.run, self.steps = run, steps

    def listing(self, *args, **kwargs):
        if self.steps:
            live = self.run.journal.checkpoints(live_only=True)
            self.run.save(self.steps.pop(0), retire=[RetirementMark(record.id, "last 1") for record in live])
            for record in live:
                shutil.rmtree(self.run.directory / record.directory)
                self.run.journal.finish_retirement(record.id, epoch=self.run.epoch)
        return super().listing(*args, **kwargs)


@pytest.mark.parametrize("deep", [False, True])
def test_a_checkpoint_that_is_retired_while_we_look_is_not_called_missing(run: Run, deep: bool) -> None:
    run.save(100)
    busy = BusyRun(run, [200, 300, 400])
    with Journal.open_read_only(run.journal_path) as journal:
        report = judge(journal, busy, "checkpoint", deep_for=Output(as_json=True) if deep else None)

    assert busy.steps == []
    assert (report.verdict, report.chosen.step) == (Verdict.SAFE, 400)
    assert report.all_findings == ()


def test_a_series_that_never_stands_still_is_said_to(run: Run) -> None:
    run.save(1)
    with Journal.open_read_only(run.journal_path) as journal, pytest.raises(JournalError, match="faster"):
        judge(journal, BusyRun(run, list(range(2, 99))), "checkpoint")


def test_checking_changes_nothing(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    run.save(1000, retire=[RetirementMark(first.id, "old")])
    run.save(1500, until=S.GATHERED)
    run.journal.close()

    def snapshot() -> dict[str, tuple[int, bytes]]:
        root = run.directory.parent
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in sorted(root.rglob("*"))}

    before = snapshot()
    for words in (
        ["ls", "--all"],
        ["show", "500"],
        ["log"],
        ["latest"],
        ["check", "--deep"],
        ["recover"],
        ["recover", "--rebuild"],
    ):
        ckptmgr(words[0], run.directory, *words[1:])

    assert snapshot() == before


def test_a_mark_that_is_a_directory_is_not_our_bug(run: Run, ckptmgr: Call) -> None:
    mark = run.directory / ".ckptmgr-run-id"
    mark.unlink()
    mark.mkdir()
    done = ckptmgr("check", run.directory)
    assert done.code == 3
    assert "not a regular file" in done.err
    assert "Traceback" not in done.err


def test_the_hint_of_latest_asks_what_latest_was_asked(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(500, series="hf", per_rank=["rng"], world_size=4)

    done = ckptmgr("latest", run.directory, "--series", "hf", "--world-size", 2)
    assert done.code == 3
    (words,) = re.findall("run `ckptmgr (.*)` for the findings", done.err)
    assert ckptmgr(*words.split()).code == 3


def test_who_may_resume_from_an_older_one_only_is_told_how(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000)
    assert "allow_older" not in ckptmgr("check", run.directory).err

    shutil.rmtree(run.directory / "checkpoint/step-1000")
    assert "hint: restore the newest, or pass allow_older=True to `resume`" in ckptmgr("check", run.directory).err
