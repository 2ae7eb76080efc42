"""``ckptmgr adopt``: checkpoints of other libraries in a run of ours, loaded, and theirs as they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts_on_disk as made
import pytest
import torch
from layouts_on_disk import LAYOUTS, WEIGHTS
from safetensors.torch import load_file

from ckptmgr import DCP, CheckpointManager, KeepLast, Series, adoption
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointState
from ckptmgr.rundir import RunDirectory

Theirs = Callable[[str], Path]
Command = Callable[..., tuple[int, str, str]]
LOADABLE = ("torchtitan", "xtuner")
WEIGHTS_ALONE = ("models", "hf_trainer")


def everything(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that can be seen of a directory's files, but for how many names they have."""
    return {
        path.relative_to(directory).as_posix(): (path.lstat().st_mtime_ns, path.lstat().st_mode, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def resumed(run: Path, step: int | None = None) -> dict[str, Any]:
    """What a manager loads of a run that has what `layouts_on_disk.dcp_save` saved."""
    state: dict[str, Any] = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()},
        "optimizer": {"step": torch.tensor(0.0), "groups": [0, 0]},
        "train_state": {"n": 0},
    }
    with CheckpointManager(run, series=[Series("checkpoint", DCP(), keep=KeepLast(5))]) as manager:
        found = manager.resume(state, step=step)
    assert found is not None
    return {"step": found.step, **state}


@pytest.mark.parametrize("name", LOADABLE)
def test_what_was_adopted_is_resumed_from(name: str, theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory, run = theirs(name), tmp_path / "run"
    before = everything(directory)
    code, out, _ = ckptmgr("adopt", run, "--from", directory)
    assert code == 0
    assert out.count("would adopt") == 2
    assert not run.exists()

    assert ckptmgr("adopt", run, "--from", directory, "--apply")[0] == 0
    assert everything(directory) == before
    assert ckptmgr("check", run, "--deep")[0] == 0
    assert ckptmgr("latest", run)[1] == f"{run}/checkpoint/step-10\n"
    assert [line.split()[7:] for line in ckptmgr("ls", run)[1].splitlines()[1:]] == [
        ["adopted"],
        ["adopted,", "newest", "committed"],
    ]
    for step in (None, 5):
        state = resumed(run, step)
        assert state["step"] == (step or 10)
        assert all(torch.equal(state["model"][key], tensor) for key, tensor in WEIGHTS.items())
        assert state["optimizer"]["step"] == 3
        assert state["train_state"] == {"n": 1}


def test_files_beside_the_weights_of_xtuner_come_along(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory, run = theirs("xtuner"), tmp_path / "run"
    ckptmgr("adopt", run, "--from", directory, "--apply")
    names = {path.name for path in (run / "checkpoint" / "step-10").iterdir()}

    assert {".metadata", "dataloader", "lr_scheduler", "train_state.json", "trainer_config.json"} <= names
    assert json.loads((run / "checkpoint" / "step-10" / "train_state.json").read_text())["cur_step"] == 10


@pytest.mark.parametrize("name", WEIGHTS_ALONE)
def test_weights_become_exports(name: str, theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory, run = theirs(name), tmp_path / "run"
    assert ckptmgr("adopt", run, "--from", directory, "--apply")[0] == 0
    export = run / "hf" / "hf-10"

    assert (run / "hf" / "hf-latest").resolve() == export
    found = {name: tensor for file in export.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[key], tensor) for key, tensor in WEIGHTS.items())
    theirs_too = {path.name for path in (directory / LAYOUTS[name].newest).iterdir()}
    assert {path.name for path in export.iterdir()} == theirs_too | {"ckptmgr.json"}


def test_a_copy_of_our_own_keeps_what_was_known_of_it(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    run = tmp_path / "run"
    assert ckptmgr("adopt", run, "--from", theirs("copied"), "--apply")[0] == 0
    with Journal.open_read_only(RunDirectory(run).journal_path) as journal:
        newest = journal.checkpoints(live_only=True)[-1]

    assert (newest.step, newest.world_size, newest.per_rank) == (10, 2, ("loader",))
    assert ckptmgr("check", run, "--world-size", "3")[0] == 3


@pytest.mark.parametrize("name", ["deepspeed", "megatron", "lightning", "orbax", "torch_checkpointing"])
def test_what_nothing_of_ours_could_load_is_left(name: str, theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    code, out, _ = ckptmgr("adopt", tmp_path / "run", "--from", theirs(name))

    assert code == 3
    assert out.count("left") == 2
    assert out.count("nothing of ckptmgr could load") == 2


def test_a_torn_one_is_left_and_the_older_one_adopted(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory, run = theirs("torchtitan"), tmp_path / "run"
    data = directory / "checkpoint" / "step-10" / "__0_0.distcp"
    os.truncate(data, data.stat().st_size // 2)
    code, out, _ = ckptmgr("adopt", run, "--from", directory, "--apply")

    assert code == 0
    assert "F003" not in out
    assert "left" in out
    assert ckptmgr("latest", run)[1] == f"{run}/checkpoint/step-5\n"


def test_links_share_the_bytes_and_copies_do_not(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory = theirs("torchtitan")
    data = directory / "checkpoint" / "step-10" / "__0_0.distcp"
    for words, names in (([], 2), (["--copy"], 2)):
        run = tmp_path / f"run-{len(words)}"
        assert ckptmgr("adopt", run, "--from", directory, *words, "--apply")[0] == 0
        ours = run / "checkpoint" / "step-10" / "__0_0.distcp"
        assert ours.samefile(data) is (not words)
        assert data.stat().st_nlink == names
        assert ours.read_bytes() == data.read_bytes()


def test_retention_removes_our_names_alone(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory, run = theirs("torchtitan"), tmp_path / "run"
    before = everything(directory)
    ckptmgr("adopt", run, "--from", directory, "--apply")
    with CheckpointManager(run, series=[Series("checkpoint", DCP(), keep=KeepLast(1))]) as manager:
        manager.save(20, {"model": dict(WEIGHTS)}).wait()

    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == ["step-20"]
    assert everything(directory) == before
    # And the other way round.
    assert ckptmgr("adopt", tmp_path / "other", "--from", directory, "--apply")[0] == 0
    for path in everything(directory):
        (directory / path).unlink()
    assert ckptmgr("check", tmp_path / "other", "--deep")[0] == 0


def test_the_same_command_again_finds_everything_there(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory, run = theirs("torchtitan"), tmp_path / "run"
    assert ckptmgr("adopt", run, "--from", directory, "--step", "5", "--apply")[0] == 0
    assert ckptmgr("adopt", run, "--from", directory, "--apply")[0] == 0
    code, out, _ = ckptmgr("adopt", run, "--from", directory, "--apply")

    assert code == 3
    assert out.count("already") == 2
    assert ckptmgr("latest", run)[1] == f"{run}/checkpoint/step-10\n"


def test_an_older_step_is_not_put_before_what_the_run_has(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory, run = theirs("torchtitan"), tmp_path / "run"
    with CheckpointManager(run, series=[Series("checkpoint", DCP(), keep=KeepLast(5))]) as manager:
        manager.save(7, {"model": dict(WEIGHTS)}).wait()
    code, out, _ = ckptmgr("adopt", run, "--from", directory, "--apply", "--json")
    assert code == 0
    document = json.loads(out)
    assert [each["step"] for each in document["adopted"]] == [10]
    assert [each["step"] for each in document["left"]] == [5]
    assert "give --step 5" in document["left"][0]["why"]

    assert ckptmgr("adopt", run, "--from", directory, "--step", "5", "--apply")[0] == 0
    assert ckptmgr("latest", run)[1] == f"{run}/checkpoint/step-5\n"


def test_a_name_without_a_step_is_given_one(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory, run = theirs("torchtitan"), tmp_path / "run"
    (directory / "checkpoint" / "step-10").rename(tmp_path / "final")
    assert ckptmgr("adopt", run, "--from", tmp_path / "final")[0] == 3
    assert ckptmgr("adopt", run, "--from", tmp_path / "final", "--as-step", "77", "--apply")[0] == 0
    assert resumed(run)["step"] == 77
    made.dcp_save(directory / "checkpoint" / "step-6")
    assert ckptmgr("adopt", run, "--from", directory, "--as-step", "99")[0] == 2


def test_what_cannot_be_meant_is_refused(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory = theirs("torchtitan")
    assert ckptmgr("adopt", tmp_path / "run")[0] == 2
    assert ckptmgr("adopt", tmp_path / "run", "--from", tmp_path / "nowhere")[0] == 2
    assert ckptmgr("adopt", directory, "--from", directory)[0] == 2
    assert ckptmgr("adopt", tmp_path / "no" / "run", "--from", directory, "--apply")[0] == 2
    (tmp_path / "empty").mkdir()
    assert ckptmgr("adopt", tmp_path / "run", "--from", tmp_path / "empty")[0] == 10
    assert ckptmgr("adopt", tmp_path / "run", "--from", directory, "--apply")[0] == 0
    assert ckptmgr("adopt", tmp_path / "second", "--from", tmp_path / "run")[0] == 2
    assert not (tmp_path / "no").exists()


def test_a_live_manager_keeps_its_run(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory, run = theirs("torchtitan"), tmp_path / "run"
    with CheckpointManager(run, series=[Series("checkpoint", DCP())]):
        assert ckptmgr("adopt", run, "--from", directory, "--apply")[0] == 11
        assert ckptmgr("adopt", run, "--from", directory)[0] == 0


def test_links_and_pipes_are_left(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory = theirs("torchtitan")
    (directory / "checkpoint" / "step-10" / "more").symlink_to("/etc/passwd")
    os.mkfifo(directory / "checkpoint" / "step-5" / "more")
    code, out, _ = ckptmgr("adopt", tmp_path / "run", "--from", directory, "--apply")

    assert code == 3
    assert "more is a link" in out
    assert "more is a pipe" in out


@pytest.mark.parametrize("name", ["new\nline", "back\\slash", "\x1b[31m", "\udcff"])
def test_a_file_whose_name_no_manifest_can_hold_leaves_its_checkpoint(
    name: str, theirs: Theirs, tmp_path: Path, ckptmgr: Command
) -> None:
    directory, run = theirs("torchtitan"), tmp_path / "run"
    (directory / "checkpoint" / "step-5" / name).write_text("more")
    code, out, _ = ckptmgr("adopt", run, "--from", directory, "--apply", "--json")
    said = json.loads(out)

    assert (code, [one["step"] for one in said["adopted"]], [one["step"] for one in said["left"]]) == (0, [10], [5])
    assert "no name that a manifest can hold" in said["left"][0]["why"]
    assert json.loads(ckptmgr("ls", run, "--all", "--json")[1])["checkpoints"][0]["state"] == "COMMITTED"


def test_no_run_is_begun_for_what_cannot_be_taken_in(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory = theirs("torchtitan")
    for name in ("step-5", "step-10"):
        (directory / "checkpoint" / name / ".metadata").unlink()
    (tmp_path / "empty").mkdir()

    assert ckptmgr("adopt", tmp_path / "run", "--from", directory, "--apply")[0] == 3
    assert ckptmgr("adopt", tmp_path / "run", "--from", tmp_path / "empty", "--apply")[0] == 10
    assert {path.name for path in tmp_path.iterdir()} == {"empty", directory.name}


def test_a_place_that_is_taken_is_said_before_anything_is_tried(
    theirs: Theirs, tmp_path: Path, ckptmgr: Command
) -> None:
    run = theirs("torchtitan")  # a run in the place where the other library goes on
    for apply in ([], ["--apply"], ["--apply"]):
        code, out, _ = ckptmgr("adopt", run, "--from", run / "checkpoint", *apply)
        assert code == 3
        assert "checkpoint/step-10 is there in the run and no checkpoint of it" in out

    assert ckptmgr("ls", run)[0] == 10


def test_a_directory_of_any_name_is_adopted_from(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory, run = theirs("torchtitan"), tmp_path / "run"
    odd = directory.rename(tmp_path / os.fsdecode(b"their\xffs"))

    assert ckptmgr("adopt", run, "--from", odd, "--apply")[0] == 0
    assert "their\\xffs" in ckptmgr("show", run, 5)[1]


def test_a_step_that_no_journal_can_hold_is_refused_and_harms_nothing(
    theirs: Theirs, tmp_path: Path, ckptmgr: Command
) -> None:
    directory, run = theirs("torchtitan"), tmp_path / "run"
    assert ckptmgr("adopt", run, "--from", directory, "--apply")[0] == 0
    words = ("adopt", run, "--from", directory / "checkpoint" / "step-5", "--as-step", 2**63 - 1)

    assert ckptmgr(*words, "--apply")[0] == 2
    assert ckptmgr("check", run)[0] == 0


def test_links_into_the_cache_of_the_hub_are_judged_and_left(tmp_path: Path, ckptmgr: Command) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    LAYOUTS["models"].make(tmp_path / "made")
    (tmp_path / "made" / "export-5").rename(tmp_path / "models--a--b" / "blobs")
    for each in (tmp_path / "models--a--b" / "blobs").iterdir():
        (snapshot / each.name).symlink_to(f"../../blobs/{each.name}")
    code, out, _ = ckptmgr("adopt", tmp_path / "run", "--from", snapshot, "--as-step", "1", "--apply")

    assert code == 3
    assert "is a link" in out


@pytest.mark.parametrize("copy", [False, True])
def test_a_file_that_changes_while_it_is_read_is_not_committed(
    theirs: Theirs, tmp_path: Path, ckptmgr: Command, monkeypatch: pytest.MonkeyPatch, copy: bool
) -> None:
    directory, run = theirs("torchtitan"), tmp_path / "run"
    data = directory / "checkpoint" / "step-5" / "__0_0.distcp"
    real = adoption._blocks

    def blocks(descriptor: int, progress: Callable[[int], None]) -> Any:
        yield from real(descriptor, progress)
        if os.fstat(descriptor).st_ino == data.stat().st_ino:
            with data.open("r+b") as file:
                file.write(b"other")
            os.utime(data, ns=(1, 1))

    monkeypatch.setattr(adoption, "_blocks", blocks)
    code, _, err = ckptmgr("adopt", run, "--from", directory, "--apply", *(["--copy"] if copy else []))

    assert code == 5
    assert "changed while it was read" in err
    with Journal.open_read_only(RunDirectory(run).journal_path) as journal:
        (row,) = journal.checkpoints()
    assert row.state is CheckpointState.FAILED
    assert "changed while it was read" in (row.reason or "")
    assert [*(run / "checkpoint").iterdir()] == []


def test_a_file_that_has_grown_since_it_was_judged_is_not_committed(
    theirs: Theirs, tmp_path: Path, ckptmgr: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, run = theirs("torchtitan"), tmp_path / "run"
    real = adoption.take_in

    def take_in(*args: Any, **kwargs: Any) -> Any:
        with (directory / "checkpoint" / "step-5" / "__0_0.distcp").open("ab") as file:
            file.write(b"more")
        return real(*args, **kwargs)

    monkeypatch.setattr(adoption, "take_in", take_in)

    assert ckptmgr("adopt", run, "--from", directory, "--apply")[0] == 5
    assert [*(run / "checkpoint").iterdir()] == []


def test_a_copy_of_our_own_with_other_bytes_is_not_committed(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory, run = theirs("copied"), tmp_path / "run"
    data = directory / "step-5" / "model.bin"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    code, _, err = ckptmgr("adopt", run, "--from", directory, "--apply")

    assert code == 5
    assert "other bytes than its manifest says" in err
    assert [*(run / "checkpoint").iterdir()] == []


def test_another_file_system_needs_a_copy(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    memory = Path("/dev/shm") / f"ckptmgr-adopt-{os.getpid()}"
    if not memory.parent.is_dir() or memory.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm to be another file system")
    directory = theirs("torchtitan")
    try:
        memory.mkdir()
        code, _, err = ckptmgr("adopt", memory / "run", "--from", directory, "--apply")
        assert code == 1
        assert "--copy" in err
        assert ckptmgr("adopt", memory / "run", "--from", directory, "--copy", "--apply")[0] == 0
        assert ckptmgr("check", memory / "run", "--deep")[0] == 0
    finally:
        subprocess.run(["rm", "-rf", str(memory)], check=True)


KILLED = """
import os, sys
left = int(sys.argv[1])
def counted(name):
    real = getattr(os, name)
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    setattr(os, name, call)
for name in ("fsync", "link", "mkdir", "rename", "unlink", "write", "pwrite"):
    counted(name)
from ckptmgr.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_at_any_call_the_same_command_goes_on(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    directory = theirs("torchtitan")
    before = everything(directory)
    calls = 0
    while True:
        run = tmp_path / f"run-{calls}"
        words = ["adopt", str(run), "--from", str(directory), "--apply"]
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(calls), *words], capture_output=True, timeout=60, check=False
        )
        assert ckptmgr(*words)[0] == (3 if done.returncode == 0 else 0) or _is_whole(run, ckptmgr)
        assert ckptmgr("check", run, "--deep")[0] == 0
        assert ckptmgr("latest", run)[1] == f"{run}/checkpoint/step-10\n"
        assert sorted(path.name for path in (run / "checkpoint").iterdir()) == ["step-10", "step-5"]
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        calls += 3
    assert everything(directory) == before
    assert calls > 15


def _is_whole(run: Path, ckptmgr: Command) -> bool:
    """Whether a command that was killed had nothing left to adopt."""
    with Journal.open_read_only(RunDirectory(run).journal_path) as journal:
        return [record.step for record in journal.checkpoints(live_only=True)] == [5, 10]


def test_stock_readers_load_what_was_adopted(theirs: Theirs, tmp_path: Path, ckptmgr: Command) -> None:
    import torch.distributed.checkpoint as dcp

    run = tmp_path / "run"
    ckptmgr("adopt", run, "--from", theirs("torchtitan"), "--apply")
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}}
    with warnings.catch_warnings(action="ignore"):
        dcp.load(state, checkpoint_id=run / "checkpoint" / "step-10", no_dist=True)

    assert all(torch.equal(state["model"][key], tensor) for key, tensor in WEIGHTS.items())
