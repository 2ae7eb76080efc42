"""The shim sees every change that the kernel sees: the same calls on the same names as strace."""

from __future__ import annotations

import collections
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torture import shim
from torture.shim import Action, Kind, Orders

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path
import crash_run
from crash_run import Save
from torture import shim
run, orders = Path(sys.argv[1]), Path(sys.argv[2])
shim.Armed(orders, 0)
crash_run.train(run, (Save("dcp", 1), Save("dcp", 2), Save("hf", 1), Save("hf", 1, 1, True)))
"""
REFUSED = """
import contextlib, os, sys
from pathlib import Path
from torture import shim
run, orders = Path(sys.argv[1]), Path(sys.argv[2])
shim.Armed(orders, 0)
with contextlib.suppress(FileNotFoundError):
    os.unlink(run / "absent")
os.mkdir(run / "there")
"""
STOPPED = """
import os, sys, threading
from pathlib import Path
from torture import shim
run, orders = Path(sys.argv[1]), Path(sys.argv[2])
os.setpgid(0, 0)
shim.Armed(orders, 0)
# The kernel lets the main thread take the signal, so this one could go on for a moment.
making = threading.Thread(target=os.mkdir, args=(run / "there",))
making.start()
making.join()
"""
_KINDS = {
    Kind.WRITE: ("write", "pwrite64", "writev", "pwritev"),
    Kind.TRUNCATE: ("ftruncate", "truncate"),
    Kind.ALLOCATE: ("fallocate",),
    Kind.FSYNC: ("fsync", "fdatasync"),
    Kind.RENAME: ("rename", "renameat", "renameat2"),
    Kind.UNLINK: ("unlink",),
    Kind.MKDIR: ("mkdir", "mkdirat"),
    Kind.SYMLINK: ("symlink", "symlinkat"),
}


def under(orders: Path, run: Path, program: str) -> subprocess.Popen[bytes]:
    run.mkdir(parents=True)
    path = ":".join(str(ROOT / part) for part in ("", "tools", "tests/crash", "tests"))
    environment = os.environ | {"LD_PRELOAD": str(shim.build()), "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-c", program, str(run), str(orders)], env=environment)


def plain(path: str, run: Path) -> str:
    return path.removesuffix(" (deleted)").replace(str(run), "")


def seen_by_strace(log: Path, run: Path) -> collections.Counter[tuple[Kind, str]]:
    seen: collections.Counter[tuple[Kind, str]] = collections.Counter()
    for line in log.read_text(errors="replace").splitlines():
        match = re.match(r"(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)", line)
        if match is None or int(match[3]) < 0:
            continue
        call, args, _ = match.groups()
        descriptor = re.match(r"\d+<([^>]*)>", args)
        # Names come alone, or relative to a descriptor that strace shows with its path before them.
        names = [str(Path(folder, name)) for folder, name in re.findall(r'(?:<([^>]*)>, )?"([^"]*)"', args)]
        if call in ("unlink", "unlinkat", "rmdir"):
            kind = Kind.RMDIR if call == "rmdir" or "AT_REMOVEDIR" in args else Kind.UNLINK
        else:
            found = [kind for kind, calls in _KINDS.items() if call in calls]
            if not found:
                continue
            (kind,) = found
        if kind in (Kind.WRITE, Kind.TRUNCATE, Kind.ALLOCATE, Kind.FSYNC):
            path = descriptor[1] if descriptor else ""
        else:
            path = names[-1 if kind is Kind.SYMLINK else 0]
        if path.startswith(str(run)):
            seen[kind, plain(path, run)] += 1
    return seen


@pytest.mark.slow
@pytest.mark.skipif(shim.why_not() is not None, reason=str(shim.why_not()))
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (Debian: strace)")
def test_the_shim_counts_what_strace_counts(tmp_path: Path):
    run, orders, trace, log = (tmp_path / "runs" / "alpha", *(tmp_path / name for name in ("orders", "trace", "log")))
    run.parent.mkdir()
    shim.give(orders, run, Orders(trace=str(trace)))
    path = ":".join(str(ROOT / part) for part in ("", "tools", "tests/crash", "tests"))
    subprocess.run(
        [
            *("strace", "-f", "-qq", "-y", "-s", "0", "-o", str(log)),
            *("-e", "signal=none"),
            *("-e", "trace=" + ",".join(call for calls in _KINDS.values() for call in calls) + ",unlinkat,rmdir"),
            *("-E", f"LD_PRELOAD={shim.build()}", "-E", f"PYTHONPATH={path}"),
            *(sys.executable, "-c", PROGRAM, str(run), str(orders)),
        ],
        check=True,
        timeout=100,
    )
    mine = collections.Counter(
        (call.kind, plain(call.path, run)) for call in shim.calls(trace) if call.kind is not Kind.CREATE
    )

    assert len(mine) > 100
    assert mine == seen_by_strace(log, run)


@pytest.mark.skipif(shim.why_not() is not None, reason=str(shim.why_not()))
def test_a_call_that_the_kernel_refuses_has_a_number_too(tmp_path: Path):
    run, orders, trace = (tmp_path / name for name in ("run", "orders", "trace"))
    shim.give(orders, run, Orders(trace=str(trace)))
    assert under(orders, run, REFUSED).wait(60) == 0
    (made,) = shim.calls(trace)
    assert (made.kind, made.number) == (Kind.MKDIR, 2)

    shim.give(orders, tmp_path / "again", Orders(made.number, Action.KILL))
    assert under(orders, tmp_path / "again", REFUSED).wait(60) == -signal.SIGKILL
    assert not (tmp_path / "again" / "there").exists()


@pytest.mark.skipif(shim.why_not() is not None, reason=str(shim.why_not()))
def test_who_is_stopped_at_a_call_makes_it_when_it_goes_on_and_not_before(tmp_path: Path):
    for n in range(5):
        run, orders = tmp_path / str(n), tmp_path / f"orders-{n}"
        shim.give(orders, run, Orders(1, Action.STOP, target=shim.EVERYONE))
        process = under(orders, run, STOPPED)
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            assert not (run / "there").exists()
            process.send_signal(signal.SIGCONT)
            assert process.wait(60) == 0
            assert (run / "there").exists()
        finally:
            process.kill()
