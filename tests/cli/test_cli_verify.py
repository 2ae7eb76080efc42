"""``ckptmgr verify``: what is read, in which order, what differs, and what the journal remembers of it."""

from __future__ import annotations

import collections
import dataclasses
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_trainer import Trainer
from run_on_disk import NO_PROCESS, Call, Run, S, in_child, start

from ckptmgr import pace, requests
from ckptmgr.cli import verify
from ckptmgr.cli.verify import COMMAND, DAMAGED, GONE, INTACT, Compared, compare, parts
from ckptmgr.journal import Journal, Questions, Verification
from ckptmgr.lifecycle import Format, RetirementMark
from ckptmgr.rundir import RunDirectory


def flip(run: Run | Path, path: str) -> None:
    """Change one byte of a file, which keeps its size."""
    file = (run if isinstance(run, Path) else run.directory) / path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def results(document: dict) -> dict[tuple[str, int], str]:
    return {(one["series"], one["step"]): one["result"] for one in document["checkpoints"]}


def test_what_is_intact_is_recorded_and_shown_as_trust_with_its_age(run: Run, ckptmgr: Call) -> None:
    record = run.save(500)
    done = ckptmgr("verify", run.directory)

    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[1].split() == ["intact", "checkpoint", "500", "1.1", "kB", "never", "-"]
    assert done.out.splitlines()[-1].startswith("no damage in 1 checkpoints, 1.1 kB read in ")
    (row,) = run.journal.verifications(record.id)
    assert (row.level, row.ok, row.mismatches) == ("digest", True, ())
    assert "verified 0 s ago" in ckptmgr("ls", run.directory).out
    assert "trust       verified 0 s ago" in ckptmgr("show", run.directory, 500).out
    (listed,) = ckptmgr("ls", run.directory, "--json").json["checkpoints"]
    assert listed["verified_ok"] is True


def test_sizes_that_were_compared_are_no_trust_in_bytes(run: Run, ckptmgr: Call) -> None:
    record = run.save(500)
    run.journal.record_verification(record.id, level="size", ok=True, mismatches=[])

    assert "verified" not in ckptmgr("ls", run.directory).out
    assert "trust" not in ckptmgr("show", run.directory, 500).out


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: flip(run, "checkpoint/step-500/model.bin"), "digest: model.bin has other bytes"),
        (lambda run: (run.directory / "checkpoint/step-500/model.bin").unlink(), "missing: model.bin"),
        (lambda run: (run.directory / "checkpoint/step-500/model.bin").write_bytes(b"x"), "size: model.bin has 1"),
        (lambda run: (run.directory / "checkpoint/step-500/ckptmgr.json").unlink(), "manifest: ckptmgr.json cannot"),
        (lambda run: (run.directory / "checkpoint/step-500/ckptmgr.json").write_text("{"), "manifest: "),
        (lambda run: flip(run, "checkpoint/step-500/ckptmgr.json"), "manifest: "),
        (lambda run: shutil.rmtree(run.directory / "checkpoint/step-500"), "missing: optim/rank-0.bin"),
    ],
    ids=["bytes", "file", "size", "no-manifest", "torn-manifest", "manifest", "directory"],
)
def test_damage_ends_with_5_is_named_and_remembered(run: Run, ckptmgr: Call, damage, said: str) -> None:
    record = run.save(500)
    run.save(1000)
    damage(run)

    done = ckptmgr("verify", run.directory)

    assert done.code == 5
    assert said in done.out
    assert "1 of 2 checkpoints are damaged" in done.out
    assert "check" in done.err
    assert [row.ok for row in run.journal.verifications(record.id)] == [False]
    assert "DAMAGED when verified 0 s ago" in ckptmgr("ls", run.directory).out
    document = ckptmgr("verify", run.directory, "--json").json
    assert document["exit_code"] == 5
    assert results(document) == {("checkpoint", 500): DAMAGED, ("checkpoint", 1000): INTACT}
    (bad,) = [one for one in document["checkpoints"] if one["result"] == DAMAGED]
    assert said in "; ".join(bad["mismatches"])
    assert bad["verified_before_ok"] is False


def test_every_mismatch_has_a_line(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    for name in ("model.bin", "optim/rank-0.bin"):
        flip(run, f"checkpoint/step-500/{name}")

    lines = [line for line in ckptmgr("verify", run.directory).out.splitlines() if line.startswith("damaged")]

    assert ["model.bin" in line for line in lines] == [True, False]
    assert ["rank-0.bin" in line for line in lines] == [False, True]


def test_subsets_cover_everything_in_the_end_and_nothing_twice_before(run: Run, ckptmgr: Call) -> None:
    rows = [run.save(step) for step in range(10)]
    seen: list[int] = []
    for _ in range(20):
        document = ckptmgr("verify", run.directory, "--subset", "10%", "--json").json
        assert document["left_out"] == 9
        seen += [one["step"] for one in document["checkpoints"]]

    assert sorted(seen[:10]) == list(range(10))
    # Then again, those first that were verified first.
    assert seen[10:] == seen[:10]
    assert len({len(run.journal.verifications(row.id)) for row in rows}) == 1


def test_those_that_were_never_verified_come_in_no_fixed_order(run: Run, ckptmgr: Call) -> None:
    for step in range(8):
        run.save(step)
    run.rundir.acquire("train.py")  # so that nothing is recorded
    first = collections.Counter(
        ckptmgr("verify", run.directory, "--subset", "1B", "--json").json["checkpoints"][0]["step"] for _ in range(30)
    )

    assert len(first) > 1


@pytest.mark.parametrize(("part", "read"), [("1B", 1), ("1051B", 2), ("25%", 1), ("26%", 2), ("100%", 4)])
def test_a_subset_is_whole_checkpoints_until_the_part_is_reached(run: Run, ckptmgr: Call, part: str, read: int) -> None:
    for step in range(4):
        run.save(step)

    assert len(ckptmgr("verify", run.directory, "--subset", part, "--json").json["checkpoints"]) == read


@pytest.mark.parametrize(
    "words",
    [
        ["--subset", "0%"],
        ["--subset", "101%"],
        ["--subset", "x%"],
        ["--subset", "x"],
        ["--older-than", "7"],
        ["--max-bytes-per-second", "0"],
        ["--newest", "--step", "1"],
        ["--series", "nope"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_asked_ends_with_2(run: Run, ckptmgr: Call, words: list[str]) -> None:
    run.save(500)

    assert ckptmgr("verify", run.directory, *words).code == 2


def test_newest_is_the_last_commit_of_each_series(run: Run, ckptmgr: Call) -> None:
    run.save(1000)
    run.save(500)
    run.save(700, series="hf", layout=Format.HUGGINGFACE)

    document = ckptmgr("verify", run.directory, "--newest", "--json").json

    assert set(results(document)) == {("checkpoint", 500), ("hf", 700)}
    assert set(results(ckptmgr("verify", run.directory, "--newest", "--series", "hf", "--json").json)) == {("hf", 700)}
    again = ckptmgr("verify", run.directory, "--newest", "--older-than", "1h", "--json").json
    assert (again["checkpoints"], again["fresh"]) == ([], 2)


def test_step_asks_for_one_and_an_unknown_one_ends_with_3(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000)
    run.save(1500, until=S.WRITING)

    assert set(results(ckptmgr("verify", run.directory, "--step", 500, "--json").json)) == {("checkpoint", 500)}
    for step in (1500, 7):
        assert ckptmgr("verify", run.directory, "--step", step).code == 3


def test_older_than_leaves_out_what_is_fresh_and_intact_alone(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000)
    flip(run, "checkpoint/step-500/model.bin")
    assert ckptmgr("verify", run.directory).code == 5
    run.save(1500)

    document = ckptmgr("verify", run.directory, "--older-than", "7d", "--json").json

    assert results(document) == {("checkpoint", 500): DAMAGED, ("checkpoint", 1500): INTACT}
    assert document["fresh"] == 1
    assert len(ckptmgr("verify", run.directory, "--older-than", "0s", "--json").json["checkpoints"]) == 3


def test_nothing_to_verify_is_fine_and_said(run: Run, ckptmgr: Call) -> None:
    empty = ckptmgr("verify", run.directory)
    run.save(500)
    ckptmgr("verify", run.directory)
    fresh = ckptmgr("verify", run.directory, "--older-than", "1d")

    assert (empty.code, empty.out, fresh.code, fresh.out) == (0, "", 0, "")
    assert "nothing to verify" in empty.err
    assert "1 are verified already" in fresh.err


def test_an_interrupted_run_has_recorded_what_it_verified_and_is_gone_on_with(run: Run, ckptmgr: Call) -> None:
    for step in range(3):
        run.save(step)
    with start("verify", run.directory, "--max-bytes-per-second", "700B") as child:
        child.stdout.readline()
        first = int(child.stdout.readline().split()[2])
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)

    assert child.returncode == 130
    assert "--older-than 1d` goes on" in err
    assert "Traceback" not in err
    rest = ckptmgr("verify", run.directory, "--older-than", "1d", "--json").json
    assert {one["step"] for one in rest["checkpoints"]} == {0, 1, 2} - {first}


def test_a_question_that_ctrl_c_cuts_short_keeps_nothing_from_being_recorded(
    run: Run, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(3):
        run.save(step)
    read = []

    def interrupted(journal: Questions, *args: Any) -> Compared:
        if read:
            with journal._database.reading() as connection:
                cursor = connection.execute("SELECT * FROM checkpoint")
                raise KeyboardInterrupt(cursor.fetchone())
        read.append(1)
        return compare(journal, *args)

    monkeypatch.setattr(verify, "compare", interrupted)
    done = ckptmgr("verify", run.directory)

    assert done.code == 130
    assert "what was verified is recorded" in done.err
    assert len(outcomes(run.directory)) == 1


def test_beside_who_answers_nobody_it_says_that_nothing_is_recorded_and_why(run: Run, ckptmgr: Call) -> None:
    record = run.save(500)
    flip(run, "checkpoint/step-500/model.bin")
    run.rundir.acquire("python train.py")
    done = ckptmgr("verify", run.directory)
    document = ckptmgr("verify", run.directory, "--json").json
    run.rundir.release()

    assert done.code == 5
    assert "will not be recorded" in done.err
    assert "python train.py" in done.err
    assert "python train.py" in document["not_recorded_because"]
    assert document["checkpoints"][0]["recorded"] is False
    assert run.journal.verifications(record.id) == []
    free = ckptmgr("verify", run.directory, "--json").json
    assert (free["not_recorded_because"], free["checkpoints"][0]["recorded"]) == (None, True)


def test_the_lock_is_free_while_it_reads_and_no_epoch_is_taken(run: Run, ckptmgr: Call) -> None:
    record = run.save(500)
    run.save(600)
    epochs = run.journal.epochs()
    taken = []

    def read(_: int) -> None:
        run.rundir.acquire("a manager that starts")
        taken.append(run.rundir.holder())
        run.rundir.release()

    assert compare(run.journal, run.rundir, record, None, read).result == INTACT
    assert taken
    with start("verify", run.directory, "--max-bytes-per-second", "350B") as child:
        child.stdout.readline()
        child.stdout.readline()
        run.rundir.acquire("a manager that starts")  # or RunLocked
        run.rundir.release()
        child.communicate(timeout=60)
    assert child.returncode == 0
    assert run.journal.epochs() == epochs
    assert COMMAND in run.rundir.holder()


def test_a_checkpoint_that_is_retired_meanwhile_is_no_damage(run: Run) -> None:
    record = run.save(500)
    run.save(1000)

    def read(_: int) -> None:
        if run.journal.checkpoint(record.id).is_live:
            run.journal.mark_retiring([RetirementMark(record.id, "old")], epoch=run.epoch)
            shutil.rmtree(run.directory / record.directory)

    assert compare(run.journal, run.rundir, record, None, read).result == GONE


def test_a_checkpoint_that_is_being_replaced_is_no_damage(run: Run, ckptmgr: Call) -> None:
    record = run.save(500)
    run.save(500, files={"model.bin": b"new" * 9}, overwrite=True, until=S.GATHERED, published=True)
    assert run.journal.checkpoint(record.id).is_live

    document = ckptmgr("verify", run.directory, "--json").json

    assert (document["exit_code"], results(document)) == (0, {("checkpoint", 500): GONE})
    assert run.journal.verifications(record.id) == []


def test_what_differs_while_the_step_is_saved_again_is_looked_at_again(run: Run) -> None:
    record = run.save(500)
    file = run.directory / record.directory / "optim/rank-0.bin"
    whole = file.read_bytes()
    calls: list[int] = []

    def read(_: int) -> None:
        calls.append(1)
        if len(calls) == 1:  # of model.bin: the overwriting attempt has swapped the directories ...
            file.write_bytes(b"swapped")
            run.save(500, overwrite=True, until=S.FAILED)
        elif len(calls) == 2:  # ... and failed, and they were swapped back
            file.write_bytes(whole)

    assert compare(run.journal, run.rundir, record, None, read).result == INTACT
    assert len(calls) == 3


def test_a_run_directory_that_is_not_mounted_is_not_damage(run: Run, ckptmgr: Call) -> None:
    record = run.save(500)
    away = run.directory.rename(f"{run.directory}.away")
    missing = ckptmgr("verify", run.directory)
    run.directory.mkdir()
    empty = ckptmgr("verify", run.directory)
    run.directory.rmdir()
    away.rename(run.directory)

    def unmount(_: int) -> None:
        if run.directory.is_dir():
            run.directory.rename(away)
            run.directory.mkdir()

    from ckptmgr.errors import ForeignJournal

    assert (missing.code, empty.code) == (2, 10)
    with pytest.raises(ForeignJournal):
        compare(run.journal, RunDirectory(run.directory), record, None, unmount)
    assert run.journal.verifications(record.id) == []


def test_it_reads_no_faster_than_asked(run: Run, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(500)
    waits: list[float] = []
    monkeypatch.setattr(pace.time, "sleep", waits.append)
    ckptmgr("verify", run.directory, "--max-bytes-per-second", "1B")

    assert 1040 < max(waits) <= 1050
    waits.clear()
    ckptmgr("verify", run.directory)
    assert waits == []


def test_what_is_known_to_be_damaged_is_safe_for_no_command_until_it_is_verified_again(run: Run, ckptmgr: Call) -> None:
    for step in (100, 200):
        run.save(step)
    flip(run, "checkpoint/step-200/model.bin")
    assert ckptmgr("check", run.directory).code == 0  # nobody has read it yet
    run.start(pid=NO_PROCESS)
    assert ckptmgr("verify", run.directory).code == 5

    checked = ckptmgr("check", run.directory)
    assert checked.code == 4
    assert "R005" in checked.out
    assert "model.bin has other bytes than were committed, as its last verification found" in checked.out
    assert f"`ckptmgr verify {run.directory} --step 200 --series checkpoint`" in checked.out
    assert ckptmgr("latest", run.directory).out == f"{run.directory}/checkpoint/step-100\n"
    (told,) = ckptmgr("why", run.directory, 200, "--json").json["attempts"]
    assert told["verdict"] == "not resumable"
    plan = ckptmgr("prune", run.directory, "--keep-last", 1, "--json").json
    assert plan["drop"] == []
    flip(run, "checkpoint/step-200/model.bin")
    assert ckptmgr("check", run.directory, "--deep").code == 0
    assert ckptmgr("check", run.directory).code == 4
    assert ckptmgr("verify", run.directory, "--step", 200).code == 0
    assert ckptmgr("check", run.directory).code == 0


def test_damage_that_a_look_can_see_is_judged_anew(run: Run, ckptmgr: Call) -> None:
    record = run.save(100)
    run.journal.record_verification(
        record.id, level="digest", ok=False, mismatches=["missing: model.bin cannot be read: No such file or directory"]
    )

    assert ckptmgr("check", run.directory).code == 0


def test_what_is_known_is_asked_for_at_once_of_many(run: Run, ckptmgr: Call) -> None:
    records = [run.save(step) for step in range(0, 60, 10)]
    run.journal.record_verification(records[2].id, level="digest", ok=False, mismatches=["digest: model.bin has other"])

    done = ckptmgr("check", run.directory, "--json").json
    safe = {one["step"]: one["safe"] for one in done["reports"][0]["candidates"]}
    assert safe == {0: True, 10: True, 20: False, 30: True, 40: True, 50: True}


@pytest.mark.parametrize("is_managed", [False, True])
def test_what_was_read_before_damage_was_found_does_not_take_it_back(
    tmp_path: Path, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch, is_managed: bool
) -> None:
    path = tmp_path / "alpha"
    add = verify.Book.add

    def found_meanwhile(book: verify.Book, one: Compared) -> None:
        if one.record.step == 2:
            flip(path, "checkpoint/step-2/__0_0.distcp")
            assert in_child("verify", path, "--step", 2).code == 5
        add(book, one)

    with Trainer(path) as trainer:
        trainer.tell("save 1 2")
        if not is_managed:
            trainer.tell("close")
        with monkeypatch.context() as patched:
            patched.setattr(verify.Book, "add", found_meanwhile)
            done = ckptmgr("verify", path, "--json").json
        assert results(done) == {("checkpoint", 1): INTACT, ("checkpoint", 2): INTACT}
        assert {one["step"]: one["recorded"] for one in done["checkpoints"]} == {1: True, 2: False}
        assert done["not_recorded_because"] == "damage was found after it was read: checkpoint step 2"
        assert outcomes(path) == {("checkpoint", 1): [True], ("checkpoint", 2): [False]}
        assert ckptmgr("latest", path).out == f"{path}/checkpoint/step-1\n"
        flip(path, "checkpoint/step-2/__0_0.distcp")
        assert ckptmgr("verify", path).err.count("recorded") == 0
        assert outcomes(path)["checkpoint", 2] == [False, True]


# A manager has it open


def told(run: Path) -> dict[tuple[str, int], list[Verification]]:
    """What the journal says of the bytes of each checkpoint of which it says something, oldest first."""
    with Journal.open_read_only(run.with_name(f"{run.name}.journal.db"), whole=True) as journal:
        rows = {(one.series, one.step): journal.verifications(one.id) for one in journal.checkpoints()}
    return {at: found for at, found in rows.items() if found}


def outcomes(run: Path) -> dict[tuple[str, int], list[bool]]:
    return {at: [one.ok for one in found] for at, found in told(run).items()}


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def asked(run: Path) -> list[str]:
    folder = run / requests.DIRECTORY
    return [name for one in folder.iterdir() if (name := one.name)[0] != "."] if folder.is_dir() else []


def test_a_manager_records_it_and_what_is_damaged_is_safe_for_no_command(tmp_path: Path, ckptmgr: Call) -> None:
    run = tmp_path / "alpha"
    with Trainer(run) as trainer:
        trainer.tell("save 1 2 3")
        flip(run, "checkpoint/step-3/__0_0.distcp")
        assert ckptmgr("check", run).code == 0  # nobody has read it yet
        document = ckptmgr("verify", run, "--json").json

        assert results(document) == {("checkpoint", 1): INTACT, ("checkpoint", 2): INTACT, ("checkpoint", 3): DAMAGED}
        assert (document["exit_code"], document["not_recorded_because"]) == (5, None)
        assert document["by"].startswith(f"CheckpointManager, pid {trainer.process.pid}")
        assert {one["recorded"] for one in document["checkpoints"]} == {True}
        assert outcomes(run) == {("checkpoint", 1): [True], ("checkpoint", 2): [True], ("checkpoint", 3): [False]}
        assert "R005" in (checked := ckptmgr("check", run)).out
        assert checked.code == 4
        assert ckptmgr("latest", run).out == f"{run}/checkpoint/step-2\n"
        rest = ckptmgr("verify", run, "--older-than", "1d", "--json").json
        assert (results(rest), rest["fresh"]) == ({("checkpoint", 3): DAMAGED}, 2)
        plan = ckptmgr("prune", run, "--keep-last", 1, "--apply", "--json").json
        assert [one["step"] for one in plan["keep"]] == [2, 3]
        flip(run, "checkpoint/step-3/__0_0.distcp")
        assert ckptmgr("verify", run, "--newest").code == 0
        assert ckptmgr("check", run).code == 0
    with Journal.open_read_only(run.with_name("alpha.journal.db"), whole=True) as journal:
        assert [epoch.command for epoch in journal.epochs()] == ["live_trainer.py"]


def test_a_manager_that_saves_all_the_time_records_it(tmp_path: Path, ckptmgr: Call) -> None:
    run = tmp_path / "alpha"
    with Trainer(run, keep="KeepLast(3) | KeepEvery(5)") as trainer:
        trainer.tell("save 5 10 15")
        trainer.tell("saving")
        for number in range(1, 6):
            done = ckptmgr("verify", run)
            assert (done.code, "recorded" in done.err) == (0, False), done
            assert done.err.startswith(f"the run is in use by CheckpointManager, pid {trainer.process.pid}")
            assert outcomes(run)["checkpoint", 5] == [True] * number
        trainer.tell("save 1")
    assert asked(run) == []
    assert ckptmgr("check", run, "--deep").code == 0
    assert ckptmgr("recover", run).out == "nothing to recover\n"


def test_a_manager_records_all_series_also_those_that_it_does_not_save(run: Run, ckptmgr: Call) -> None:
    for step in (1, 2):
        run.save(step)
        run.save(step, series="hf", layout=Format.HUGGINGFACE)
    run.journal.end_epoch(run.epoch)
    run.journal.close()
    flip(run, "hf/hf-2/model.bin")
    with Trainer(run.directory):
        done = ckptmgr("verify", run.directory)
        document = ckptmgr("verify", run.directory, "--json").json

    assert done.code == 5
    assert done.err.count("asking it") == 1
    assert {one["recorded"] for one in document["checkpoints"]} == {True}
    assert outcomes(run.directory) == {
        (series, step): [(series, step) != ("hf", 2)] * 2 for series in ("checkpoint", "hf") for step in (1, 2)
    }


def test_a_busy_manager_records_nothing_and_the_reason_is_said(tmp_path: Path, ckptmgr: Call) -> None:
    run = tmp_path / "alpha"
    with Trainer(run, look_every_s=1000) as trainer:
        trainer.tell("save 1")
        flip(run, "checkpoint/step-1/__0_0.distcp")
        done = ckptmgr("verify", run, "--timeout", 0.3)
        document = ckptmgr("verify", run, "--timeout", 0.3, "--json").json

        assert done.code == 5
        assert "asking it" in done.err
        (why,) = [line for line in done.err.splitlines() if line.startswith("not all of this is recorded: ")]
        assert f"CheckpointManager, pid {trainer.process.pid}" in why
        assert "did not answer within 0.3 s" in why
        assert "a longer --timeout" in done.err
        assert "did not answer within 0.3 s" in document["not_recorded_because"]
        assert (document["by"], document["checkpoints"][0]["recorded"]) == (None, False)
        assert (asked(run), told(run)) == ([], {})


def test_what_a_busy_manager_does_not_record_while_there_is_more_to_read_it_is_asked_at_the_end(
    tmp_path: Path, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "alpha"
    with Trainer(run) as trainer:
        trainer.tell("save 1")
        trainer.tell("hooks 5")
        trainer.begin("save 2")
        wait_until(lambda: ckptmgr("latest", run).out.endswith("/step-2\n"))
        monkeypatch.setattr(verify, "_RECORD_EVERY_S", -1.0)
        monkeypatch.setattr(verify, "_PATIENCE_S", 0.3)
        waited_in_vain = []
        record = verify.Book._record

        def noted(*args: Any) -> None:
            waited_in_vain.append(args[-1])
            record(*args)
            waited_in_vain.pop()

        monkeypatch.setattr(verify.Book, "_record", noted)
        done = ckptmgr("verify", run)
        trainer.wait_for("did save 2")

    assert done.code == 0
    assert waited_in_vain == [0.3, 0.3]
    assert ("recorded" in done.err, done.err.count("asking it")) == (False, 1)
    assert outcomes(run) == {("checkpoint", 1): [True], ("checkpoint", 2): [True]}


def test_what_was_read_before_ctrl_c_the_manager_records(tmp_path: Path) -> None:
    run = tmp_path / "alpha"
    with Trainer(run) as trainer:
        trainer.tell("save 1 2 3")
        with start("verify", run, "--max-bytes-per-second", "2kB") as child:
            child.stdout.readline()
            first = int(child.stdout.readline().split()[2])
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=30)

        assert child.returncode == 130
        assert "--older-than 1d` goes on" in err
        assert outcomes(run) == {("checkpoint", first): [True]}


def test_ctrl_c_while_nobody_answers_ends_it(tmp_path: Path) -> None:
    run = tmp_path / "alpha"
    with Trainer(run, look_every_s=1000) as trainer:
        trainer.tell("save 1")
        with start("verify", run) as child:
            wait_until(lambda: bool(asked(run)))
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=30)
        assert (child.returncode, err.splitlines()[-1]) == (130, "ckptmgr: interrupted")
        assert (asked(run), told(run)) == ([], {})


def test_a_manager_that_ends_meanwhile_leaves_the_recording_to_the_command(tmp_path: Path) -> None:
    run = tmp_path / "alpha"
    with Trainer(run, look_every_s=1000) as trainer:
        trainer.tell("save 1")
        with start("verify", run, "--json") as child:
            wait_until(lambda: bool(asked(run)))
            trainer.kill()
            out, _ = child.communicate(timeout=30)
    assert child.returncode == 0
    assert '"by": null' in out
    assert '"recorded": true' in out
    assert (outcomes(run), asked(run)) == ({("checkpoint", 1): [True]}, [])


def test_a_manager_that_dies_after_it_has_recorded_it_leaves_it_recorded(tmp_path: Path) -> None:
    run = tmp_path / "alpha"
    with Trainer(run, die_at="a request is done and nobody has said so") as trainer:
        trainer.tell("save 1")
        flip(run, "checkpoint/step-1/__0_0.distcp")
        done = in_child("verify", run, "--json")
        assert trainer.ended() != 0

    assert (done.code, done.json["by"], done.json["checkpoints"][0]["recorded"]) == (5, None, True)
    # By the manager, and again by the command, which cannot know.
    assert outcomes(run) == {("checkpoint", 1): [False, False]}


def test_requests_that_cannot_be_put_there_keep_nothing_from_being_read(tmp_path: Path, ckptmgr: Call) -> None:
    run = tmp_path / "alpha"
    with Trainer(run) as trainer:
        trainer.tell("save 1")
        (run / requests.DIRECTORY).write_text("a file where the directory belongs")
        done = ckptmgr("verify", run)
        document = ckptmgr("verify", run, "--json").json

    assert done.code == 0
    assert "not all of this is recorded: the manager that has the run cannot be asked through " in done.err
    assert requests.DIRECTORY in document["not_recorded_because"]
    assert results(document) == {("checkpoint", 1): INTACT}
    assert told(run) == {}


def test_a_manager_is_told_in_parts_and_only_what_it_can_be_told(run: Run) -> None:
    record = run.save(500)
    wrong = ("missing: \udcff", *["size: " + "x" * requests.LONGEST_MISMATCH] * requests.MOST_MISMATCHES)
    ids = range(1, requests.MOST_VERIFIED + 502)
    many = [Compared(dataclasses.replace(record, id=id), None, INTACT) for id in ids]
    damaged = [Compared(dataclasses.replace(record, id=id, series="hf"), None, DAMAGED, wrong) for id in range(1, 10)]
    told_of = list(parts([one for pair in zip(many, damaged, strict=False) for one in pair] + many[9:]))

    assert [(series, len(several)) for series, several in told_of] == [
        ("checkpoint", requests.MOST_VERIFIED), ("checkpoint", 501), *[("hf", 2)] * 4, ("hf", 1),
    ]  # fmt: skip
    for series, several in told_of:
        one = requests.Request(
            requests.VERIFY, series, 1, "h", 1, 1.0, 2.0, verified=tuple(each.verified for each in several)
        )
        assert requests.parse_request(one.to_json(), one.id) == one
    assert damaged[0].verified.mismatches[0] == "missing: \\udcff"
