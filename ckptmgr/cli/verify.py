"""``ckptmgr verify``: compare the bytes of committed checkpoints with what was committed, and remember when."""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptmgr import requests
from ckptmgr.cli import asking, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted, Progress, age, duration, size, timestamp
from ckptmgr.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    InvalidArgument,
    JournalCorrupt,
    RunLocked,
)
from ckptmgr.lifecycle import CheckpointState, Verified
from ckptmgr.manifest import MANIFEST_NAME
from ckptmgr.pace import Pace
from ckptmgr.requests import Answer

if TYPE_CHECKING:
    from ckptmgr.journal import Journal, Questions, Verification
    from ckptmgr.lifecycle import CheckpointRecord
    from ckptmgr.rundir import RunDirectory

DESCRIPTION = """\
Read every byte of committed checkpoints and compare the digests with what was
committed: of all of them, those that were verified longest ago first, or of a
part. When and how it went is recorded in the journal as it goes, and shown by
`ls` and `show`, so that an interrupted run can be gone on with: with
--older-than, what was found intact since is left out. The manager of a
live run is asked to record it; otherwise the run lock is taken for that."""
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
#: How long a manager is waited for while there is more to read, or after Ctrl-C; at the end it is asked again.
_PATIENCE_S = 5.0
#: How many checkpoints one reason names.
_NAMED = 3
#: What differs in all that one request tells of, in characters; JSON may take twelve bytes for each.
_MOST_CHARACTERS = requests.MAX_BYTES // 32


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
    asking.configure(parser)


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

    @property
    def verified(self) -> Verified:
        """As the journal keeps it, and as a manager can be told."""
        texts = (
            text.encode(errors="backslashreplace").decode() for text in self.mismatches[: requests.MOST_MISMATCHES]
        )
        cut = tuple(text[: requests.LONGEST_MISMATCH] for text in texts)
        return Verified(self.record.id, self.result == INTACT, cut, self.before.id if self.before is not None else 0)


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
        book = Book(rundir, out, args.timeout)
        if chosen and (why := book.try_lock()):
            out.note(f"what is found will not be recorded: {why}", "run it again when the run is not in use")
        compared = verify(journal, rundir, chosen, book=book, pace=Pace(args.max_bytes_per_second), out=out)
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
                "by": book.by,
                "checkpoints": [document(one, rundir) for one in compared],
            }
        )
        return code
    if not chosen:
        out.note("there is nothing to verify" + (f": {len(live)} are verified already" if live else ""))
        return code
    book.say_what_is_missing()
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
    *,
    book: Book,
    pace: Pace,
    out: Output,
) -> list[Compared]:
    """Compare each of *chosen*, print it, and have *book* record it, an interrupted run's too."""
    progress = Progress(out, sum(record.bytes for record in chosen))
    table = out.table("RESULT", "SERIES", "STEP", "SIZE", "BEFORE", "WHAT", right=("STEP", "SIZE"))
    done = []
    is_interrupted = False
    try:
        for record in chosen:

            def read(count: int, doing: str = f"verifying {record.directory}") -> None:
                progress.add(count, doing)
                pace.wait(count)

            before = journal.newest_verifications([record.id]).get(record.id)
            one = compare(journal, rundir, record, before, read)
            done.append(one)
            out.progress(None)
            if one.result != GONE:
                book.add(one)
            if not out.as_json:
                table.add(rows(one))
    except KeyboardInterrupt:
        # No more in here: what is left of a question to the journal locks it as long as a traceback holds that.
        is_interrupted = True
    if not is_interrupted:
        book.write()
        return done
    out.progress(None)
    book.write(within_s=_PATIENCE_S)
    book.say_what_is_missing()
    if any(one.recorded for one in done):
        out.note("what was verified is recorded", "`ckptmgr verify RUN --older-than 1d` goes on with the rest")
    raise KeyboardInterrupt


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
    Has the journal say what was compared.

    The run lock is taken for the moment of writing only: verifying takes hours, and a training must be able to
    start meanwhile. No epoch is taken: nothing that an epoch guards is changed, and a manager whose lock does
    not reach this host must not be fenced off by somebody who only looks. A manager that has the run is asked.

    Attributes:
        refused: Why the last attempt to record was refused, in words; None if it was not.
        by: The manager that recorded some of it last, in words; None if none did.
    """

    def __init__(self, rundir: RunDirectory, out: Output, timeout_s: float) -> None:
        self._rundir = rundir
        self._out = out
        self._timeout_s = timeout_s
        self._waiting: list[Compared] = []
        self._outdated: list[Compared] = []
        self._written_at = time.monotonic()
        self._hint = ""
        self.refused: str | None = None
        self.by: str | None = None

    def try_lock(self) -> str | None:
        """Why nothing could be recorded now, neither here nor by a manager that is asked, or None."""
        try:
            with target.locked(self._rundir, COMMAND):
                pass
        except CheckpointError as error:
            if not (isinstance(error, RunLocked) and asking.can_be_asked(error)):
                self.refused = error.message
        return self.refused

    def add(self, compared: Compared) -> None:
        """Record it, now or a little later."""
        self._waiting.append(compared)
        if time.monotonic() - self._written_at > _RECORD_EVERY_S:
            self.write(within_s=_PATIENCE_S)

    def write(self, *, within_s: float | None = None) -> None:
        """
        Record what waits; what is refused goes on waiting.

        Args:
            within_s: How long to wait for a manager, if not as long as the command was told to.

        Raises:
            JournalCorrupt: The journal is damaged.
        """
        # A manager may have come or gone since the last time.
        if self._waiting:
            self.refused, self._hint = None, ""
        timeout_s = self._timeout_s if within_s is None else min(within_s, self._timeout_s)
        for series, several in parts(self._waiting):
            try:
                self._record(series, several, timeout_s)
            except JournalCorrupt:
                raise
            except CheckpointError as error:
                self.refused, self._hint = error.message, error.hint
                if isinstance(error, RunLocked):  # nobody answers; waiting again for each part would take too long
                    break
            except OSError as error:
                place, why = self._rundir.path / requests.DIRECTORY, error.strerror or error
                self.refused, self._hint = f"the manager that has the run cannot be asked through {place}: {why}", ""
        if self._outdated and self.refused is None:
            some = ", ".join(f"{one.record.series} step {one.record.step}" for one in self._outdated[:_NAMED])
            more = f" and {len(self._outdated) - _NAMED} more" if len(self._outdated) > _NAMED else ""
            self.refused = f"{requests.OUTDATED}: {some}{more}"
            self._hint = "verify it again: the damage stays on record until it is read anew and found intact"
        self._written_at = time.monotonic()

    def say_what_is_missing(self) -> None:
        """Say what could not be recorded, and why."""
        if self._waiting or self._outdated:
            self._out.note(f"not all of this is recorded: {self.refused}", self._hint)

    def _record(self, series: str, several: Sequence[Compared], timeout_s: float) -> None:
        verified = tuple(one.verified for one in several)

        def here(journal: Journal) -> Answer:
            outdated = journal.record_verifications(verified, level="digest")
            return Answer(requests.DONE, keep=dict.fromkeys(outdated, (requests.OUTDATED,)))

        answer, by = asking.carry_out(
            self._rundir, self._out, command=COMMAND, here=here, timeout_s=timeout_s,
            kind=requests.VERIFY, series=series, verified=verified,
        )  # fmt: skip
        self.by = by or self.by
        for one in several:
            one.recorded = one.record.id not in answer.keep
            if not one.recorded:
                self._outdated.append(one)
        told = {one.record.id for one in several}
        self._waiting = [one for one in self._waiting if one.record.id not in told]


def parts(waiting: Sequence[Compared]) -> Iterator[tuple[str, Sequence[Compared]]]:
    """What waits, in parts of one series each, none of them too much for one request."""
    for series in dict.fromkeys(one.record.series for one in waiting):
        several: list[Compared] = []
        characters = 0
        for one in waiting:
            if one.record.series != series:
                continue
            characters += sum(map(len, one.verified.mismatches))
            if several and (len(several) == requests.MOST_VERIFIED or characters > _MOST_CHARACTERS):
                yield series, several
                several, characters = [], sum(map(len, one.verified.mismatches))
            several.append(one)
        yield series, several


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
