"""Readers and a busy writer together, in real processes: nobody waits for long, nobody fails, nobody is held up."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from run_on_disk import Run, in_child

from ckptmgr.journal import Journal

SAVES = 60
#: Saves as a manager makes them, one transaction after the other without a pause, and says how many it has made.
WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from run_on_disk import Run
run = Run(Path(sys.argv[2]))
print("ready", flush=True)
for step in range(1, int(sys.argv[3]) + 1):
    run.save(step)
print("done", flush=True)
"""


def test_readers_and_a_busy_writer_do_not_hold_each_other_up(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "alpha"
    Run(directory).journal.close()
    here = str(Path(__file__).parent)
    words = [sys.executable, "-c", WRITER, here, str(directory), str(SAVES)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            codes: list[tuple[str, int]] = []
            looked = 0
            while writer.poll() is None and looked < 500:
                for command in ("ls", "latest", "check", "log", "stats"):
                    done = in_child(command, directory)
                    codes.append((command, done.code))
                    assert "Traceback" not in done.err, done.err
                    looked += 1
            assert writer.wait(timeout=60) == 0
            assert writer.stdout.read() == "done\n"
        finally:
            writer.kill()

    # Nothing to resume from before the first commit is an answer too.
    assert {code for command, code in codes if command not in ("latest", "check")} == {0}
    assert {code for command, code in codes} <= {0, 3}
    with Journal.open_read_only(directory.with_name("alpha.journal.db"), whole=True) as journal:
        assert [record.step for record in journal.checkpoints(live_only=True)] == [*range(1, SAVES + 1)]


def test_a_reader_that_stays_open_holds_no_lock_between_two_questions(run: Run) -> None:
    """`log --follow` and `watch` keep the journal open for days."""
    with Journal.open_read_only(run.journal_path) as reader:
        for step in range(20):
            reader.checkpoints()
            began = time.monotonic()
            run.save(step)
            # Longer than this, and it has waited for a lock.
            assert time.monotonic() - began < 10
        assert len(reader.checkpoints()) == 20
