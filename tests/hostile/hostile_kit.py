"""What runs in a child: a hostile input, and a watch over memory, time and everything that is touched."""

from __future__ import annotations

import contextlib
import os
import reprlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from guard import Guard

from ckptmgr.errors import CheckpointError

#: What a small hostile input may cost beyond what the process had: memory, and seconds of CPU.
MOST_MIB = 150
MOST_S = 20.0


def peak_kib() -> int:
    """The most memory that this process ever had, since `forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    """Begin anew to look for the peak."""
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def bounded(mib: float = MOST_MIB, seconds: float = MOST_S) -> Iterator[None]:
    """Fail if the block takes more memory or time; end the process if it hangs."""
    signal.setitimer(signal.ITIMER_REAL, 3 * seconds)
    forget_peak()
    before, began = peak_kib(), time.process_time()
    yield
    took, grown = time.process_time() - began, (peak_kib() - before) / 1024
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert grown < mib, f"{grown:.0f} MiB were taken"
    assert took < seconds, f"it took {took:.1f} s"


def refuse(expected: type[CheckpointError], call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call, and have it raise an error of ours; returns that error."""
    try:
        answer = call(*args, **options)
    except expected as error:
        return error
    raise AssertionError(f"nothing was refused: {reprlib.repr(answer)}")


@contextlib.contextmanager
def guarded(*roots: Path) -> Iterator[Guard]:
    """Fail if anything outside *roots* is read, written, removed or run in the block."""
    guard = Guard.of_this_process()
    with guard.watching(*roots):
        yield guard
    assert guard.seen == [], guard.seen


def sparse(path: Path, size: int, head: bytes = b"") -> None:
    """A file of *size* bytes that takes no room."""
    path.write_bytes(head)
    os.truncate(path, size)


def command(*words: object) -> tuple[int, str]:
    """Run the ``ckptmgr`` command; its exit status and all it printed."""
    import io

    from ckptmgr.cli import main

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main([str(word) for word in words])
    sys.stdout.flush()
    return status, out.buffer.getvalue().decode(errors="replace")  # type: ignore[attr-defined]


def tame(*words: object) -> str:
    """Run the command on what is hostile: no bug, no refusal of the system, nothing that steers a terminal."""
    status, printed = command(*words)
    assert status in (0, 2, 3, 4, 5, 10, 11, 12), f"{words}: status {status}\n{printed}"
    assert "Traceback" not in printed, printed
    assert not [char for char in printed if not char.isprintable() and char != "\n"], repr(printed)
    return printed
