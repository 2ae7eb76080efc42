"""
A trainer in a process of its own, that does what it is told line by line.

    save 5 …        save these steps, one after the other, and wait for each
    saving          save on and on, each step a little later than the last, until it is told something else
    resume 5        resume from a step
    hooks 3         from now on hooks take that many seconds
    close           close the manager
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Trainer:
    """The process, seen from a test. It looks for requests all the time."""

    def __init__(self, run: Path, *, keep: str = "KeepAll()", die_at: str = "", look_every_s: float = 0.05) -> None:
        self.run = run
        self.closed = False
        here = Path(__file__)
        paths = [str(here.parents[1]), *filter(None, sys.path)]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(here), str(run), keep, die_at, str(look_every_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        self.wait_for("open")

    def wait_for(self, word: str) -> None:
        """Read until the trainer says *word*."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word:
                return
        raise AssertionError(f"the trainer ended with {self.process.wait()} before it said {word!r}")

    def begin(self, words: str) -> None:
        """Tell it something, and do not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()

    def tell(self, words: str) -> None:
        """Tell it something, and wait until it is done."""
        self.begin(words)
        self.wait_for(f"did {words}")
        self.closed = words == "close"

    def ended(self) -> int:
        """Wait for its end."""
        return self.process.wait(30)

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None and self.process.poll() is None:
            if not self.closed:
                self.tell("close")
            assert self.ended() == 0
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


# --- in the process ----------------------------------------------------------------------------


def lines() -> queue.SimpleQueue[str]:
    """What comes in."""
    told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            told.put(line.strip())
        os._exit(3)  # the test is gone

    threading.Thread(target=listen, daemon=True).start()
    return told


def train(run: Path, keep: str, die_at: str, look_every_s: str) -> None:
    import torch
    from child_process import AtComment, arm

    from ckptmgr import DCP, CheckpointManager, Series, commit, retention

    if die_at:
        arm(AtComment(die_at), run)
    commit.LOOK_EVERY_S = float(look_every_s)
    hooks_take_s = 0.0
    told = lines()

    def state(step: int) -> dict[str, Any]:
        return {"weights": torch.full((100,), float(step)), "step": step}

    def steps() -> Iterator[int]:
        step = 1_000_000
        while told.empty():
            yield step
            step += 1

    rule = eval(keep, vars(retention))
    with CheckpointManager(
        run, [Series("checkpoint", DCP(), keep=rule)], on_commit=lambda _: time.sleep(hooks_take_s)
    ) as manager:
        print("open", flush=True)
        while True:
            words = told.get()
            command, *numbers = words.split()
            if command == "save":
                for step in map(int, numbers):
                    manager.save(step, state(step), metrics={"loss": 1 / (step + 1)}).wait()
            elif command == "saving":
                print(f"did {words}", flush=True)
                for step in steps():
                    manager.save(step, state(step)).wait()
                continue
            elif command == "resume":
                assert manager.resume(state(0), int(numbers[0])) is not None
            elif command == "hooks":
                hooks_take_s = float(numbers[0])
            elif command == "close":
                break
            print(f"did {words}", flush=True)
    print("did close", flush=True)


if __name__ == "__main__":
    train(Path(sys.argv[1]), *sys.argv[2:])
