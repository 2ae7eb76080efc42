"""The doctor on real storage: this disk, and whatever can be mounted here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from real_storage import Mounts, Seen, command, doctor, environment, made_in, running, trials_of, until, with_fault

from ckptmgr import DCP, CheckpointManager, Series
from ckptmgr.cli import main
from ckptmgr.doctor import examine, mount_of, words_at_start
from ckptmgr.doctor.trials import _Trials
from ckptmgr.errors import InvalidArgument
from ckptmgr.filesystems import Level, Mount
from ckptmgr.rundir import RUN_ID_NAME, RunDirectory
from ckptmgr.storage import FINDINGS, TRIALS, Outcome, Role, judge


def listing(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a directory, with times and bytes."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in directory.rglob("*")
    }


# On this disk


def test_every_finding_is_made_on_this_disk_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    before = listing(tmp_path)
    seen = doctor(tmp_path)

    assert list(seen.levels()) == list(FINDINGS)
    assert {id for id, level in seen.levels().items() if level == "error"} <= {"D002"}  # memory, where /tmp is that
    assert listing(tmp_path) == before
    assert trials_of(tmp_path) == []
    assert seen.err == ""


def test_every_trial_that_is_judged_is_made(tmp_path: Path) -> None:
    (place,) = examine(str(tmp_path))

    assert place.trials.keys() == TRIALS.keys()
    assert {trial.outcome for trial in place.trials.values()} <= {Outcome.WORKS, Outcome.FALLBACK}
    assert all(hasattr(_Trials, name) or name in ("flock", "fcntl", "journal") for name in TRIALS)


def test_the_text_has_a_row_for_each_finding_and_ends_with_the_verdict(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main(["doctor", str(tmp_path), "--need", "1000000TB"])
    lines = capfd.readouterr().out.splitlines()

    assert code == 3
    assert lines[0].startswith(f"{tmp_path}, for the run and the journal: ")
    assert [line.split()[1] for line in lines[2:] if line.split()[1:] and line.split()[1] in FINDINGS] == list(FINDINGS)
    assert lines[-1].startswith(f"do not put a run in {tmp_path}: ")
    assert "D006" in lines[-1]


@pytest.mark.parametrize("name", ["späce ünd ☃", "-x", "a\nb", "\udcff\udcfe", "con.journal.db", "x" * 255])
def test_a_directory_of_any_name_can_be_tried(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    seen = doctor("--", tmp_path / name)

    assert seen.document["places"][0]["path"] == str(tmp_path / name)
    assert "error" not in {level for id, level in seen.levels().items() if id != "D002"}
    assert list((tmp_path / name).iterdir()) == []


def test_a_relative_path_and_a_trailing_slash_are_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = {str(word): examine(word)[0].path for word in ("runs", "runs/", "./runs/.", f"{tmp_path}//runs/", ".")}

    assert set(list(asked.values())[:4]) == {str(tmp_path / "runs")}
    assert asked["."] == str(tmp_path)


def test_a_working_directory_that_is_gone_matters_to_relative_paths_alone(tmp_path: Path) -> None:
    script = "import os, sys; os.mkdir('x'); os.chdir('x'); os.rmdir('../x'); os.execv(sys.argv[1], sys.argv[1:])"

    def gone(asked: Path | str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", script, *command(asked)]
        return subprocess.run(
            words, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=60, check=False
        )

    assert (gone(".").returncode, "Traceback" in gone(".").stderr) == (1, False)
    assert f"{tmp_path} exists" in gone(tmp_path).stdout


def test_a_directory_that_does_not_exist_is_tried_where_it_would_be_made(tmp_path: Path) -> None:
    one, two = doctor(tmp_path / "runs"), doctor(tmp_path / "runs" / "alpha")

    assert (one.document["places"][0]["path"], one.document["places"][0]["missing"]) == (str(tmp_path), 1)
    assert one.levels()["D001"] == "info"
    assert two.levels()["D001"] == "warning"
    assert str(tmp_path / "runs" / "alpha") in two.text("D001")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_directory_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for asked in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        tmp_path / "loop",
        tmp_path / ("x" * 300),
        "",
        "/dev/null",
    ):
        seen = doctor(asked)

        assert (seen.code, seen.document["error"]["type"]) == (2, "InvalidArgument"), asked
    assert doctor(tmp_path, "--journal", tmp_path).code == 2
    assert doctor(tmp_path, "--journal", "").code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_link_to_a_directory_leads_there_and_no_link_below_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("mine")
    (tmp_path / "link").symlink_to("real")
    # Looks like a leftover of a process that is gone.
    host = made_up_leftover(tmp_path / "real").partition("doctor.")[2].partition(".")[0]
    link = tmp_path / "real" / f".ckptmgr-doctor.{host}.4194305.0123abce"
    link.symlink_to(tmp_path / "precious")
    seen = doctor(tmp_path / "link")

    assert seen.document["places"][0]["path"] == str(tmp_path / "real")
    assert f"{tmp_path / 'link'} leads there" in seen.text("D001")
    assert seen.levels()["D025"] == "warning"
    assert link.name in seen.text("D025")
    assert (tmp_path / "precious" / "x").read_text() == "mine"
    assert link.is_symlink()


def made_up_leftover(directory: Path) -> str:
    """A directory that looks like that of a doctor of this host whose process is gone."""
    with running(directory) as child:
        (name,) = until(lambda: made_in(directory) or (child.poll() is not None and [""]))
        child.wait(60)
    assert name
    gone = f"{name.rpartition('.')[0].rpartition('.')[0]}.4194305.0123abcd"
    (directory / gone).mkdir()
    return gone


def test_a_leftover_is_said_and_left_alone(tmp_path: Path) -> None:
    gone = made_up_leftover(tmp_path)
    foreign = ".ckptmgr-doctor.elsewhere.77.0123abcd"
    (tmp_path / foreign).mkdir()
    (tmp_path / ".ckptmgr-doctor.notes").mkdir()
    seen = doctor(tmp_path)

    assert seen.levels()["D025"] == "warning"
    assert f"a doctor that was killed left {gone}" in seen.text("D025")
    assert f"a doctor of another host left {foreign}" in seen.text("D025")
    assert ".notes" not in seen.text("D025")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([gone, foreign, ".ckptmgr-doctor.notes"])


def test_several_doctors_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda _: doctor(tmp_path), range(4)))

    for seen in several:
        assert "error" not in {level for id, level in seen.levels().items() if id != "D002"}
        assert seen.levels()["D025"] in ("ok", "info")
    assert list(tmp_path.iterdir()) == []


def test_a_doctor_does_not_disturb_a_run_that_is_saving(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "alpha"
    state = {"weights": torch.arange(1000.0)}
    with CheckpointManager(run, [Series("checkpoint", DCP())]) as manager:
        manager.save(0, state).wait(60)
        step = 0
        for words in ([run], [run / "checkpoint"], [run.parent], [run, "--journal", run.parent / "alpha.journal.db"]):
            with running(*words, "--json") as child:
                saved = []
                while child.poll() is None:
                    step += 1
                    manager.save(step, state).wait(60)
                    manager.poll()
                    saved.append(step)
                seen = Seen(child.returncode, json.loads(child.stdout.read()), child.stderr.read())

            assert saved, "nothing was saved meanwhile"
            assert "error" not in {level for id, level in seen.levels().items() if id != "D002"}, seen.document
        assert manager.resume(state).step == step
    names = sorted(path.name for path in run.rglob("*") if "doctor" in path.name)
    assert names == []
    assert main(["check", str(run), "--deep"]) == 0
    assert sorted(path.name for path in run.parent.iterdir()) == [
        *("alpha", "alpha.journal.db", "alpha.journal.db-journal", "alpha.journal.lock")
    ]


def test_the_lock_of_a_run_in_use_is_neither_taken_nor_needed(tmp_path: Path) -> None:
    held = RunDirectory(tmp_path / "alpha")
    held.acquire("somebody")
    (tmp_path / "alpha").mkdir()
    before = held.lock_path.read_bytes()
    seen = doctor(tmp_path / "alpha")
    held.release()

    assert seen.levels()["D017"] == "ok"
    assert held.lock_path.read_bytes() == before


# The journal elsewhere


def test_a_journal_elsewhere_is_a_second_place(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "local").mkdir()
    seen = doctor(tmp_path / "run", "--journal", tmp_path / "local" / "alpha.journal.db")

    assert [place["holds"] for place in seen.document["places"]] == [["run"], ["journal"]]
    assert [place["path"] for place in seen.document["places"]] == [str(tmp_path / "run"), str(tmp_path / "local")]
    assert {"D017", "D018", "D019", "D020"} & seen.levels(0).keys() == set()
    assert {"D009", "D013", "D014", "D022"} & seen.levels(1).keys() == set()
    assert {"D015", "D016", "D017", "D018", "D019", "D020"} <= seen.levels(1).keys()
    assert list((tmp_path / "local").iterdir()) == []


def test_a_journal_in_the_same_directory_is_no_second_place(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    seen = doctor(tmp_path / "run", "--journal", tmp_path / "link" / "j.db")

    assert [place["holds"] for place in seen.document["places"]] == [["run", "journal"]]
    assert list(seen.levels()) == list(FINDINGS)


def test_the_journal_of_a_run_directory_that_is_a_mount_stands_on_the_other_side(
    mounts: Mounts, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "alpha"
    run.mkdir(parents=True)
    mounts.mount("-t", "tmpfs", "tmpfs", at=run)
    assert len(doctor(run).document["places"]) == 1, "not a run yet: a run would go into it"
    (run / RUN_ID_NAME).write_text("1234\n")
    seen = doctor(run)

    assert [(place["path"], place["holds"]) for place in seen.document["places"]] == [
        (str(run), ["run"]),
        (str(run.parent), ["journal"]),
    ]
    assert (seen.levels(0)["D002"], seen.levels(0).get("D017"), seen.levels(1)["D017"]) == ("error", None, "ok")
    assert sorted(path.name for path in run.parent.iterdir()) == ["alpha"]


# Other storage


def test_memory_is_no_place_for_a_run(mounts: Mounts) -> None:
    seen = doctor(mounts.mount("-t", "tmpfs", "tmpfs"))

    assert (seen.code, seen.document["verdict"]) == (3, "unfit")
    assert seen.bad() == {"D002": "error"} | ({"D006": "warning"} if "D006" in seen.bad() else {})
    assert seen.document["places"][0]["kind"] == "memory"


def test_a_small_disk_is_a_warning_and_enough_for_who_needs_less(mounts: Mounts) -> None:
    disk = mounts.ext4(megabytes=32)

    assert doctor(disk).bad() == {"D006": "warning"}
    assert doctor(disk, "--need", "10MB").bad() == {}
    assert doctor(disk, "--need", "10MB").document["verdict"] == "trusted"
    seen = doctor(disk, "--need", "1GB")
    assert (seen.code, seen.bad()) == (3, {"D006": "error"})


def test_a_full_disk_is_one_error_and_nothing_is_left_on_it(mounts: Mounts) -> None:
    disk = mounts.ext4()
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(b"x" * (1 << 20)):
            pass
    with contextlib.suppress(OSError), (disk / "rest").open("wb", buffering=0) as filler:
        while filler.write(b"x" * 512):
            pass
    seen = doctor(disk)

    assert {id for id, level in seen.levels().items() if level == "error"} == {"D006"}
    assert "No space left on device" in seen.text("D006")
    assert seen.document["verdict"] == "unfit"
    assert made_in(disk) == []


def test_a_disk_without_inodes_is_an_error_and_nothing_is_left_on_it(mounts: Mounts) -> None:
    disk = mounts.ext4("-N", "64")
    few = doctor(disk)
    with contextlib.suppress(OSError):
        for number in range(1000):
            (disk / str(number)).touch()
    none = doctor(disk)

    assert few.levels()["D007"] == "warning"
    assert (none.levels()["D006"], none.levels()["D007"]) == ("error", "error")
    assert made_in(disk) == []


@pytest.mark.parametrize("whole", [True, False], ids=["disk", "mount"])
def test_a_read_only_mount_is_an_error(mounts: Mounts, tmp_path: Path, whole: bool) -> None:
    if whole:
        place = mounts.ext4()
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    else:
        (tmp_path / "behind").mkdir()
        place = mounts.mount("--bind", tmp_path / "behind")
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
    seen = doctor(place)

    assert (seen.levels()["D003"], seen.levels()["D004"]) == ("error", "error")
    assert "`ro`" in seen.text("D003")
    assert "Read-only file system" in seen.text("D004")
    assert "D015" not in seen.levels()


def test_a_disk_whose_cache_is_not_flushed_is_a_warning(mounts: Mounts) -> None:
    disk = mounts.ext4()
    subprocess.run(["mount", "-o", "remount,barrier=0", str(disk)], check=True)
    seen = doctor(disk, "--need", "1MB")

    assert (seen.code, seen.bad()) == (0, {"D003": "warning"})
    assert "barrier" in seen.text("D003")


def test_xfs_can_be_trusted(mounts: Mounts) -> None:
    seen = doctor(mounts.xfs(), "--need", "1MB")

    assert (seen.code, seen.document["verdict"], seen.bad()) == (0, "trusted", {})
    assert seen.document["places"][0]["file_system"] == "XFS"


@pytest.mark.parametrize("volatile", [False, True])
def test_layers_are_a_warning_and_an_error_if_they_are_never_synced(mounts: Mounts, volatile: bool) -> None:
    disk = mounts.ext4()
    for name in ("lower", "upper", "work"):
        (disk / name).mkdir()
    options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work" + (",volatile" if volatile else "")
    seen = doctor(mounts.mount("-t", "overlay", "overlay", "-o", options), "--need", "1MB")

    assert seen.bad() == {"D002": "warning"} | ({"D003": "error"} if volatile else {})


def test_a_folder_behind_fuse_is_named_and_tried(mounts: Mounts) -> None:
    point, behind, _ = mounts.bindfs()
    seen = doctor(point, "--need", "1MB")

    assert (seen.code, seen.document["verdict"], seen.bad()) == (0, "limited", {"D002": "warning", "D019": "warning"})
    assert "FUSE" in seen.text("D002")
    # bindfs has neither, and ckptmgr does without.
    assert (seen.levels()["D012"], seen.levels()["D013"]) == ("info", "info")
    assert list(behind.iterdir()) == []


def test_a_file_system_that_cannot_tell_case_is_an_error(mounts: Mounts) -> None:
    seen = doctor(mounts.exfat(), "--need", "1MB")

    assert seen.code == 3
    assert seen.levels()["D021"] == "error"
    assert "one file" in seen.text("D021")
    assert seen.levels()["D022"] == "warning", "exFAT has no symbolic links"
    assert "fuseblk" in seen.document["places"][0]["type"]


def test_case_folding_in_one_directory_of_ext4_is_an_error(mounts: Mounts) -> None:
    disk = mounts.ext4("-O", "casefold", "-E", "encoding=utf8")
    (disk / "folded").mkdir()
    if subprocess.run(["chattr", "+F", str(disk / "folded")], check=False).returncode:
        pytest.skip("chattr +F is not possible here")

    assert doctor(disk / "folded").levels()["D021"] == "error"
    assert doctor(disk).levels()["D021"] == "ok"


@pytest.mark.parametrize("asked", ["/proc", "/proc/self", "/sys"])
def test_a_file_system_of_the_kernel_is_an_error(asked: str) -> None:
    seen = doctor(asked)

    assert seen.code == 3
    assert (seen.levels()["D002"], seen.levels()["D004"]) == ("error", "error")


# Permissions


def as_a_user(*words: str | Path) -> Seen:
    """As a user who may do only what permissions say: root that has given up everything that makes it root."""
    if os.geteuid() != 0:
        return doctor(*words)
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv to give up root's privileges")
    return doctor(*words, before=["setpriv", "--bounding-set=-all", "--inh-caps=-all"])


def somebody_else(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory to another user")
    os.chown(path, 65534, 65534)


def test_a_directory_that_may_not_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o755)
    somebody_else(tmp_path / "theirs")
    seen = as_a_user(tmp_path / "theirs")

    assert (seen.code, seen.levels()["D004"]) == (3, "error")
    assert "Permission denied" in seen.text("D004")
    assert "D008" not in seen.levels()


def test_a_directory_that_may_not_be_entered_is_an_error_and_not_a_guess(tmp_path: Path) -> None:
    (tmp_path / "closed" / "runs").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    somebody_else(tmp_path / "closed")
    seen = as_a_user(tmp_path / "closed" / "runs")

    assert (seen.code, seen.levels()["D004"]) == (3, "error")
    assert "Permission denied" in seen.text("D004")


def test_a_directory_that_may_be_written_but_not_listed_can_be_tried(tmp_path: Path) -> None:
    (tmp_path / "drop").mkdir()
    (tmp_path / "drop").chmod(0o1733)
    somebody_else(tmp_path / "drop")
    seen = as_a_user(tmp_path / "drop")

    assert "error" not in {level for id, level in seen.levels().items() if id != "D002"}
    assert list((tmp_path / "drop").iterdir()) == []


def test_what_a_doctor_makes_is_closed_to_others(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        (name,) = until(lambda: made_in(tmp_path) or (child.poll() is not None and [""]))
        mode = (tmp_path / name).stat().st_mode if name else 0
        child.wait(60)

    assert stat.S_IMODE(mode) == 0o700


def test_open_directories_and_open_umasks_are_warned_of(tmp_path: Path) -> None:
    for mode, level in ((0o777, "warning"), (0o1777, "ok"), (0o755, "ok"), (0o2775, "ok")):
        tmp_path.chmod(mode)
        seen = doctor(tmp_path)

        assert seen.levels()["D023"] == level, oct(mode)
        assert ("setgid" in seen.text("D023")) == bool(mode & 0o2000)
    tmp_path.chmod(0o755)
    assert doctor(tmp_path, umask=0).levels()["D023"] == "warning"
    assert "umask 027" in doctor(tmp_path, umask=0o027).text("D023")


# Faults in system calls


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("flock:error=ENOSYS", {"D017": "error"}),
        ("flock:error=ENOLCK", {"D017": "error"}),
        ("flock:retval=0", {"D017": "error"}),
        ("fsync:error=EIO", {"D015": "error", "D016": "error", "D017": "error"}),
        ("fsync:error=EINVAL", {"D015": "error", "D016": "error", "D017": "error"}),
        ("fdatasync:error=EIO", {"D020": "error"}),
        ("renameat2:error=EINVAL", {}),
        ("renameat2:error=ENOSYS", {}),
        ("renameat2:error=EIO", {"D012": "error", "D013": "error", "D014": "error"}),
        ("renameat:error=EXDEV", {"D011": "error", "D022": "warning"}),
        ("fallocate:error=EOPNOTSUPP", {}),
        ("fallocate:error=EIO", {"D010": "error"}),
        ("fallocate:retval=0", {"D010": "error"}),
        ("renameat:retval=0", {"D011": "error", "D022": "warning"}),
        ("renameat2:retval=0", {"D012": "error", "D013": "error", "D014": "error"}),
        ("symlinkat:error=EPERM", {"D022": "warning"}),
        ("mkdirat:error=EACCES", {"D004": "error"}),
        ("mkdirat:error=EDQUOT", {"D006": "error"}),
        ("pwrite64:error=EDQUOT", {"D006": "error"}),
        ("pwrite64:error=EIO", {
            "D009": "error", "D011": "error", "D012": "error", "D013": "error", "D014": "error", "D015": "error",
            "D017": "error", "D020": "error", "D023": "warning", "D024": "warning",
        }),
    ],
)  # fmt: skip
def test_a_call_that_fails_is_found_under_its_own_id(tmp_path: Path, fault: str, expected: dict[str, str]) -> None:
    place = tmp_path / "place"
    place.mkdir()
    seen = with_fault(fault, tmp_path / "trace", place)

    here = {id: level for id, level in seen.bad().items() if id not in ("D002", "D006")}
    assert here == {id: level for id, level in expected.items() if id != "D006"}
    assert "D006" not in expected or seen.levels()["D006"] == "error"
    assert seen.code == (3 if "error" in seen.bad().values() else 0)
    assert list(place.iterdir()) == []


def test_calls_that_are_missing_are_said_and_done_without(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()

    renames = with_fault("renameat2:error=EINVAL", tmp_path / "trace", place)
    assert (renames.levels()["D012"], renames.levels()["D013"]) == ("info", "info")
    assert with_fault("fallocate:error=EOPNOTSUPP", tmp_path / "trace", place).levels()["D010"] == "info"


def test_an_fsync_that_lies_cannot_be_seen_and_that_is_said(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    seen = with_fault("fsync:retval=0", tmp_path / "trace", place)

    assert seen.levels()["D015"] in ("ok", "info")
    assert "cannot be seen from here" in seen.text("D015")


#: Faults that strace cannot put in: Python itself needs fcntl when it starts, and flags cannot be changed.
SHIM = r"""
    #define _GNU_SOURCE
    #include <dlfcn.h>
    #include <errno.h>
    #include <fcntl.h>
    #include <stdarg.h>
    #include <stdlib.h>
    #include <unistd.h>
    static const char *mode(void) { const char *it = getenv("TEST_FAULT"); return it ? it : ""; }
    static int answer(const char *name, int fd, int cmd, void *arg) {
        if ((*mode() == 'l' || *mode() == 'r') && (cmd == F_SETLK || cmd == F_SETLKW || cmd == F_GETLK)) {
            if (*mode() == 'l') { if (cmd == F_GETLK) ((struct flock *)arg)->l_type = F_UNLCK; return 0; }
            errno = ENOLCK;
            return -1;
        }
        int (*real)(int, int, ...) = (int (*)(int, int, ...))dlsym(RTLD_NEXT, name);
        return real(fd, cmd, arg);
    }
    int fcntl(int fd, int cmd, ...) {
        va_list list; va_start(list, cmd); void *arg = va_arg(list, void *); va_end(list);
        return answer("fcntl", fd, cmd, arg);
    }
    int fcntl64(int fd, int cmd, ...) {
        va_list list; va_start(list, cmd); void *arg = va_arg(list, void *); va_end(list);
        return answer("fcntl64", fd, cmd, arg);
    }
    static pid_t started;
    __attribute__((constructor)) static void start(void) { started = getpid(); }
    static int lies(void) { return *mode() == 'e' || (*mode() == 'f' && getpid() != started); }
    int open64(const char *path, int flags, ...) {
        va_list list; va_start(list, flags); int bits = va_arg(list, int); va_end(list);
        int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
        return real(path, lies() ? flags & ~O_EXCL : flags, bits);
    }
    int openat64(int folder, const char *path, int flags, ...) {
        va_list list; va_start(list, flags); int bits = va_arg(list, int); va_end(list);
        int (*real)(int, const char *, int, ...) = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64");
        return real(folder, path, lies() ? flags & ~O_EXCL : flags, bits);
    }
"""


def with_shim(mode: str, folder: Path) -> Seen:
    """Try the folder ``place`` with a fault put into the C library's calls."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc to put faults into calls of the C library")
    (folder / "place").mkdir()
    (folder / "shim.c").write_text(textwrap.dedent(SHIM))
    shim = folder / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, folder / "shim.c", "-ldl"], check=True)
    return doctor(folder / "place", env={"LD_PRELOAD": str(shim), "TEST_FAULT": mode})


def errors(seen: Seen) -> set[str]:
    return {id for id, level in seen.levels().items() if level == "error"} - {"D002"}


@pytest.mark.parametrize("mode", ["everywhere", "forked"])
def test_an_exclusive_create_that_is_none_is_found(tmp_path: Path, mode: str) -> None:
    seen = with_shim(mode, tmp_path)

    assert "D008" in errors(seen)
    assert "created twice" in seen.text("D008")


@pytest.mark.parametrize("mode", ["lie", "refuse"])
def test_fcntl_locks_that_do_not_hold_or_do_not_exist_are_found_by_both_who_need_them(
    tmp_path: Path, mode: str
) -> None:
    seen = with_shim(mode, tmp_path)

    assert errors(seen) == {"D018", "D020"}
    assert ("two processes" in seen.text("D018"), "two processes" in seen.text("D020")) == (
        mode == "lie",
        mode == "lie",
    )


# What a manager says


def test_a_manager_on_a_local_disk_says_nothing_of_its_storage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount = mount_of(tmp_path)
    if mount is None or judge(examine(str(tmp_path), timeout_s=30)).ids(Level.ERROR):
        pytest.skip("the folder for tests is on no ordinary disk")
    with CheckpointManager(tmp_path / "alpha"):
        pass
    if mount.type in ("ext4", "xfs", "btrfs"):
        assert "storage" not in caplog.text


def test_a_manager_says_once_what_its_storage_does_not_guarantee(
    mounts: Mounts, caplog: pytest.LogCaptureFixture
) -> None:
    point, _, _ = mounts.bindfs()
    with CheckpointManager(point / "alpha") as manager:
        manager.save(1, {"x": torch.ones(3)}).wait(60)

    (said,) = [record for record in caplog.records if "storage" in record.getMessage()]
    assert (said.name, said.levelname) == ("ckptmgr", "WARNING")
    assert "FUSE" in said.getMessage()
    assert "journal=" in said.getMessage()
    assert f"ckptmgr doctor {point / 'alpha'}" in said.getMessage()


def test_a_journal_elsewhere_has_words_of_its_own(mounts: Mounts, tmp_path: Path) -> None:
    point, _, _ = mounts.bindfs()
    (point / "run").mkdir()
    run_there, journal_there = (
        RunDirectory(point / "run", tmp_path / "j.db"),
        RunDirectory(tmp_path / "r", point / "j.db"),
    )
    (tmp_path / "r").mkdir()

    assert not any("managers" in word or "locks hold" in word for word in words_at_start(run_there))
    assert any(str(point) in word and "locks hold" in word for word in words_at_start(journal_there))


def test_looking_at_the_storage_never_fails(tmp_path: Path) -> None:
    assert mount_of(tmp_path / "missing") is None
    assert words_at_start(RunDirectory(tmp_path / "missing" / "more")) == []
    assert mount_of(Path("/proc/self/fd")) == Mount(**vars(mount_of(Path("/proc"))))


def test_statfs_tells_the_kind_where_proc_does_not(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from ckptmgr import doctor
        assert doctor.mount_of(Path(sys.argv[1])).device != ""
        real, doctor.read_kernel = doctor.read_kernel, lambda path: "" if "mountinfo" in path else real(path)
        found = doctor.mount_of(Path(sys.argv[1]))
        print(found.type if found else None, doctor.mount_of(Path("/proc")).type)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path], capture_output=True, text=True, env=environment(),
        timeout=60, check=True,
    )  # fmt: skip
    mount = mount_of(tmp_path)

    assert mount is not None
    expected = {"ext2": "ext4", "ext3": "ext4"}.get(mount.type, mount.type)
    assert done.stdout.split() == [expected, "proc"]


def test_the_command_and_a_manager_need_no_torch_for_it(tmp_path: Path) -> None:
    script = "import sys; from ckptmgr.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, "doctor", tmp_path], capture_output=True, text=True, env=environment(),
        timeout=60, check=True,
    )  # fmt: skip

    assert done.stdout.splitlines()[-1] == "False"
    assert command(tmp_path)[3] == "doctor"


def test_arguments_that_make_no_sense_are_refused_before_anything_is_tried() -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        examine("")
    assert {Role.RUN.value, Role.JOURNAL.value} == {"run", "journal"}
