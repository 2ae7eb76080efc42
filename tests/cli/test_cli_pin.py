"""``ckptmgr pin`` and ``unpin``, under the run lock and by asking a manager that saves all the time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from live_trainer import Trainer
from run_on_disk import Call, Done, Run, S, in_child, start

from ckptmgr import requests
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import RetirementMark


@pytest.fixture
def idle(run: Run) -> Run:
    """A run with two checkpoints that nobody has open."""
    run.save(500)
    run.save(1000)
    run.journal.end_epoch(run.epoch)
    run.journal.close()
    return run


def pins(run: Path) -> dict[int, str]:
    with Journal.open_read_only(run.with_name(f"{run.name}.journal.db")) as journal:
        live = journal.checkpoints(live_only=True)
        return {one.step: pin.note for one in live if (pin := journal.pin_of(one.series, one.step)) is not None}


def requests_of(run: Path) -> list[str]:
    folder = run / requests.DIRECTORY
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def wait_for_a_request(run: Path) -> None:
    deadline = time.monotonic() + 30
    while not any(name.endswith(".asked") and not name.startswith(".") for name in requests_of(run)):
        assert time.monotonic() < deadline, "nothing was asked"
        time.sleep(0.01)


# Nobody has the run open


def test_pinning_and_unpinning_say_what_they_did_and_do_it_once(idle: Run, ckptmgr: Call) -> None:
    done = ckptmgr("pin", idle.directory, 500, "--note", "shipped")

    assert (done.code, done.out, done.err) == (0, "checkpoint step 500 is pinned: shipped\n", "")
    assert pins(idle.directory) == {500: "shipped"}
    with Journal.open_read_only(idle.journal_path) as journal:
        newest = journal.epochs()[-1]
        assert (newest.command, newest.ended_at is not None) == ("ckptmgr pin", True)

    again = ckptmgr("pin", idle.directory, 500, "--json").json

    assert (again["changed"], again["note"], again["by"]) == (False, "shipped", None)
    assert ckptmgr("pin", idle.directory, 500).out == "checkpoint step 500 is pinned already: shipped\n"
    assert "another note now" in ckptmgr("pin", idle.directory, 500, "--note", "").out
    assert pins(idle.directory) == {500: ""}
    assert ckptmgr("unpin", idle.directory, 500).out == "checkpoint step 500 is not pinned any more\n"
    assert pins(idle.directory) == {}
    assert ckptmgr("unpin", idle.directory, 500).out == "checkpoint step 500 was not pinned\n"
    assert ckptmgr("unpin", idle.directory, 500, "--json").json["changed"] is False


def test_what_changes_nothing_leaves_no_trace(idle: Run, ckptmgr: Call) -> None:
    ckptmgr("pin", idle.directory, 500)
    before = idle.journal_path.read_bytes()
    ckptmgr("pin", idle.directory, 500)
    ckptmgr("unpin", idle.directory, 1000)

    assert idle.journal_path.read_bytes() == before
    assert requests_of(idle.directory) == []


@pytest.mark.parametrize("state", ["FAILED", "WRITING", "retiring", "never saved"])
def test_only_a_live_checkpoint_can_be_pinned(run: Run, ckptmgr: Call, state: str) -> None:
    first = run.save(500)
    if state == "retiring":
        run.journal.mark_retiring([RetirementMark(first.id, "old")], epoch=run.epoch)
    elif state != "never saved":
        run.save(1000, until=S(state))
    step = {"retiring": 500, "never saved": 7}.get(state, 1000)
    done = ckptmgr("pin", run.directory, step)

    assert (done.code, done.out) == (3, "")
    assert (f"is {state}" in done.err) == (state != "never saved")
    document = ckptmgr("pin", run.directory, step, "--json").json
    assert (document["error"]["type"], document["error"]["exit_code"]) == ("CheckpointNotFound", 3)
    assert ckptmgr("unpin", run.directory, step).code == (3 if state == "never saved" else 0)


@pytest.mark.parametrize(
    "words", [["--note", "x" * 1001], ["--timeout", "0"], ["--timeout", "nan"], ["--timeout", "x"]]
)
def test_what_makes_no_sense_ends_with_2(idle: Run, ckptmgr: Call, words: list[str]) -> None:
    assert ckptmgr("pin", idle.directory, 500, *words).code == 2
    assert pins(idle.directory) == {}


@pytest.mark.parametrize("command", ["pin", "unpin"])
def test_another_command_that_has_the_run_is_not_asked(idle: Run, ckptmgr: Call, command: str) -> None:
    if command == "unpin":
        ckptmgr("pin", idle.directory, 500)
    before = pins(idle.directory)
    idle.rundir.acquire("ckptmgr recover")
    try:
        began = time.monotonic()
        done = ckptmgr(command, idle.directory, 500)
    finally:
        idle.rundir.release()

    assert time.monotonic() - began < 30, "it waited for somebody who answers nobody"
    assert done.code == 11
    assert f"in use by ckptmgr recover, pid {os.getpid()}" in done.err
    assert (pins(idle.directory), requests_of(idle.directory)) == (before, [])


def test_a_manager_that_never_answers_ends_with_11_and_the_request_is_withdrawn(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.rundir.acquire("CheckpointManager")
    try:
        done = ckptmgr("pin", run.directory, 500, "--timeout", "0.5")
    finally:
        run.rundir.release()

    assert done.code == 11
    for part in ("in use by CheckpointManager", f"pid {os.getpid()}", "did not answer within 0.5 s", "--timeout"):
        assert part in done.err
    assert (pins(run.directory), requests_of(run.directory)) == ({}, [])


def test_a_manager_that_takes_a_request_and_says_nothing_is_not_waited_for_for_ever(
    run: Run, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptmgr.cli import asking

    monkeypatch.setattr(asking, "GRACE_S", 0.2)
    monkeypatch.setattr(requests, "withdraw", lambda *_: False)
    run.save(500)
    run.rundir.acquire("CheckpointManager")
    try:
        done = ckptmgr("pin", run.directory, 500, "--timeout", "0.2")
    finally:
        run.rundir.release()

    assert done.code == 11
    assert "took the request" in done.err


# A manager has it open


def test_a_manager_is_asked_and_the_pin_holds_while_it_saves_all_the_time(tmp_path: Path, ckptmgr: Call) -> None:
    run = tmp_path / "runs" / "alpha"
    with Trainer(run, keep="KeepLast(2)") as trainer:
        trainer.tell("save 1 2")
        assert ckptmgr("pin", run, 1, "--note", "first").code == 0
        trainer.tell("saving")
        kept = [1]
        outcomes = set()
        for _ in range(6):
            step = max(row["step"] for row in listed(ckptmgr, run))
            done = ckptmgr("pin", run, step)
            outcomes.add(done.code)
            # It may have been let go before it was pinned, which is said.
            assert done.code == 0 or (done.code == 3 and ("retiring" in done.err or "refused" in done.err)), done
            kept += [step] * (done.code == 0)
            assert set(kept) <= {row["step"] for row in listed(ckptmgr, run)}
        while max(row["step"] for row in listed(ckptmgr, run)) < max(kept) + 5:
            time.sleep(0.05)
        left = {row["step"]: row["pinned"] for row in listed(ckptmgr, run)}
        assert {step for step, pinned in left.items() if pinned} == set(kept)
        for step in set(kept[1:]):
            assert ckptmgr("unpin", run, step).code == 0
        trainer.tell("save 5000000 5000001 5000002")
        assert [row["step"] for row in listed(ckptmgr, run)] == [1, 5000001, 5000002]
        assert 0 in outcomes
    assert requests_of(run) == []
    with Journal.open_read_only(run.with_name("alpha.journal.db"), whole=True) as journal:
        assert {epoch.command for epoch in journal.epochs()} == {"live_trainer.py"}
    assert ckptmgr("check", run, "--deep").code == 0
    assert ckptmgr("recover", run).out == "nothing to recover\n"


def listed(ckptmgr: Call, run: Path) -> list[dict]:
    """What is live."""
    rows = ckptmgr("ls", run, "--json").json["checkpoints"]
    return [row for row in rows if row["state"] == "COMMITTED" and row["retirement"] is None]


def test_a_command_that_dies_while_it_waits_gets_nothing_done(tmp_path: Path, ckptmgr: Call) -> None:
    run = tmp_path / "alpha"
    with Trainer(run) as trainer:
        trainer.tell("save 1")
        trainer.tell("hooks 3")
        trainer.begin("save 2")
        deadline = time.monotonic() + 30
        while len(listed(ckptmgr, run)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with start("pin", run, 1) as child:
            wait_for_a_request(run)
            child.kill()
        trainer.wait_for("did save 2")
        deadline = time.monotonic() + 30
        while requests_of(run):
            assert time.monotonic() < deadline, requests_of(run)
            time.sleep(0.02)
        assert pins(run) == {}
        trainer.tell("hooks 0")
        assert in_child("pin", run, 1).code == 0


def test_an_interrupted_command_takes_its_request_back(tmp_path: Path) -> None:
    run = tmp_path / "alpha"
    with Trainer(run, look_every_s=1000) as trainer:
        trainer.tell("save 1")
        with start("pin", run, 1) as child:
            wait_for_a_request(run)
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=30)
        assert Done(child.returncode, out, err.splitlines()[-1]) == Done(130, "", "ckptmgr: interrupted")
        assert requests_of(run) == []
        assert pins(run) == {}


def test_a_manager_that_ends_meanwhile_leaves_it_to_the_command(tmp_path: Path) -> None:
    run = tmp_path / "alpha"
    with Trainer(run, look_every_s=1000) as trainer:
        trainer.tell("save 1")
        with start("pin", run, 1, "--json") as child:
            wait_for_a_request(run)
            trainer.kill()
            out, _ = child.communicate(timeout=30)
    assert child.returncode == 0
    assert '"by": null' in out
    assert (pins(run), requests_of(run)) == ({1: ""}, [])
