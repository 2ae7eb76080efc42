"""``ckptmgr verify``: compare the bytes of committed checkpoints with what was committed, and remember when."""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptmgr.cli import target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted, Progress, age, duration, size, timestamp
from ckptmgr.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, InvalidArgument, JournalCorrupt
from ckptmgr.lifecycle import CheckpointState
from ckptmgr.manifest import MANIFEST_NAME
from ckptmgr.pace import Pace

if TYPE_CHECKING:
    from ckptmgr.journal import Questions, Verification
    from ckptmgr.lifecycle import CheckpointRecord
    from ckptmgr.rundir import RunDirectory

DESCRIPTION = """\
Read every byte of committed checkpoints and compare the digests with what was
committed: of all of them, those that were verified longest ago first, or of a
part. When and how it went is recorded in the journal as it goes, and shown by
`ls` and `show`, so that an interrupted run can be gone on with: with
--older-than, what was found intact since is left out. Beside a running
training it reads and reports, but the journal is not its to write."""
EXAMPLES = """\
  ckptmgr verify runs/alpha
  ckptmgr verify runs/alpha --newest
  ckptmgr verify runs/alpha --subset 10% --max-bytes-per-second 200MB
  ckptmgr verify runs/alpha --older-than 7d --json"""

COMMAND = "ckptmgr verify"
INTACT, DAMAGED, GONE = "intact", "damaged", "gone"

#: The journal is written, and the run lock held for that, at most so often: a manager cannot start meanwhile.
_RECORD_EVERY_S = 30.0
#: How often a checkpoint is read whose rows change meanwhile.
_LOOKS = 5
#: What differs in one checkpoint, as far as the journal keeps it.
_NOTED = 100


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--series", metavar="NAME", help="only this series")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", metavar="N", type=target.step, help="only the checkpoint of this step")
    which.add_argument("--newest", action="store_true", help="only the newest checkpoint of each series")
    which.add_argument(
        "--subset", metavar="PART", type=part, help="whole checkpoints until so much is read: 10%%, or 100GB"
    )
    parser.add_argument(
        "--older-than", metavar="AGE", type=target.period, help="leave out what was found intact since: 12h, 7d"
    )
    parser.add_argument(
        "--max-bytes-per-second", metavar="SIZE", type=target.size, default=0, help="read no faster, such as 200MB"
    )


def part(text: str) -> Callable[[int], int]:
    """The argparse type of ``--subset``: how many of so many bytes."""
    if not text.endswith("%"):
        wanted = target.size(text)
        return lambda _: wanted
    try:
        percent = float(text[:-1])
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no part: give above 0% to 100%, or a size such as 100GB")
    return lambda total: round(total * percent / 100)


@dataclasses.dataclass
class Compared:
    """How one checkpoint turned out."""

    record: CheckpointRecord
    before: Verification | None
    result: str
    mismatches: tuple[str, ...] = ()
    recorded: bool = False


def run(args: argparse.Namespace, out: Output) -> int:
    """Verify, report and record."""
    began = time.monotonic()
    with target.reading(args, directory=True) as (journal, rundir):
        if not rundir.path.is_dir():
            raise InvalidArgument(f"there is no run directory {rundir.path}", hint="put it back, or mount it, first")
        target.require_series(journal, args.series)
        live = [
            record
            for record in journal.checkpoints(series=args.series, live_only=True)
            if args.step in (None, record.step)
        ]
        if args.step is not None and not live:
            raise CheckpointNotFound(
                f"there is no committed checkpoint of step {args.step}", series=args.series or "", step=args.step
            )
        live = newest_of(live) if args.newest else live
        trust = journal.newest_verifications(record.id for record in live)
        stale = [record for record in live if not is_fresh(trust.get(record.id), time.time(), args.older_than)]
        chosen = choose(stale, trust, part=args.subset)
        book = Book(rundir, journal.run_id)
        if chosen and (why := book.try_lock()):
            out.note(f"what is found will not be recorded: {why}", "run it again when the run is not in use")
        compared = verify(journal, rundir, chosen, trust, book=book, pace=Pace(args.max_bytes_per_second), out=out)
        about = target.document(rundir, journal.run_id)
    damaged = [one for one in compared if one.result == DAMAGED]
    code = Exit.CORRUPT if damaged else Exit.OK
    read = sum(one.record.bytes for one in compared)
    if out.as_json:
        out.document(
            {
                "run": about,
                "exit_code": int(code),
                "bytes": read,
                "took_s": time.monotonic() - began,
                "fresh": len(live) - len(stale),
                "left_out": len(stale) - len(chosen),
                "not_recorded_because": book.refused,
                "checkpoints": [document(one, rundir) for one in compared],
            }
        )
        return code
    if not chosen:
        out.note("there is nothing to verify" + (f": {len(live)} are verified already" if live else ""))
        return code
    # A manager may have come or gone since.
    if any(one.result != GONE and not one.recorded for one in compared):
        out.note(f"not all of this is recorded: {book.refused}")
    if damaged:
        out.line(Painted(f"{len(damaged)} of {len(compared)} checkpoints are damaged", "red"))
        out.note(
            "what is damaged is not to be resumed from", "`ckptmgr check RUN --deep` says which checkpoint is safe"
        )
    else:
        took = duration(time.monotonic() - began)
        out.line(Painted(f"no damage in {len(compared)} checkpoints, {size(read)} read in {took}", "green"))
    if len(stale) > len(chosen):
        out.note(f"{len(stale) - len(chosen)} more were not asked for")
    return code


def is_fresh(last: Verification | None, now: float, older_than: float | None) -> bool:
    """Whether a checkpoint was found intact so lately that it need not be read again."""
    return older_than is not None and last is not None and last.ok and now - last.at < older_than


def newest_of(live: Sequence[CheckpointRecord]) -> list[CheckpointRecord]:
    """Of each series the checkpoint that committed last."""
    last = {record.series: record for record in sorted(live, key=lambda record: record.commit_seq or 0)}
    return list(last.values())


def choose(
    stale: Sequence[CheckpointRecord], trust: Mapping[int, Verification], *, part: Callable[[int], int] | None
) -> list[CheckpointRecord]:
    """
    What to read, in which order: those verified longest ago first, those that never were before them, at random.

    Args:
        stale: The checkpoints that may be read.
        trust: When each was verified.
        part: How many of so many bytes; whole checkpoints are taken until there are as many, and at least one.
    """

    def longest_ago(record: CheckpointRecord) -> tuple[float, float]:
        verified = trust.get(record.id)
        return (verified.at if verified is not None else 0.0, random.random())  # noqa: S311

    ordered = sorted(stale, key=longest_ago)
    if part is None:
        return ordered
    wanted = part(sum(record.bytes for record in stale))
    taken: list[CheckpointRecord] = []
    for record in ordered:
        if taken and sum(one.bytes for one in taken) >= wanted:
            break
        taken.append(record)
    return taken


def verify(
    journal: Questions,
    rundir: RunDirectory,
    chosen: Sequence[CheckpointRecord],
    trust: Mapping[int, Verification],
    *,
    book: Book,
    pace: Pace,
    out: Output,
) -> list[Compared]:
    """Compare each of *chosen*, print it, and have *book* record it, an interrupted run's too."""
    progress = Progress(out, sum(record.bytes for record in chosen))
    table = out.table("RESULT", "SERIES", "STEP", "SIZE", "BEFORE", "WHAT", right=("STEP", "SIZE"))
    done = []
    try:
        for record in chosen:

            def read(count: int, doing: str = f"verifying {record.directory}") -> None:
                progress.add(count, doing)
                pace.wait(count)

            one = compare(journal, rundir, record, trust.get(record.id), read)
            done.append(one)
            if one.result != GONE:
                book.add(one)
            out.progress(None)
            if not out.as_json:
                table.add(rows(one))
    except KeyboardInterrupt:
        book.write()
        out.progress(None)
        if any(one.recorded for one in done):
            out.note("what was verified is recorded", "`ckptmgr verify RUN --older-than 1d` goes on with the rest")
        raise
    book.write()
    return done


def compare(
    journal: Questions,
    rundir: RunDirectory,
    record: CheckpointRecord,
    before: Verification | None,
    read: Callable[[int], None],
) -> Compared:
    """
    Read all of a checkpoint. What a manager lets go or replaces meanwhile is `GONE` and no damage.

    Raises:
        ForeignJournal: The run directory is not there any more, as when its file system is unmounted.
    """
    files = journal.files(record.id)
    for _ in range(_LOOKS):
        rows = journal.of_step(record.series, record.step)
        wrong = mismatches(rundir, record, files, read) if any(is_it(record, row) for row in rows) else ()
        now = journal.of_step(record.series, record.step)
        if not any(is_it(record, row) for row in now):
            return Compared(record, before, GONE)
        if not wrong:
            return Compared(record, before, INTACT)
        rundir.require_pair(journal.run_id, managed=True)
        if now == rows:
            break
    # Publishing swaps the directory of a checkpoint that is overwritten before its row says so.
    if any(row.overwrites == record.id and row.state is CheckpointState.GATHERED for row in now):
        return Compared(record, before, GONE)
    return Compared(record, before, DAMAGED, wrong)


def is_it(record: CheckpointRecord, row: CheckpointRecord) -> bool:
    """Whether *row* is that checkpoint, and still to be resumed from."""
    return row.id == record.id and row.is_live


def mismatches(
    rundir: RunDirectory, record: CheckpointRecord, files: Sequence[Any], read: Callable[[int], None]
) -> tuple[str, ...]:
    """What differs from what was committed, the manifest included, as `RunDirectory.verify` says it."""
    wrong = []
    try:
        _, digest = rundir.read_manifest(record.directory)
        if digest != record.manifest_digest:
            wrong.append(f"manifest: {MANIFEST_NAME} is not the one that was committed")
    except CorruptCheckpoint as error:
        wrong.append(f"manifest: {error.message}")
    except OSError as error:
        wrong.append(f"manifest: {MANIFEST_NAME} cannot be read: {error.strerror or error}")
    return (*wrong, *rundir.verify(record.directory, files, digests=True, progress=read, from_disk=True))


class Book:
    """
    Records in the journal what was compared.

    The run lock is taken for the moment of writing only: verifying takes hours, and a training must be able to
    start meanwhile. No epoch is taken: nothing that an epoch guards is changed, and a manager whose lock does
    not reach this host must not be fenced off by somebody who only looks.

    Attributes:
        refused: Why the last attempt to record was refused, in words; None if it was not.
    """

    def __init__(self, rundir: RunDirectory, run_id: str) -> None:
        self._rundir = rundir
        self._run_id = run_id
        self._waiting: list[Compared] = []
        self._written_at = time.monotonic()
        self.refused: str | None = None

    def try_lock(self) -> str | None:
        """Why nothing could be recorded now, or None."""
        try:
            with target.locked(self._rundir, COMMAND):
                self.refused = None
        except CheckpointError as error:
            self.refused = error.message
        return self.refused

    def add(self, compared: Compared) -> None:
        """Record it, now or a little later."""
        self._waiting.append(compared)
        if time.monotonic() - self._written_at > _RECORD_EVERY_S:
            self.write()

    def write(self) -> None:
        """
        Record what waits; what is refused goes on waiting.

        Raises:
            JournalCorrupt: The journal is damaged.
        """
        from ckptmgr.journal import Journal

        self._written_at = time.monotonic()
        if not self._waiting:
            return
        try:
            with target.locked(self._rundir, COMMAND), Journal.open(self._rundir.journal_path) as journal:
                self._rundir.require_pair(self._run_id)
                while self._waiting:
                    one = self._waiting[0]
                    journal.record_verification(
                        one.record.id, level="digest", ok=one.result == INTACT, mismatches=one.mismatches[:_NOTED]
                    )
                    one.recorded = True
                    self._waiting.pop(0)
        except JournalCorrupt:
            raise
        except CheckpointError as error:
            self.refused = error.message
        else:
            self.refused = None


def rows(one: Compared) -> list[list[str | Painted]]:
    """The lines of the table: one, or one for each mismatch."""
    record = one.record
    colour = {INTACT: "green", DAMAGED: "red", GONE: "dim"}[one.result]
    last = f"{age(time.time() - one.before.at)} ago" if one.before is not None else "never"
    why = one.mismatches or (("retired or replaced meanwhile",) if one.result == GONE else ("",))
    return [
        [Painted(one.result, colour), record.series, str(record.step), size(record.bytes), last, each] for each in why
    ]


def document(one: Compared, rundir: RunDirectory) -> dict[str, Any]:
    """One checkpoint of the JSON contract."""
    return {
        "checkpoint_id": one.record.id,
        "series": one.record.series,
        "step": one.record.step,
        "path": str(rundir.absolute(one.record.directory)),
        "bytes": one.record.bytes,
        "result": one.result,
        "mismatches": list(one.mismatches),
        "recorded": one.recorded,
        "verified_before_at": timestamp(one.before.at) if one.before is not None else None,
        "verified_before_ok": one.before.ok if one.before is not None else None,
    }
