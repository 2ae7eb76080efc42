"""Real storage for tests: mounts that go again, a doctor in a process of its own, and faults put into its calls."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 60.0


@dataclasses.dataclass(frozen=True)
class Seen:
    """What ``ckptmgr doctor --json`` said."""

    code: int
    document: Mapping[str, Any]
    err: str

    def levels(self, place: int = 0) -> dict[str, str]:
        """The worst level of each id at one of the places."""
        order = ("ok", "info", "warning", "error")
        found: dict[str, str] = {}
        for finding in self.document["findings"]:
            if finding["path"] == self.document["places"][place]["path"]:
                found[finding["id"]] = max(found.get(finding["id"], "ok"), finding["level"], key=order.index)
        return found

    def bad(self, place: int = 0) -> dict[str, str]:
        """The ids that are worse than information."""
        return {id: level for id, level in self.levels(place).items() if level in ("warning", "error")}

    def text(self, id: str) -> str:
        """What was said under an id."""
        return "; ".join(finding["text"] for finding in self.document["findings"] if finding["id"] == id)


def environment() -> dict[str, str]:
    """That of a process which imports the package these tests import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "ckptmgr", "doctor", *map(str, words)]


def doctor(
    *words: str | Path, before: Sequence[str] = (), env: Mapping[str, str] | None = None, **options: Any
) -> Seen:
    """Run the command with ``--json``, behind the words *before* if there are any."""
    options = {"capture_output": True, "text": True, "timeout": DEADLINE_S, **options}
    done = subprocess.run(
        [*before, *command("--json", *words)], env={**environment(), **(env or {})}, check=False, **options
    )
    assert done.stdout, done.stderr
    return Seen(done.returncode, json.loads(done.stdout), done.stderr)


def with_fault(fault: str, trace: Path, *words: str | Path) -> Seen:
    """Run the doctor under strace with *fault*, such as ``fsync:error=EIO``, put into all its processes."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace to put faults into system calls")
    call = fault.partition(":")[0]
    strace = ["strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={call}", "-e", f"inject={fault}"]
    seen = doctor(*words, before=strace)
    # A process that is killed while a call of it is delayed leaves no more than the call.
    assert ("INJECTED" if "delay" not in fault else f"{call}(") in trace.read_text(), f"strace put no {fault} in"
    return seen


def trials_of(directory: Path) -> list[int]:
    """The processes that try *directory*, zombies left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if b"ckptmgr.doctor.trials" in words and os.fsencode(directory) in b"\0".join(words):
                    found.append(int(folder.name))
    return found


def until(what: Callable[[], Any], within_s: float = 20.0) -> Any:
    """Wait for something to become true; what it became."""
    deadline = time.monotonic() + within_s
    while not (value := what()):
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.005)
    return value


def rows(text: str, id: str) -> list[str]:
    """The rows of the printed tables with this id."""
    return [line for line in text.splitlines() if line.split()[1:2] == [id]]


def made_in(directory: Path) -> list[str]:
    """Names of the directories that doctors have made."""
    return sorted(path.name for path in directory.iterdir() if path.name.startswith(".ckptmgr-doctor."))


def _ran(*words: str | Path) -> None:
    if shutil.which(str(words[0])) is None:
        pytest.skip(f"needs {words[0]}")
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    if done.returncode:
        pytest.skip(f"{words[0]} cannot do this here: {(done.stderr or done.stdout).strip()[:200]}")


def _unmount(point: Path) -> None:
    """It is busy for as long as a process that was killed takes to end."""
    until(lambda: not subprocess.run(["umount", str(point)], check=False, timeout=DEADLINE_S).returncode)


class Mounts:
    """Makes mounts below a folder, and takes them away again."""

    def __init__(self, folder: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root to mount")
        self._folder = folder
        self._last = contextlib.ExitStack()

    def __enter__(self) -> Mounts:
        return self

    def __exit__(self, *_: object) -> None:
        self._last.close()

    def mount(self, *words: str | Path, at: Path | None = None) -> Path:
        """Mount as mount(8) with these words says; at a new folder unless *at* says where."""
        point = at or self._new("mount")
        _ran("mount", *words, point)
        self._last.callback(_unmount, point)
        return point

    def ext4(self, *options: str, megabytes: int = 16) -> Path:
        """A fresh ext4 in a file, made with these options of mke2fs."""
        image = self._new("image") / "disk"
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        _ran("mkfs.ext4", "-q", *options, image)
        return self.mount("-o", "loop", image)

    def xfs(self) -> Path:
        """A fresh XFS in a file, which takes a small part of its size."""
        image = self._new("image") / "disk"
        with image.open("wb") as file:
            file.truncate(320 << 20)
        _ran("mkfs.xfs", "-q", image)
        return self.mount("-o", "loop", image)

    def exfat(self) -> Path:
        """A fresh exFAT behind FUSE: a file system that does not tell upper from lower case."""
        if shutil.which("mount.exfat-fuse") is None or shutil.which("mkfs.exfat") is None:
            pytest.skip("needs the Debian packages exfat-fuse and exfatprogs")
        image, point = self._new("image") / "disk", self._new("mount")
        with image.open("wb") as file:
            file.truncate(16 << 20)
        made = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"no loop device: {made.stderr}")
        device = made.stdout.strip()
        self._last.callback(subprocess.run, ["losetup", "-d", device], check=True)
        _ran("mkfs.exfat", device)
        _ran("mount.exfat-fuse", device, point)
        # The program that serves it lets go of the device a moment after it is unmounted.
        self._last.callback(time.sleep, 0.3)
        self._last.callback(_unmount, point)
        return point

    def bindfs(self) -> tuple[Path, Path, subprocess.Popen[bytes]]:
        """A folder behind FUSE: where it is mounted, what it shows, and the process that serves it."""
        if shutil.which("bindfs") is None:
            pytest.skip("needs the Debian package bindfs")
        behind, point = self._new("behind"), self._new("mount")
        process = subprocess.Popen(["bindfs", "-f", str(behind), str(point)], stderr=subprocess.PIPE)

        def end() -> None:
            process.send_signal(signal.SIGCONT)  # or it could not be unmounted
            try:
                until(lambda: not trials_of(point))
                _unmount(point)
            finally:
                process.terminate()
                process.communicate(timeout=DEADLINE_S)

        self._last.callback(end)
        until(lambda: os.path.ismount(point) or process.poll() is not None)
        assert process.poll() is None
        return point, behind, process

    def _new(self, name: str) -> Path:
        for number in range(1000):
            path = self._folder / f"{name}-{number}"
            if not path.exists():
                path.mkdir()
                return path
        raise AssertionError("too many")


@contextlib.contextmanager
def running(*words: str | Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A doctor under way in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(*words), env=environment(), **{**pipes, **options}) as child:
        try:
            yield child
        finally:
            child.kill()
