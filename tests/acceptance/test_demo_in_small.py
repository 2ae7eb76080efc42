"""What `make demo` claims, with a tiny model; and the same for a kill after the point of no return."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo
import pytest

from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointState

# One worker runs them all, so that they share one demonstration.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("demo")]


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """What ``tools/demo/demo.py --small`` left and said."""

    folder: Path
    status: int
    output: str

    def report(self, name: str) -> demo.Report:
        return demo.report_of(self.folder, name)


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    folder = tmp_path_factory.mktemp("demo") / "runs"
    done = subprocess.run(
        [sys.executable, demo.__file__, "--small", "--into", str(folder)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    return Demonstration(folder, done.returncode, done.stdout + done.stderr)


def test_a_job_killed_in_the_middle_of_a_save_loses_nothing(demonstration):
    verdicts = [line for line in demonstration.output.splitlines() if line.startswith(("PASS", "FAIL"))]

    assert demonstration.status == 0, demonstration.output
    assert len(verdicts) == 9, demonstration.output
    assert all(line.startswith("PASS") for line in verdicts), demonstration.output


def test_the_kill_hit_a_checkpoint_that_was_being_written(demonstration):
    with Journal.open_read_only(demo.journal_of(demonstration.folder / "interrupted")) as journal:
        failed = [record for record in journal.checkpoints() if record.state is CheckpointState.FAILED]
        (victim,) = [record for record in failed if record.series == "checkpoint"]
        walk = [(row.source, row.dest) for row in journal.transitions(victim.id)]
        epochs = journal.epochs()

    assert walk[-1] == (CheckpointState.WRITING, CheckpointState.FAILED)
    # The killed start, the resumed one, and the one on a single rank; the first never ended.
    assert [epoch.ended_at is None for epoch in epochs] == [True, False, False]


def test_a_checkpoint_that_was_gathered_when_the_job_was_killed_is_not_lost(demonstration, tmp_path):
    run, logs = tmp_path / "run", tmp_path / "logs"
    screen = demo.Screen()
    with demo.Job(logs, "killed", run, demo.SMALL) as job:
        killed = job.kill_while(CheckpointState.GATHERED, demo.journal_of(run), screen.progress)
    listed, checked = (demo.say_command(screen, [command, str(run)]) for command in ("ls", "check"))
    with demo.Job(logs, "resumed", run, demo.SMALL) as job:
        job.wait(screen.progress)
    claims = [
        *demo.crash_claims(killed, listed, checked),
        *demo.resume_claims(demo.SMALL, killed, run, demonstration.report("uninterrupted"), job.report),
    ]

    assert [claim for claim in claims if not claim.holds] == []
    assert job.report.events("start")[0]["step"] == killed.record.step


def falsified(demonstration: Demonstration, change: Callable[[dict[str, Any]], None], into: Path) -> list[demo.Claim]:
    """What the demonstration would claim, had the resumed job reported something else."""
    lines = [json.loads(line) for line in demonstration.report("resumed").path.read_text().splitlines()]
    for event in lines:
        change(event)
    path = into / "resumed.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in lines))
    with Journal.open_read_only(demo.journal_of(demonstration.folder / "interrupted")) as journal:
        failed = [
            record for record in journal.checkpoints(series="checkpoint") if record.state is CheckpointState.FAILED
        ]
    record = dataclasses.replace(failed[0], state=CheckpointState.WRITING)
    killed = demo.Killed(record, record.step, 1, 1, demo.RANKS, 0, 0.0)
    reference = demonstration.report("uninterrupted")
    broken = demonstration.folder / "interrupted"
    return demo.resume_claims(demo.SMALL, killed, broken, reference, demo.Report(path))


def test_the_claims_hold_for_what_was_reported(demonstration, tmp_path):
    assert all(claim.holds for claim in falsified(demonstration, lambda event: None, tmp_path))


@pytest.mark.parametrize(
    ("event", "key", "value", "claim"),
    [
        ("start", "step", 0, "resumed from the newest"),
        ("start", "weights", "0" * 64, "resumed from the newest"),
        ("start", "optimizer", "0" * 64, "resumed from the newest"),
        ("step", "loss", (5.0).hex(), "every loss"),
        ("end", "weights", "0" * 64, "final weights"),
        ("end", "optimizer", "0" * 64, "final weights"),
    ],
)
def test_a_claim_fails_when_what_it_says_is_not_so(demonstration, tmp_path, event, key, value, claim):
    def change(one: dict[str, Any]) -> None:
        if one["event"] == event:
            one[key] = value

    wrong = [found.text for found in falsified(demonstration, change, tmp_path) if not found.holds]

    assert len(wrong) == 1
    assert claim in wrong[0]


def test_a_directory_that_is_not_the_demonstrations_own_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")

    assert demo.main(["--small", "--into", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().out
    assert (tmp_path / "thesis.txt").read_text() == "mine"
