"""``ckptmgr prune``: a plan with reasons, and carrying it out under the run lock or by asking a live manager."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from live_trainer import Trainer
from run_on_disk import NO_PROCESS, Call, Run, S, in_child, start
from test_cli_pin import listed, requests_of, wait_for_a_request

from ckptmgr import durable
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import Format, RetirementMark

SIZE = 700 + 350


@pytest.fixture
def five(run: Run) -> Run:
    """Five checkpoints, of which 300 is the best, that nobody has open."""
    for step, loss in ((100, 0.5), (200, 0.4), (300, 0.1), (400, 0.3), (500, float(2))):
        run.save(step, metrics={"loss": loss})
    run.journal.end_epoch(run.epoch)
    return run


def verdicts(done: Any) -> dict[int, list[str]]:
    document = done.json
    kept = {row["step"]: row["reasons"] for row in document["keep"]}
    return kept | {row["step"]: [] for row in document["drop"]}


def everything(run: Path) -> list[Any]:
    """All names of the run and the bytes of its journal."""
    journal = run.with_name(f"{run.name}.journal.db")
    return [sorted(str(path) for path in run.rglob("*")), journal.read_bytes()]


# The plan


def test_a_plan_gives_every_reason_and_changes_nothing(five: Run, ckptmgr: Call) -> None:
    five.journal.pin("checkpoint", 200)
    before = everything(five.directory)
    done = ckptmgr("prune", five.directory, "--keep-last", 2, "--keep-best", "loss:min:1", "--keep-every", 500)

    assert done.code == 0
    assert [line.split()[0::5][0] for line in done.out.splitlines()[1:-1]] == ["100", "200", "300", "400", "500"]
    assert done.out.splitlines()[-1] == "would retire 1 of 5 checkpoints, 1.1 kB"
    assert "no rule keeps it (last 2 | best 1 by loss (min) | every 500 steps)" in done.out
    assert "nothing was changed" in done.err

    document = ckptmgr(
        "prune", five.directory, "--keep-last", 2, "--keep-best", "loss:min:1", "--keep-every", 500, "--json"
    ).json
    assert {row["step"]: row["reasons"] for row in document["keep"]} == {
        200: ["pinned"],
        300: ["best 1 by loss (min)"],
        400: ["last 2"],
        500: ["last 2", "every 500 steps", "newest committed"],
    }
    assert [row["step"] for row in document["drop"]] == [100]
    assert (document["applied"], document["by"], document["bytes"]) == (False, None, SIZE)
    assert everything(five.directory) == before


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--keep-last", "1"], {500}),
        (["--keep-last", "9"], {100, 200, 300, 400, 500}),
        (["--keep-every", "200"], {200, 400, 500}),
        (["--keep-every", "200", "--keep-every", "300"], {200, 300, 400, 500}),
        (["--keep-within", "7d"], {100, 200, 300, 400, 500}),
        (["--keep-within", "0.000001s"], {500}),
        (["--keep-best", "loss:max:2"], {100, 500}),
        (["--keep-best", "loss:min:2"], {300, 400, 500}),
        (["--keep-best", "none:min:2"], {500}),
        (["--keep-best", "loss:min:1", "--keep-last", "2"], {300, 400, 500}),
    ],
)
def test_rules_are_or_ed_and_the_newest_always_stays(
    five: Run, ckptmgr: Call, words: list[str], kept: set[int]
) -> None:
    document = ckptmgr("prune", five.directory, *words, "--json").json

    assert {row["step"] for row in document["keep"]} == kept
    assert {row["step"] for row in document["drop"]} == {100, 200, 300, 400, 500} - kept
    assert document["bytes"] == SIZE * (5 - len(kept))


@pytest.mark.parametrize("apply", [[], ["--apply"]])
def test_no_rule_at_all_is_refused(five: Run, ckptmgr: Call, apply: list[str]) -> None:
    before = everything(five.directory)
    done = ckptmgr("prune", five.directory, *apply)

    assert (done.code, done.out) == (2, "")
    assert f"ckptmgr prune {five.directory} --keep-last 3" in done.err
    assert ckptmgr("prune", five.directory, *apply, "--json").json["error"]["type"] == "InvalidArgument"
    assert everything(five.directory) == before


@pytest.mark.parametrize(
    "words",
    [
        ["--keep-last", "0"],
        ["--keep-last", "-1"],
        ["--keep-last", "x"],
        ["--keep-every", "0"],
        ["--keep-within", "7"],
        ["--keep-within", "0d"],
        ["--keep-within", "1e9d"],
        ["--keep-best", "loss"],
        ["--keep-best", "loss:min"],
        ["--keep-best", "loss:most:3"],
        ["--keep-best", ":min:3"],
        ["--keep-best", "loss:min:0"],
        ["--keep-last", "1", "--series", "nope"],
    ],
    ids=" ".join,
)
def test_what_is_no_rule_ends_with_2(five: Run, ckptmgr: Call, words: list[str]) -> None:
    done = ckptmgr("prune", five.directory, *words, "--apply")

    assert (done.code, done.out) == (2, "")
    assert [row["step"] for row in listed(ckptmgr, five.directory)] == [100, 200, 300, 400, 500]


def test_a_metric_may_have_colons_in_its_name(run: Run, ckptmgr: Call) -> None:
    for step, loss in ((1, 1), (2, 0), (3, 2)):
        run.save(step, metrics={"val:loss": loss})

    assert verdicts(ckptmgr("prune", run.directory, "--keep-best", "val:loss:min:1", "--json")).keys() == {1, 2, 3}
    assert ckptmgr("prune", run.directory, "--keep-best", "val:loss:min:1", "--json").json["drop"][0]["step"] == 1


def test_only_one_series_is_looked_at(five: Run, ckptmgr: Call) -> None:
    five.start()
    for step in (1, 2):
        five.save(step, series="hf", layout=Format.HUGGINGFACE)
    five.journal.end_epoch(five.epoch)

    assert ckptmgr("prune", five.directory, "--keep-last", 1, "--series", "hf", "--apply").code == 0
    assert {(row["series"], row["step"]) for row in listed(ckptmgr, five.directory)} == {
        *(("checkpoint", step) for step in (100, 200, 300, 400, 500)),
        ("hf", 2),
    }
    assert (five.directory / "hf" / "hf-latest").readlink() == Path("hf-2")


def test_what_is_in_flight_and_what_it_overwrites_stays(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000)
    run.save(500, overwrite=True, until=S.WRITING)

    assert verdicts(ckptmgr("prune", run.directory, "--keep-last", 1, "--json")) == {
        500: ["being overwritten"],
        1000: ["last 1", "newest committed"],
    }


@pytest.mark.parametrize("apply", [[], ["--apply"]])
def test_the_last_good_one_stays_where_the_newest_is_damaged(five: Run, ckptmgr: Call, apply: list[str]) -> None:
    (five.directory / "checkpoint/step-500/model.bin").write_bytes(b"short")
    shutil.rmtree(five.directory / "checkpoint/step-400")
    done = ckptmgr("prune", five.directory, "--keep-last", 1, *apply, "--json")

    assert verdicts(done) == {
        100: [],
        200: [],
        300: ["newest that is safe"],
        400: [],
        500: ["last 1", "newest committed"],
    }
    assert ckptmgr("check", five.directory).code == 4


def test_there_may_be_nothing_to_prune(run: Run, ckptmgr: Call) -> None:
    run.journal.end_epoch(run.epoch)
    for words in ([], ["--apply"]):
        assert ckptmgr("prune", run.directory, "--keep-last", 1, *words).out == "nothing to prune\n"
    assert ckptmgr("prune", run.directory.with_name("other"), "--keep-last", 1).code == 10


# Carrying it out under the run lock


def test_apply_retires_as_a_manager_does(five: Run, ckptmgr: Call) -> None:
    done = ckptmgr("prune", five.directory, "--keep-last", 1, "--keep-best", "loss:min:1", "--apply")

    assert done.code == 0
    assert done.out.splitlines()[-1] == "retired 3 of 5 checkpoints, 3.1 kB"
    assert sorted(path.name for path in (five.directory / "checkpoint").iterdir()) == ["step-300", "step-500"]
    assert json.loads((five.directory / "meta.json").read_text())["checkpoint_list"] == [
        "checkpoint/step-300",
        "checkpoint/step-500",
    ]
    rows = {row["step"]: row for row in ckptmgr("ls", five.directory, "--all", "--json").json["checkpoints"]}
    assert [rows[step]["retirement"] for step in (100, 200, 300, 400, 500)] == [
        "retired", "retired", None, "retired", None,
    ]  # fmt: skip
    assert rows[100]["retire_reason"].startswith("no rule keeps it (last 1 | best 1 by loss (min)); `ckptmgr prune`")
    assert ckptmgr("check", five.directory, "--deep").code == 0
    assert ckptmgr("recover", five.directory).out == "nothing to recover\n"
    with Journal.open_read_only(five.journal_path) as journal:
        assert (journal.epochs()[-1].command, journal.epochs()[-1].ended_at is not None) == ("ckptmgr prune", True)
    assert requests_of(five.directory) == []


def test_a_full_disk_is_where_a_prune_is_needed(five: Run, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, first = durable.replace_file, five.directory / "checkpoint" / "step-100"

    def where_there_is_room(*args: Any, **kwargs: Any) -> None:
        if first.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*args, **kwargs)

    monkeypatch.setattr(durable, "replace_file", where_there_is_room)
    assert ckptmgr("prune", five.directory, "--keep-last", 1, "--apply").code == 0

    assert [path.name for path in (five.directory / "checkpoint").iterdir()] == ["step-500"]
    assert json.loads((five.directory / "meta.json").read_text())["checkpoint_list"] == ["checkpoint/step-500"]


def test_the_document_says_what_is_gone(five: Run, ckptmgr: Call) -> None:
    document = ckptmgr("prune", five.directory, "--keep-last", 2, "--apply", "--json").json

    assert (document["applied"], document["by"], document["bytes"]) == (True, None, 3 * SIZE)
    assert [(row["step"], row["gone"]) for row in document["drop"]] == [(100, True), (200, True), (300, True)]


def test_a_plan_without_anything_to_drop_takes_no_epoch(five: Run, ckptmgr: Call) -> None:
    before = five.journal_path.read_bytes()

    assert ckptmgr("prune", five.directory, "--keep-last", 9, "--apply").out.endswith("nothing to prune\n")
    assert five.journal_path.read_bytes() == before


@pytest.mark.parametrize("left", ["in flight", "retiring"])
def test_what_a_crash_left_comes_first(five: Run, ckptmgr: Call, left: str) -> None:
    five.start(pid=NO_PROCESS)
    if left == "in flight":
        five.save(600, until=S.WRITING)
    else:
        five.journal.mark_retiring([RetirementMark(1, "old")], epoch=five.epoch)
    before = everything(five.directory)
    done = ckptmgr("prune", five.directory, "--keep-last", 1, "--apply")

    assert done.code == 3
    assert f"ckptmgr recover {five.directory} --apply" in done.err
    assert everything(five.directory) == before
    assert "comes first" in ckptmgr("prune", five.directory, "--keep-last", 1).err
    assert ckptmgr("recover", five.directory, "--apply").code == 0
    assert ckptmgr("prune", five.directory, "--keep-last", 1, "--apply").code == 0
    assert [row["step"] for row in listed(ckptmgr, five.directory)] == [500]


def test_a_run_directory_that_is_not_there_costs_no_checkpoint(five: Run, ckptmgr: Call) -> None:
    away = five.directory.rename(five.directory.with_name("unmounted"))

    assert ckptmgr("prune", five.directory, "--keep-last", 1, "--apply").code == 2
    five.directory.mkdir()
    assert ckptmgr("prune", five.directory, "--keep-last", 1, "--apply").code == 10
    five.directory.rmdir()
    away.rename(five.directory)
    assert len(listed(ckptmgr, five.directory)) == 5


def test_a_rotten_manifest_is_set_aside_and_a_missing_directory_is_no_obstacle(five: Run, ckptmgr: Call) -> None:
    (five.directory / "checkpoint/step-100/ckptmgr.json").write_text("{")
    shutil.rmtree(five.directory / "checkpoint/step-200")

    assert ckptmgr("prune", five.directory, "--keep-last", 1, "--apply").code == 0
    names = sorted(path.name for path in (five.directory / "checkpoint").iterdir())
    assert names[-1] == "step-500"
    assert [name.endswith(".quarantined") for name in names] == [True, False]


def test_a_damaged_journal_lets_nothing_go(five: Run, ckptmgr: Call) -> None:
    import sqlite3

    five.journal.close()
    connection = sqlite3.connect(five.journal_path)
    connection.execute("UPDATE checkpoint SET commit_seq = 9 WHERE step = 100")
    connection.commit()
    connection.close()

    assert ckptmgr("prune", five.directory, "--keep-last", 1, "--apply").code == 5
    assert len(list((five.directory / "checkpoint").iterdir())) == 5


# A manager has it open


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "alpha"


def test_a_live_manager_prunes_and_goes_on_saving(trained: Path, ckptmgr: Call) -> None:
    with Trainer(trained) as trainer:
        trainer.tell("save 1 2 3 4 5")
        plan = ckptmgr("prune", trained, "--keep-last", 2)
        assert "--apply asks it" in plan.err
        document = ckptmgr("prune", trained, "--keep-last", 2, "--keep-best", "loss:max:1", "--apply", "--json").json
        assert document["by"].startswith(f"CheckpointManager, pid {trainer.process.pid}")
        assert {row["step"]: row["reasons"] for row in document["keep"]} == {
            1: ["best 1 by loss (max)"],
            4: ["last 2"],
            5: ["last 2", "newest committed"],
        }
        assert [(row["step"], row["gone"]) for row in document["drop"]] == [(2, True), (3, True)]
        assert sorted(path.name for path in (trained / "checkpoint").iterdir()) == ["step-1", "step-4", "step-5"]
        # What is gone can be saved again.
        trainer.tell("save 2 6")
        assert [row["step"] for row in listed(ckptmgr, trained)] == [1, 4, 5, 2, 6]
        with Journal.open_read_only(trained.with_name("alpha.journal.db")) as journal:
            assert len(journal.epochs()) == 1
    assert ckptmgr("check", trained, "--deep").code == 0
    assert ckptmgr("recover", trained).out == "nothing to recover\n"


def test_pruning_a_manager_that_saves_all_the_time(trained: Path, ckptmgr: Call) -> None:
    with Trainer(trained) as trainer:
        trainer.tell("save 1 2 3")
        trainer.tell("saving")
        for _ in range(5):
            time.sleep(0.2)
            done = ckptmgr("prune", trained, "--keep-last", 1, "--keep-every", 1_000_000, "--apply", "--json")
            assert done.code == 0, done
            assert len([row for row in done.json["keep"] if row["step"] != 1_000_000]) == 1
        trainer.tell("save 7")
    left = {row["step"] for row in listed(ckptmgr, trained)}
    assert {1_000_000, 7} <= left
    assert not {1, 2, 3} & left
    check = ckptmgr("check", trained, "--deep")
    assert (check.code, "R014" in check.out, "R008" in check.out) == (0, False, False)
    assert ckptmgr("recover", trained).out == "nothing to recover\n"
    assert {path.name for path in (trained / "checkpoint").iterdir()} == {f"step-{step}" for step in left}


def test_two_commands_at_once_are_both_answered(trained: Path, ckptmgr: Call) -> None:
    with Trainer(trained) as trainer:
        trainer.tell("save 1 2 3 4 5 6")
        done = []
        rules = [("--keep-last", "4"), ("--keep-every", "3"), ("--keep-last", "3")]
        threads = [
            threading.Thread(target=lambda rule=rule: done.append(in_child("prune", trained, *rule, "--apply")))
            for rule in rules
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [one.code for one in done] == [0, 0, 0]
        assert [row["step"] for row in listed(ckptmgr, trained)] in ([6], [3, 6])
    assert requests_of(trained) == []


def test_what_was_resumed_from_is_not_pruned(trained: Path, ckptmgr: Call) -> None:
    with Trainer(trained) as trainer:
        trainer.tell("save 1 2 3")
    with Trainer(trained) as trainer:
        trainer.tell("resume 1")
        document = ckptmgr("prune", trained, "--keep-last", 1, "--apply", "--json").json
        assert {row["step"]: row["reasons"] for row in document["keep"]} == {
            1: ["resumed from, not superseded yet"],
            3: ["last 1", "newest committed"],
        }


def test_a_live_manager_keeps_the_last_good_one_too(trained: Path, ckptmgr: Call) -> None:
    with Trainer(trained) as trainer:
        trainer.tell("save 1 2 3")
        (trained / "checkpoint/step-3/.metadata").write_bytes(b"")
        document = ckptmgr("prune", trained, "--keep-last", 1, "--apply", "--json").json
        assert {row["step"]: row["reasons"] for row in document["keep"]} == {
            2: ["newest that is safe"],
            3: ["last 1", "newest committed"],
        }


def test_a_busy_manager_ends_with_11_and_prunes_nothing_later(trained: Path, ckptmgr: Call) -> None:
    with Trainer(trained) as trainer:
        trainer.tell("save 1")
        trainer.tell("hooks 4")
        trainer.begin("save 2")
        deadline = time.monotonic() + 30
        while len(listed(ckptmgr, trained)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        done = in_child("prune", trained, "--keep-last", "1", "--apply", "--timeout", "1")
        assert done.code == 11
        assert f"CheckpointManager, pid {trainer.process.pid}" in done.err
        assert "nothing was changed" in done.err
        trainer.wait_for("did save 2")
        trainer.tell("hooks 0")
        trainer.tell("save 3")
        assert [row["step"] for row in listed(ckptmgr, trained)] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["what a command wants to be rid of is marked", "a request is done and nobody has said so"]
)
def test_a_manager_that_dies_before_it_answers_leaves_the_truth_in_the_journal(
    trained: Path, ckptmgr: Call, place: str
) -> None:
    with Trainer(trained, die_at=place) as trainer:
        trainer.tell("save 1 2 3")
        done = in_child("prune", trained, "--keep-last", "1", "--apply")
        assert trainer.ended() == 73
    assert (done.code, done.out) == (3, "")
    assert f"ckptmgr recover {trained} --apply" in done.err
    assert ckptmgr("why", trained, 1, "--json").json["attempts"][0]["verdict"] == "retiring"
    assert ckptmgr("recover", trained, "--apply").code == 0
    assert [row["step"] for row in listed(ckptmgr, trained)] == [3]
    assert sorted(path.name for path in (trained / "checkpoint").iterdir()) == ["step-3"]
    with Trainer(trained) as trainer:
        trainer.tell("save 4")
    assert requests_of(trained) == []


def test_a_manager_that_ends_while_it_is_asked_leaves_the_prune_to_the_command(trained: Path, ckptmgr: Call) -> None:
    with Trainer(trained, look_every_s=1000) as trainer:
        trainer.tell("save 1 2 3")
        with start("prune", trained, "--keep-last", 1, "--apply", "--json") as child:
            wait_for_a_request(trained)
            trainer.tell("close")
            out, _ = child.communicate(timeout=60)
    document = json.loads(out)

    assert (child.returncode, document["by"]) == (0, None)
    assert [row["step"] for row in document["drop"]] == [1, 2]
    assert [row["step"] for row in listed(ckptmgr, trained)] == [3]
