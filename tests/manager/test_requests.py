"""What a manager does with what commands ask of it, and with what nobody asks of it any more."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opened_managers import Open, Pause

from ckptmgr import DCP, CheckpointManager, HuggingFace, KeepAll, KeepLast, Permissions, Series, commit, requests
from ckptmgr.errors import InvalidArgument
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import Verified
from ckptmgr.requests import PIN, PRUNE, UNPIN, VERIFY, Answer, Request

NOBODY = 2**22 + 1
DIFFERS = ("digest: __0_0.distcp has other bytes than were committed",)
Asked = Callable[..., Request]


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "LOOK_EVERY_S", 0.02)


@pytest.fixture
def keeping(open_manager: Open) -> Callable[..., CheckpointManager]:
    """Opens a manager of one series."""
    return lambda keep=None: open_manager(series=[Series("checkpoint", DCP(), keep=keep or KeepAll())])


def state(step: int) -> dict[str, Any]:
    return {"t": torch.full((10,), float(step)), "step": step}


def save(manager: CheckpointManager, *steps: int, **options: Any) -> None:
    for step in steps:
        pending = manager.save(step, state(step), **options)
        assert pending is not None
        pending.wait()


def request(kind: str, **facts: Any) -> Request:
    now = time.time()
    who = {"epoch": 1, "host": socket.gethostname(), "pid": os.getpid(), "asked_at": now, "deadline": now + 30}
    return Request(**{"kind": kind, "series": "checkpoint", **who, **facts})


def ask(manager: CheckpointManager, kind: str, **facts: Any) -> Request:
    asked = request(kind, **facts)
    requests.ask(manager.path, asked, Permissions())
    return asked


def answer(manager: CheckpointManager, asked: Request, within_s: float = 20) -> Answer:
    deadline = time.monotonic() + within_s
    while (found := requests.answer_to(manager.path, asked.id)) is None:
        assert time.monotonic() < deadline, "no answer"
        time.sleep(0.01)
    return found


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / requests.DIRECTORY).iterdir())


def wait_for_files(run: Path, *names: str) -> None:
    """What was taken is removed after the answer has come."""
    deadline = time.monotonic() + 20
    while files(run) != list(names):
        assert time.monotonic() < deadline, files(run)
        time.sleep(0.01)


def live(run: Path) -> list[int]:
    with Journal.open_read_only(run.with_name("run.journal.db")) as journal:
        return [record.step for record in journal.checkpoints(live_only=True)]


def verified(run: Path) -> list[tuple[int, bool, tuple[str, ...]]]:
    """What the journal says of the bytes of each attempt, oldest first."""
    with Journal.open_read_only(run.with_name("run.journal.db")) as journal:
        found = [one for record in journal.checkpoints() for one in journal.verifications(record.id)]
    assert {one.level for one in found} <= {"digest"}
    return [(one.checkpoint_id, one.ok, one.mismatches) for one in found]


def wait_until_deleted(run: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        with Journal.open_read_only(run.with_name("run.journal.db")) as journal:
            left = [one.step for one in journal.standing() if one.retire_started_at is not None]
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_what_is_asked_for_is_let_go_and_the_manager_knows(keeping, run_dir: Path) -> None:
    manager = keeping()
    save(manager, 1, 2, 3, 4)
    done = answer(manager, ask(manager, PRUNE, rule=KeepLast(2)))
    wait_until_deleted(run_dir)

    assert (done.outcome, done.keep) == ("done", {3: ("last 2",), 4: ("last 2", "newest committed")})
    assert done.drop == dict.fromkeys(
        (1, 2), f"no rule keeps it (last 2); `ckptmgr prune` of pid {os.getpid()} on {socket.gethostname()}"
    )
    assert live(run_dir) == [3, 4]
    assert sorted(path.name for path in (run_dir / "checkpoint").iterdir()) == ["step-3", "step-4"]
    assert json.loads((run_dir / "meta.json").read_text())["checkpoint_list"] == [
        "checkpoint/step-3",
        "checkpoint/step-4",
    ]
    # A step that is gone can be saved again, and resume reads what is left.
    save(manager, 1)
    assert manager.resume(state(0)).step == 1
    wait_for_files(run_dir)


def test_pins_are_set_and_taken_back_and_hold(keeping, run_dir: Path) -> None:
    manager = keeping(KeepLast(1))
    save(manager, 1)
    assert answer(manager, ask(manager, PIN, step=1, note="mine")).text == "pinned"
    save(manager, 2, 3)
    assert answer(manager, ask(manager, PRUNE, rule=KeepLast(1))).keep[1] == ("pinned",)
    assert live(run_dir) == [1, 3]
    assert answer(manager, ask(manager, UNPIN, step=1)).text == "unpinned"
    assert answer(manager, ask(manager, UNPIN, step=1)).text == "was not pinned"
    save(manager, 4)

    assert live(run_dir) == [4]


def test_the_plan_of_a_save_under_way_is_out_of_date_when_something_was_let_go(
    keeping, run_dir: Path, paused_writer: Pause, caplog: pytest.LogCaptureFixture
) -> None:
    """Its keep rule was asked ahead, and would let go again what is being retired already."""
    manager = keeping(KeepLast(2))
    save(manager, 1, 2)
    with paused_writer(manager):
        pending = manager.save(3, state(3))
        deadline = time.monotonic() + 20
        while not list(run_dir.glob("checkpoint/.step-3*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)  # for the plan ahead
        assert answer(manager, ask(manager, PRUNE, rule=KeepLast(1))).drop.keys() == {1}
    pending.wait()

    assert live(run_dir) == [2, 3]
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_what_a_save_under_way_overwrites_is_not_let_go(keeping, run_dir: Path, paused_writer: Pause) -> None:
    manager = keeping()
    save(manager, 1, 2)
    with paused_writer(manager):
        pending = manager.save(1, state(10), overwrite=True)
        deadline = time.monotonic() + 20
        while not list(run_dir.glob("checkpoint/.step-1*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        done = answer(manager, ask(manager, PRUNE, rule=KeepLast(1)))
    pending.wait()

    assert (done.keep[1], done.drop) == (("being overwritten",), {})
    assert live(run_dir) == [2, 1]


def test_nothing_is_let_go_between_the_plan_of_a_commit_and_the_commit(
    keeping, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = keeping(KeepLast(2))
    save(manager, 1, 2)
    asked: list[Request] = []
    planned = manager._leader._planned

    def slowly(*args: Any) -> Any:
        found = planned(*args)
        asked.append(ask(manager, PRUNE, rule=KeepLast(1)))
        time.sleep(0.5)
        return found

    monkeypatch.setattr(manager._leader, "_planned", slowly)
    save(manager, 3)

    assert answer(manager, asked[0]).drop.keys() == {2}
    assert live(run_dir) == [3]
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_no_save_begins_to_overwrite_what_is_just_let_go(
    keeping, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = keeping()
    save(manager, 1, 2)
    looked = threading.Event()
    in_flight = manager._journal.in_flight

    def slowly(series: str) -> Any:
        found = in_flight(series)
        if threading.current_thread().name == commit.AFTER_COMMIT:
            looked.set()
            time.sleep(0.5)
        return found

    monkeypatch.setattr(manager._journal, "in_flight", slowly)
    asked = ask(manager, PRUNE, rule=KeepLast(1))
    assert looked.wait(20)
    save(manager, 1, overwrite=True)

    assert answer(manager, asked).drop.keys() == {1}
    with Journal.open_read_only(run_dir.with_name("run.journal.db")) as journal:
        assert [(record.step, record.overwrites) for record in journal.checkpoints(live_only=True)] == [
            (2, None), (1, None),
        ]  # fmt: skip


def test_what_was_resumed_from_stays_until_it_is_superseded(keeping, run_dir: Path) -> None:
    manager = keeping()
    save(manager, 1, 2, 3)
    manager.resume(state(0), 1)
    done = answer(manager, ask(manager, PRUNE, rule=KeepLast(1)))

    assert (done.keep[1], done.drop.keys()) == (("resumed from, not superseded yet",), {2})
    save(manager, 4)
    assert answer(manager, ask(manager, PRUNE, rule=KeepLast(1))).drop.keys() == {1, 3}


def test_nothing_is_let_go_while_somebody_reads(keeping, run_dir: Path) -> None:
    manager = keeping()
    save(manager, 1, 2)
    with manager._leader.resuming():
        asked = ask(manager, PRUNE, rule=KeepLast(1))
        # A pin is answered meanwhile, so the manager has looked.
        answer(manager, ask(manager, PIN, step=2))
        answer(manager, ask(manager, PIN, step=2))
        assert f"{asked.id}.asked" in files(run_dir)

    assert answer(manager, asked).drop.keys() == {1}


@pytest.mark.parametrize(
    "facts",
    [{"epoch": 0}, {"pid": NOBODY}, {"deadline": time.time() - 1}],
    ids=["to an older epoch", "of a dead command", "past its time"],
)
def test_what_nobody_waits_for_is_never_carried_out(keeping, run_dir: Path, facts: dict[str, Any]) -> None:
    manager = keeping()
    save(manager, 1, 2)
    ask(manager, PRUNE, rule=KeepLast(1), **facts)
    wait_for_files(run_dir)

    assert live(run_dir) == [1, 2]


def test_what_was_verified_is_recorded_and_the_log_names_the_damage(
    keeping, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = keeping()
    save(manager, 1, 2)
    done = answer(manager, ask(manager, VERIFY, verified=(Verified(2, False, DIFFERS), Verified(1, True))))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]

    assert done == Answer("done", "recorded")
    assert verified(run_dir) == [(1, True, ()), (2, False, DIFFERS)]
    asked_by = f"`ckptmgr verify` of pid {os.getpid()} on {socket.gethostname()}"
    assert warnings == [f"checkpoint is damaged at step 2, as {asked_by} has found"]
    answer(manager, ask(manager, VERIFY, verified=(Verified(2, True),)))
    assert verified(run_dir)[-1] == (2, True, ())
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == warnings


def test_what_was_verified_is_recorded_while_somebody_reads_and_after_it_was_let_go(keeping, run_dir: Path) -> None:
    manager = keeping(KeepLast(1))
    save(manager, 1, 2)
    wait_until_deleted(run_dir)
    with manager._leader.resuming():
        done = answer(manager, ask(manager, VERIFY, verified=(Verified(1, False, DIFFERS), Verified(2, True))))

    assert done.outcome == "done"
    assert verified(run_dir) == [(1, False, DIFFERS), (2, True, ())]


def test_what_was_verified_of_a_series_that_is_not_saved_any_more_is_recorded(
    open_manager: Open, keeping, run_dir: Path
) -> None:
    earlier = open_manager(series=[Series("old", DCP())])
    earlier.save(1, state(1), "old").wait()
    earlier.close()
    manager = keeping()
    done = answer(manager, ask(manager, VERIFY, series="old", verified=(Verified(1, True),), epoch=2))

    assert done == Answer("done", "recorded")
    assert verified(run_dir) == [(1, True, ())]


def test_what_was_verified_is_recorded_together_or_not_at_all(
    open_manager: Open, run_dir: Path, paused_writer: Pause
) -> None:
    manager = open_manager(series=[Series("checkpoint", DCP(), keep=KeepAll()), Series("other", DCP())])
    save(manager, 1)
    manager.save(1, state(1), "other").wait()
    with paused_writer(manager):
        pending = manager.save(2, state(2))
        deadline = time.monotonic() + 20
        while not list(run_dir.glob("checkpoint/.step-2*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        refused = {
            id: answer(manager, ask(manager, VERIFY, verified=(Verified(1, True), Verified(id, True))))
            for id in (2, 3, 4, 10**18 - 1)
        }
    pending.wait()

    assert {done.outcome for done in refused.values()} == {"refused"}
    assert {id: done.text.partition(":")[0] for id, done in refused.items()} == {
        2: "InvalidArgument",  # of another series
        3: "InvalidArgument",  # not committed
        4: "CheckpointNotFound",
        10**18 - 1: "CheckpointNotFound",
    }
    assert verified(run_dir) == []
    assert answer(manager, ask(manager, VERIFY, verified=(Verified(1, True),))).outcome == "done"
    assert answer(manager, ask(manager, VERIFY, series="other", verified=(Verified(2, True),))).outcome == "done"
    wait_for_files(run_dir)


def test_a_request_to_the_manager_that_takes_over_is_left_to_it(keeping, run_dir: Path) -> None:
    manager = keeping()
    save(manager, 1, 2)
    asked = ask(manager, PRUNE, rule=KeepLast(1), epoch=2)
    answer(manager, ask(manager, PIN, step=2))
    answer(manager, ask(manager, PIN, step=2))

    wait_for_files(run_dir, f"{asked.id}.asked")
    manager.close()
    later = keeping()
    assert answer(later, asked).drop.keys() == {1}


@pytest.mark.parametrize("kind", [PRUNE, PIN, UNPIN, VERIFY])
def test_a_manager_of_an_older_epoch_changes_nothing(keeping, run_dir: Path, kind: str) -> None:
    manager = keeping()
    save(manager, 1, 2)
    with Journal.open(run_dir.with_name("run.journal.db")) as journal:
        journal.begin_epoch(host="elsewhere", pid=1, command="train.py", versions={})
        if kind == UNPIN:
            journal.pin("checkpoint", 1)
    facts = {PRUNE: {"rule": KeepLast(1)}, VERIFY: {"verified": (Verified(1, True),)}}
    done = answer(manager, ask(manager, kind, **facts.get(kind, {"step": 1})))

    assert (done.outcome, done.text.partition(":")[0]) == ("refused", "StaleWriter")
    assert (live(run_dir), verified(run_dir)) == ([1, 2], [])
    with Journal.open_read_only(run_dir.with_name("run.journal.db")) as journal:
        assert [record.pinned for record in journal.checkpoints()] == [kind == UNPIN, False]


@pytest.mark.parametrize(
    ("kind", "facts", "why"),
    [
        (PIN, {"step": 7}, "CheckpointNotFound"),
        (PIN, {"step": 1, "series": "other"}, "InvalidArgument: there is no series 'other'"),
        (PRUNE, {"rule": KeepLast(1), "series": "../checkpoint"}, "InvalidArgument: there is no series"),
        (
            VERIFY,
            {"verified": (Verified(1, True),), "series": "other"},
            "InvalidArgument: attempt 1 is no checkpoint of",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(keeping, kind: str, facts: dict[str, Any], why: str) -> None:
    manager = keeping()
    save(manager, 1)
    done = answer(manager, ask(manager, kind, **facts))

    assert (done.outcome, done.text[: len(why)]) == ("refused", why)


def test_what_is_no_request_is_refused(keeping, run_dir: Path) -> None:
    manager = keeping()
    folder = run_dir / requests.DIRECTORY
    folder.mkdir()
    (folder / "new").write_bytes(b'{"kind": "prune"}')
    (folder / "new").rename(folder / f"{'0' * 32}.asked")
    (folder / "README").write_text("not ours")
    deadline = time.monotonic() + 20
    while (found := requests.answer_to(run_dir, "0" * 32)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)

    assert found.outcome == "refused"
    assert answer(manager, ask(manager, PIN, step=1)).outcome == "refused"
    wait_for_files(run_dir, "README")


@pytest.mark.parametrize("kind", ["directory", "link", "pipe", "disk"])
def test_what_can_never_be_read_keeps_nobody_waiting(
    keeping, run_dir: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "LOOK_AGAIN_S", 0.02)
    manager = keeping()
    folder, odd = run_dir / requests.DIRECTORY, f"{'0' * 32}.asked"
    folder.mkdir()
    read = requests.read

    def failing(run: Path, id: str) -> requests.Request | None:
        if id == "0" * 32:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(run, id)

    if kind == "directory":
        (folder / odd).mkdir()
    elif kind == "link":
        (folder / odd).symlink_to("/etc/passwd")
    elif kind == "pipe":
        os.mkfifo(folder / odd)
    else:
        monkeypatch.setattr(requests, "read", failing)
        (folder / odd).write_text("{}")
    save(manager, 1)

    assert answer(manager, ask(manager, PIN, step=1)).outcome == "done"
    if kind != "disk":
        assert "cannot be read" in answer(manager, request(PIN, step=1, id="0" * 32)).text
        assert odd not in files(run_dir)


def test_a_disk_that_refuses_ends_nothing(keeping, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "LOOK_AGAIN_S", 0.02)
    manager = keeping()
    folder = run_dir / requests.DIRECTORY
    folder.write_text("a file where the directory belongs")
    save(manager, 1, 2)
    folder.unlink()

    assert answer(manager, ask(manager, PRUNE, rule=KeepLast(1))).drop.keys() == {1}


def test_a_request_that_is_taken_back_between_being_read_and_being_taken_is_not_carried_out(
    keeping, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = keeping()
    save(manager, 1, 2)
    read, withdrawn = requests.read, threading.Event()

    def read_and_lose(run: Path, id: str) -> requests.Request | None:
        found = read(run, id)
        if not withdrawn.is_set():
            assert requests.withdraw(run, id)
            withdrawn.set()
        return found

    monkeypatch.setattr(requests, "read", read_and_lose)
    ask(manager, PRUNE, rule=KeepLast(1))
    assert withdrawn.wait(20)
    assert answer(manager, ask(manager, PIN, step=2)).outcome == "done"

    assert live(run_dir) == [1, 2]


def test_what_an_earlier_manager_left_is_swept_away_at_start(keeping, run_dir: Path) -> None:
    keeping().close()
    folder = run_dir / requests.DIRECTORY
    folder.mkdir()
    left = [f"{'1' * 32}.taken", f"{'2' * 32}.answered", f".{'3' * 32}.withdrawn", f".{'4' * 32}.asked.new"]
    kept = [f".{'5' * 32}.asked.new", "README"]
    for name in left + kept:
        (folder / name).write_text("{}")
    (folder / f"{'0' * 32}.taken").mkdir()
    an_hour_ago = time.time() - requests.BEGUN_S - 1
    os.utime(folder / left[-1], (an_hour_ago, an_hour_ago))
    keeping()

    # A command may be about to rename the one that has just been begun.
    assert files(run_dir) == sorted([*kept, f"{'0' * 32}.taken"])


def test_of_taking_and_withdrawing_one_happens(run_dir: Path) -> None:
    run_dir.mkdir()
    first, second = request(PIN, step=1), request(PIN, step=2)
    for one in (first, second):
        requests.ask(run_dir, one, Permissions())

    assert requests.withdraw(run_dir, first.id)
    assert not requests.take(run_dir, first.id)
    assert requests.take(run_dir, second.id)
    assert not requests.withdraw(run_dir, second.id)
    assert not requests.withdraw(run_dir, second.id)
    assert (requests.read(run_dir, first.id), requests.waiting(run_dir)) == (None, [])


def test_exports_are_pruned_and_the_link_stays(open_manager: Open, run_dir: Path) -> None:
    manager = open_manager(series=[Series("hf", HuggingFace(assets=()))])
    for step in (1, 2):
        manager.save(step, {"model": torch.nn.Linear(2, 2)}, "hf").wait()
    assert answer(manager, ask(manager, PRUNE, series="hf", rule=KeepLast(1))).drop.keys() == {1}
    wait_until_deleted(run_dir)

    assert (run_dir / "hf" / "hf-latest").readlink() == Path("hf-2")


@pytest.mark.parametrize(
    "rule", [KeepLast(3), KeepLast(1) | commit.retention.KeepBest(2, "loss", "max") | commit.retention.KeepFor(1.5)]
)
def test_a_request_says_the_same_when_it_is_read_again(rule: Any) -> None:
    asked = request(PRUNE, rule=rule)
    again = requests.parse_request(asked.to_json(), asked.id)

    assert again.rule.parts == rule.parts
    assert (again.deadline, again.epoch, again.series) == (asked.deadline, asked.epoch, asked.series)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "erase"},
        {"rule": []},
        {"rule": None},
        {"rule": [{"rule": "all"}]},
        {"rule": [{"rule": "last", "n": 0}]},
        {"rule": [{"rule": "last", "n": True}]},
        {"rule": [{"rule": "last"}]},
        {"rule": [{"rule": "last", "n": 1, "__class__": 1}]},
        {"rule": [{"rule": "best", "n": 1, "metric": "loss", "mode": "most"}]},
        {"rule": [{"rule": "for", "hours": 1e999}]},
        {"epoch": -1},
        {"epoch": 10**30},
        {"pid": 1.5},
        {"deadline": "soon"},
        {"series": ""},
        {"series": "\ud800"},
        {"host": None},
        {"host": "a\x1b[2J"},
        {"safe": "1"},
    ],
    ids=str,
)
def test_what_is_not_all_of_a_request_is_none(change: dict[str, Any]) -> None:
    body = {**json.loads(request(PRUNE, rule=KeepLast(1)).to_json()), **change}
    with pytest.raises(InvalidArgument):
        requests.parse_request(json.dumps(body).encode(), "0" * 32)


def test_what_was_verified_is_the_same_when_it_is_read_again() -> None:
    most = ("\U0001f4a5" * requests.LONGEST_MISMATCH,) * requests.MOST_MISMATCHES
    several = (Verified(1, True, after=7), Verified(10**18 - 1, False, ("missing: a\nb",)), Verified(2, False, most))
    asked = request(VERIFY, verified=several)

    assert requests.parse_request(asked.to_json(), asked.id) == asked
    many = tuple(Verified(id, True) for id in range(1, requests.MOST_VERIFIED + 1))
    assert requests.parse_request(request(VERIFY, verified=many).to_json(), "0" * 32).verified == many


_FOUND = {"checkpoint_id": 1, "ok": False, "mismatches": ["digest: a"]}


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        {},
        [1],
        [_FOUND, _FOUND],
        [{"checkpoint_id": id, "ok": True, "mismatches": []} for id in range(1, requests.MOST_VERIFIED + 2)],
        [{**_FOUND, "checkpoint_id": 0}],
        [{**_FOUND, "checkpoint_id": True}],
        [{**_FOUND, "checkpoint_id": 1.0}],
        [{**_FOUND, "checkpoint_id": 10**18}],
        [{**_FOUND, "ok": 0}],
        [{**_FOUND, "ok": None}],
        [{**_FOUND, "ok": True}],
        [{**_FOUND, "mismatches": []}],
        [{**_FOUND, "after": -1}],
        [{**_FOUND, "after": True}],
        [{**_FOUND, "after": "1"}],
        [{**_FOUND, "mismatches": "digest: a"}],
        [{**_FOUND, "mismatches": [1]}],
        [{**_FOUND, "mismatches": ["digest: \udcff"]}],
        [{**_FOUND, "mismatches": ["x" * (requests.LONGEST_MISMATCH + 1)]}],
        [{**_FOUND, "mismatches": ["x"] * (requests.MOST_MISMATCHES + 1)}],
        [{"checkpoint_id": 1}],
    ],
    ids=lambda found: repr(found)[:60],
)
def test_what_does_not_say_how_each_was_verified_is_no_request(found: Any) -> None:
    body = json.loads(request(VERIFY, verified=(Verified(1, True),)).to_json())
    requests.parse_request(json.dumps(body).encode(), "0" * 32)
    with pytest.raises(InvalidArgument):
        requests.parse_request(json.dumps({**body, "verified": found}).encode(), "0" * 32)


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"outcome": "maybe", "text": "", "keep": {}, "drop": {}}',
        b'{"outcome": "done", "text": "", "keep": {"x": []}, "drop": {}}',
        b'{"outcome": "done", "text": "", "keep": {"1": "x"}, "drop": {}}',
        b'{"outcome": "done", "text": "", "keep": {}, "drop": {"1": 2}}',
        b'{"outcome": "done", "text": "", "keep": {}}',
    ],
    ids=lambda body: body[:40].decode(),
)
def test_what_is_not_all_of_an_answer_is_none(body: bytes) -> None:
    with pytest.raises(InvalidArgument):
        requests.parse_answer(body)
