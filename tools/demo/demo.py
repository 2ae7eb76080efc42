#!/usr/bin/env python3
"""
Kill a training job in the middle of a save, and see that nothing is lost. About two minutes.

    tools/demo/demo.py [--small] [--into runs/demo]

1. `train.py` trains a small language model on two ranks without interruption.
2. The same job again; both ranks get SIGKILL while the journal says that a checkpoint is WRITING.
3. The command line tool says what the crash left and what to resume from.
4. The job starts again, and its losses and final weights are those of the uninterrupted run, to the bit.
5. One rank instead of two loads the same weights, to the bit.
6. ``from_pretrained`` loads the export, which answers as the trained model did, to the bit.

Nothing is simulated: the ranks are processes, the signal is real, and the comparison is of SHA-256
hashes of all weights. The runs stay in ``runs/demo`` for you to look around. Exit status 0 if every claim holds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from ckptmgr.errors import JournalError
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState

HERE = Path(__file__).resolve().parent
TRAIN = HERE / "train.py"
CHECK_EXPORT = HERE.parent / "validation" / "check_export.py"
RANKS = 2
STOPPED_WITHIN_S = 5.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """
    How big the demonstration is, and when the job is killed.

    Args:
        steps: Steps of the whole run; a multiple of the next two.
        save_every: Steps between checkpoints.
        export_every: Steps between exports.
        hidden: Hidden size of the model.
        layers: Its layers.
        experts: Its experts per layer.
        expert_width: Their inner size.
        length: Bytes per window of text.
        kill_in: The state in which the journal shows a checkpoint when the job is killed.
        kill_from: The first step whose checkpoint may be the one.
        limit_s: For one start of the job, in seconds.
    """

    steps: int = 60
    save_every: int = 10
    export_every: int = 20
    hidden: int = 256
    layers: int = 4
    experts: int = 8
    expert_width: int = 512
    length: int = 128
    kill_in: CheckpointState = CheckpointState.WRITING
    kill_from: int = 30
    limit_s: float = 600.0

    def flags(self) -> list[str]:
        """The flags of ``train.py``."""
        names = ("steps", "save_every", "export_every", "hidden", "layers", "experts", "expert_width", "length")
        return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(self, name)))]


FULL = Settings()
SMALL = Settings(
    steps=24, save_every=2, export_every=12, hidden=64, layers=2, experts=4, expert_width=64, length=32, kill_from=4
)


class DemoFailed(Exception):
    """The demonstration could not be carried out; nothing is said about its claims."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that must be true, and the figures that show whether it is."""

    text: str
    holds: bool
    figures: str = ""


@dataclasses.dataclass(frozen=True)
class Killed:
    """What stood where when the job was killed."""

    record: CheckpointRecord
    step: int
    bytes_written: int
    bytes_of_files: int
    writers: int
    writers_left: int
    writers_gone_s: float


# -- one start of the job ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What one start of the job wrote down; it may still be writing."""

    path: Path

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of one kind so far."""
        try:
            lines = self.path.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        # A killed rank may leave half a line.
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in found if event["event"] == kind]


class Job:
    """
    Ranks of `train.py` as processes. Leaving the block leaves none behind.

    Args:
        folder: For reports and logs.
        name: What they are called.
        run: The run directory.
        settings: How big.
        ranks: How many processes.
    """

    def __init__(self, folder: Path, name: str, run: Path, settings: Settings, *, ranks: int = RANKS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.report = Report(folder / f"{name}.jsonl")
        self.logs = [folder / f"{name}.rank-{rank}.log" for rank in range(ranks)]
        self._settings = settings
        self._started = time.monotonic()
        rendezvous = folder / f"{name}.rendezvous"
        rendezvous.unlink(missing_ok=True)
        self.report.path.unlink(missing_ok=True)
        self._ranks: list[subprocess.Popen[bytes]] = []
        for rank, log in enumerate(self.logs):
            command = [sys.executable, str(TRAIN), str(run), "--report", str(self.report.path), "--logits", str(folder)]
            with log.open("wb") as output:
                self._ranks.append(
                    subprocess.Popen(
                        [*command, "--rendezvous", str(rendezvous), *settings.flags()],
                        env={
                            **os.environ,
                            "RANK": str(rank),
                            "WORLD_SIZE": str(ranks),
                            "OMP_NUM_THREADS": "1",
                            # All ranks are on this machine, whatever its name resolves to.
                            "GLOO_SOCKET_IFNAME": "lo",
                            "PYTHONWARNINGS": "ignore::FutureWarning",
                        },
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.send(signal.SIGKILL)
        for rank in self._ranks:
            rank.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank, and to nothing else."""
        for rank in self._ranks:
            rank.send_signal(number)

    def wait(self, progress: Callable[[Report], None]) -> None:
        """Wait until every rank has ended well."""
        while not self._over():
            progress(self.report)
            time.sleep(0.1)

    def kill_while(self, state: CheckpointState, journal_path: Path, progress: Callable[[Report], None]) -> Killed:
        """
        SIGKILL every rank while the journal shows a checkpoint in *state*.

        The ranks are stopped first, so that nothing moves between the look and the kill; if the
        moment has passed by then, they go on and the next save is tried.

        Args:
            state: PREWRITTEN, WRITING (then bytes must have been written, too) or GATHERED.
            journal_path: The run's journal, only read.
            progress: Called now and then.
        """
        run = journal_path.with_name(journal_path.name.removesuffix(".journal.db"))
        with self._journal(journal_path, progress) as journal, ThreadPoolExecutor(1) as second_look:
            while True:
                record = _newest(journal)
                if record is None or record.state is not state or record.step < self._settings.kill_from:
                    progress(self.report)
                    # A state may last a few milliseconds only.
                    time.sleep(0.001)
                    if self._over():
                        raise DemoFailed(f"the job ended before a checkpoint was seen {state}")
                    continue
                self.send(signal.SIGSTOP)
                written, size = bytes_written(run / record.staging_directory)
                now = second_look.submit(_newest, journal)
                # Rank 0 may have been stopped inside a transaction; it must go on before anyone can look.
                with contextlib.suppress(TimeoutError):
                    if now.result(0.2) == record and (written or state is not CheckpointState.WRITING):
                        break
                self.send(signal.SIGCONT)
        writers = [writer for rank in self._ranks for writer in psutil.Process(rank.pid).children(recursive=True)]
        self.send(signal.SIGKILL)
        killed = time.monotonic()
        while (left := sum(map(_is_alive, writers))) and time.monotonic() < killed + STOPPED_WITHIN_S:
            time.sleep(0.001)
        gone_s = time.monotonic() - killed
        steps = self.report.events("step")
        return Killed(record, steps[-1]["step"] if steps else 0, written, size, len(writers), left, gone_s)

    @contextlib.contextmanager
    def _journal(self, path: Path, progress: Callable[[Report], None]) -> Iterator[Journal]:
        while True:
            try:
                journal = Journal.open_read_only(path)
                break
            except JournalError:  # not there yet, or just being created
                progress(self.report)
                time.sleep(0.05)
                if self._over():
                    raise DemoFailed("the job ended before it created its journal") from None
        with journal:
            yield journal

    def _over(self) -> bool:
        """Whether every rank has ended well."""
        codes = [rank.poll() for rank in self._ranks]
        if any(codes):
            number = next(number for number, code in enumerate(codes) if code)
            tail = "\n".join(self.logs[number].read_text(errors="replace").splitlines()[-15:])
            raise DemoFailed(f"rank {number} ended with status {codes[number]}; {self.logs[number]} ends with\n{tail}")
        if time.monotonic() > self._started + self._settings.limit_s:
            raise DemoFailed(f"the job took longer than {self._settings.limit_s:g} s; see {self.logs[0]}")
        return all(code == 0 for code in codes)


def _newest(journal: Journal) -> CheckpointRecord | None:
    records = journal.checkpoints(series="checkpoint")
    return records[-1] if records else None


def _is_alive(process: psutil.Process) -> bool:
    # Where nobody reaps orphans a dead one stays a zombie.
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def bytes_written(folder: Path) -> tuple[int, int]:
    """Bytes below *folder* that have been written, and that the files there will have."""
    written = size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                size += end
                # Space that is only reserved counts as a hole.
                hole = 0
                while hole < end:
                    try:
                        data = file.seek(hole, os.SEEK_DATA)
                    except OSError:  # no data after this
                        break
                    hole = file.seek(data, os.SEEK_HOLE)
                    written += hole - data
    return written, size


# -- the demonstration ------------------------------------------------------------------------------


class Screen:
    """Headings, lines, and on a terminal one line that shows how far a job is."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._shown = ""
        self._next = 0.0

    def say(self, text: str = "", *, indent: int = 0) -> None:
        """Print *text*, indented."""
        self._clear()
        for line in text.splitlines() or [""]:
            print(" " * indent + line if line else "", flush=True)

    def progress(self, report: Report) -> None:
        """Show how far a job is: often on a terminal, every 15 seconds otherwise."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (0.2 if self._live else 15.0)
        steps = report.events("step")
        text = "starting" if not steps else f"step {steps[-1]['step']}, loss {float.fromhex(steps[-1]['loss']):.2f}"
        if self._live:
            self._clear()
            self._shown = f"    … {text}"
            print(self._shown, end="", flush=True)
        elif steps:
            print(f"    … {text}", flush=True)

    def _clear(self) -> None:
        if self._shown:
            print("\r" + " " * len(self._shown) + "\r", end="")
            self._shown = ""


def demonstrate(folder: Path, settings: Settings, screen: Screen) -> list[Claim]:
    """
    Carry out the six steps below *folder*, which is emptied first.

    Returns:
        The claims, true or not.

    Raises:
        DemoFailed: A step could not be carried out.
    """
    empty(folder)
    logs = folder / "logs"
    whole, broken = folder / "uninterrupted", folder / "interrupted"

    screen.say(f"[1] Train {settings.steps} steps on {RANKS} ranks without interruption, to compare with")
    with Job(logs, "uninterrupted", whole, settings) as job:
        job.wait(screen.progress)
        reference = job.report
    about = reference.events("start")[0]
    screen.say(f"{about['parameters'] / 1e6:.1f} million parameters; {losses_in_words(reference)}", indent=4)

    screen.say(f"[2] The same again, but kill -9 for all ranks while a checkpoint is {settings.kill_in}")
    with Job(logs, "killed", broken, settings) as job:
        killed = job.kill_while(settings.kill_in, journal_of(broken), screen.progress)
    screen.say(killed_in_words(killed), indent=4)

    screen.say("[3] What the crash left, and what to resume from")
    listed = say_command(screen, ["ls", str(broken)])
    checked = say_command(screen, ["check", str(broken)])

    screen.say("[4] Start the killed job again")
    with Job(logs, "resumed", broken, settings) as job:
        job.wait(screen.progress)
        resumed = job.report
        told = [line for line in job.logs[0].read_text().splitlines() if "recovery:" in line]
    screen.say("\n".join(told), indent=4)
    screen.say(f"resumed from step {resumed.events('start')[0]['step']}; {losses_in_words(resumed)}", indent=4)

    screen.say("[5] Resume on one rank instead of two")
    with Job(logs, "one-rank", broken, settings, ranks=1) as job:
        job.wait(screen.progress)
        alone = job.report
    screen.say(f"loaded step {alone.events('start')[0]['step']}, sharded over {RANKS} ranks, as a whole", indent=4)

    screen.say("[6] Load the export with from_pretrained")
    export = broken / "hf" / f"hf-{settings.steps}"
    answered = subprocess.run(
        [sys.executable, str(CHECK_EXPORT), str(export), "--logits", str(logs / f"logits-{settings.steps}.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    screen.say((answered.stdout or answered.stderr).strip(), indent=4)
    screen.say()
    return [
        *crash_claims(killed, listed, checked),
        *resume_claims(settings, killed, broken, reference, resumed),
        one_rank_claim(settings, reference, alone),
        Claim("from_pretrained loads the export, and it answers as the trained model did", answered.returncode == 0),
    ]


def crash_claims(
    killed: Killed, listed: subprocess.CompletedProcess[str], checked: subprocess.CompletedProcess[str]
) -> list[Claim]:
    """What must be true right after the kill."""
    rows = [line.split() for line in listed.stdout.splitlines()]
    shown = [row[2] for row in rows if row[:2] == ["checkpoint", str(killed.record.step)]]
    offered = f"step-{killed.record.step}" in checked.stdout.split("safe to resume from")[-1]
    return [
        Claim(
            "no writer outlives its rank",
            killed.writers == RANKS and killed.writers_left == 0,
            f"{killed.writers - killed.writers_left} of {killed.writers} gone "
            f"{1000 * killed.writers_gone_s:.0f} ms after the kill",
        ),
        Claim(
            f"`ckptmgr ls` shows the checkpoint as {killed.record.state}",
            listed.returncode == 0 and shown == [killed.record.state.value],
        ),
        Claim(
            "`ckptmgr check` offers only what is committed",
            checked.returncode == 0 and "safe to resume from" in checked.stdout and not offered,
        ),
    ]


def resume_claims(settings: Settings, killed: Killed, broken: Path, reference: Report, resumed: Report) -> list[Claim]:
    """What must be true of the run that was killed and started again."""
    rolled_forward = killed.record.state is CheckpointState.GATHERED
    expected = killed.record.step if rolled_forward else killed.record.step - settings.save_every
    became = CheckpointState.COMMITTED if rolled_forward else CheckpointState.FAILED
    with Journal.open_read_only(journal_of(broken)) as journal:
        attempt = journal.checkpoint(killed.record.id)
    start = resumed.events("start")[0]
    ends = [report.events("end")[0] for report in (reference, resumed)]
    wanted = {event["step"]: event["loss"] for event in reference.events("step") if event["step"] > expected}
    losses = {event["step"]: event["loss"] for event in resumed.events("step")}
    same = sum(losses.get(step) == loss for step, loss in wanted.items())
    return [
        Claim(
            f"the checkpoint that was {killed.record.state} is {became} now, and nothing half-written is left",
            attempt.state is became and not (broken / attempt.staging_directory).exists(),
        ),
        Claim(
            "the job resumed from the newest checkpoint that was complete, weights and AdamW as saved",
            start["step"] == expected and same_state(start, hash_at(reference, expected)),
            f"step {start['step']}, weights {start['weights'][:12]}",
        ),
        Claim(
            "every loss after it is that of the uninterrupted run, bit for bit",
            losses.keys() == wanted.keys() and same == len(wanted) > 0,
            f"{same} of {len(wanted)}",
        ),
        Claim(
            "so are the final weights and all that AdamW remembers",
            same_state(*ends),
            f"weights {ends[0]['weights'][:12]} and {ends[1]['weights'][:12]}",
        ),
    ]


def one_rank_claim(settings: Settings, reference: Report, alone: Report) -> Claim:
    """What must be true of the checkpoint of several ranks that one rank loaded."""
    start = alone.events("start")[0]
    return Claim(
        "one rank loads what two ranks saved, bit for bit",
        start["step"] == settings.steps and same_state(start, hash_at(reference, settings.steps)),
        f"weights {start['weights'][:12]}",
    )


def hash_at(report: Report, step: int) -> dict[str, Any]:
    """What the job's state was when it saved *step*."""
    return next((event for event in report.events("hash") if event["step"] == step), {})


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two reports have the same hashes of weights and optimizer."""
    return all(one.get(key) == other.get(key) is not None for key in ("weights", "optimizer"))


def say_command(screen: Screen, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run the command line tool and print command and output."""
    done = subprocess.run([sys.executable, "-m", "ckptmgr", *arguments], capture_output=True, text=True, check=False)
    screen.say(f"$ ckptmgr {' '.join(arguments)}\n{(done.stdout + done.stderr).rstrip()}", indent=4)
    return done


def killed_in_words(killed: Killed) -> str:
    """What stood where when the job was killed."""
    record = killed.record
    text = f"killed after step {killed.step}; {record.series} step {record.step} was {record.state}"
    if record.state is CheckpointState.WRITING:
        text += f", {killed.bytes_written / 1e6:.1f} of {killed.bytes_of_files / 1e6:.1f} MB written"
    return text


def losses_in_words(report: Report) -> str:
    """From which loss to which."""
    losses = [float.fromhex(event["loss"]) for event in report.events("step")]
    return f"loss {losses[0]:.2f} → {losses[-1]:.2f} in {len(losses)} steps"


def figures(folder: Path) -> str:
    """For how long saving held up the training, and how long it took in the background, as a table."""
    rows = [("", "", "training waited", "", "", "committed in the background", "")]
    rows.append(("", "size", "median", "at most", "the first time", "median", "at most"))
    events = [event for name in ("uninterrupted", "resumed") for event in report_of(folder, name).events("save")]
    for series in dict.fromkeys(event["series"] for event in events):
        # The first save of a run also plans and allocates memory.
        first, *waits = (1000 * event["stall_s"] for event in events if event["series"] == series)
        records = [
            record
            for run in ("uninterrupted", "interrupted")
            for record in committed_in(folder / run)
            if record.series == series
        ]
        took = [(record.committed_at or 0) - record.created_at for record in records]
        rows.append(
            (
                series,
                f"{max(record.bytes for record in records) / 1e6:.1f} MB",
                f"{statistics.median(waits):.0f} ms",
                f"{max(waits):.0f} ms",
                f"{first:.0f} ms",
                f"{statistics.median(took):.2f} s",
                f"{max(took):.2f} s",
            )
        )
    return "\n".join(
        f"{name:10}  {size:>8}  {median:16} {most:8} {first:15}  {took:7} {longest}".rstrip()
        for name, size, median, most, first, took, longest in rows
    )


def committed_in(run: Path) -> list[CheckpointRecord]:
    """What the journal of *run* has as committed, whether it is still there or not."""
    with Journal.open_read_only(journal_of(run)) as journal:
        return [record for record in journal.checkpoints() if record.state is CheckpointState.COMMITTED]


def report_of(folder: Path, name: str) -> Report:
    """The report of one start: uninterrupted, killed, resumed or one-rank."""
    return Report(folder / "logs" / f"{name}.jsonl")


def journal_of(run: Path) -> Path:
    """The journal of a run directory."""
    return run.with_name(f"{run.name}.journal.db")


def empty(folder: Path) -> None:
    """Remove what an earlier demonstration left, and nothing else."""
    marker = folder / ".ckptmgr-demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise DemoFailed(f"{folder} is not empty and not from an earlier demonstration; give another with --into")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    marker.touch()


def main(arguments: Sequence[str]) -> int:
    """Run the demonstration; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model: half a minute, figures mean nothing")
    parser.add_argument("--into", type=Path, default=Path("runs/demo"), help="where the runs go; emptied first")
    options = parser.parse_args(arguments)
    screen = Screen()
    started = time.monotonic()
    try:
        claims = demonstrate(options.into, SMALL if options.small else FULL, screen)
    except DemoFailed as error:
        screen.say(f"the demonstration could not be carried out: {error}")
        return 1
    except KeyboardInterrupt:
        screen.say("interrupted")
        return 130
    for claim in claims:
        about = f"  ({claim.figures})" if claim.figures else ""
        screen.say(f"{'PASS' if claim.holds else 'FAIL'}  {claim.text}{about}")
    screen.say(f"\n{figures(options.into)}\n")
    good = all(claim.holds for claim in claims)
    screen.say(f"{'Every claim holds' if good else 'NOT every claim holds'}; {time.monotonic() - started:.0f} s.")
    command = os.path.relpath(Path(sys.executable).with_name("ckptmgr"))
    screen.say(f"Look around: {command} log {options.into}/interrupted")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
