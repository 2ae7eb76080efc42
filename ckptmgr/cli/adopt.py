"""``ckptmgr adopt``: checkpoints of other libraries under the journal of a run; their own directory is only read."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ckptmgr.cli import target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted, Progress, size
from ckptmgr.errors import InvalidArgument, JournalNotFound

if TYPE_CHECKING:
    from ckptmgr.adoption import Left, Source
    from ckptmgr.journal import Questions
    from ckptmgr.lifecycle import CheckpointRecord
    from ckptmgr.rundir import RunDirectory

DESCRIPTION = """\
Bring checkpoints that ckptmgr did not write under the journal of RUN, a new
run or one that there is: each is judged, linked into RUN, read once for its
digests, and committed. The directory that they come from is only read.

Taken in is what can be loaded afterwards: checkpoints of
torch.distributed.checkpoint (torchtitan, xtuner) by a manager, and weights of
Hugging Face, also those of its Trainer and of xtuner, by from_pretrained.
Nothing is changed without --apply, which takes the run lock."""
EXAMPLES = """\
  ckptmgr adopt runs/alpha --from outputs
  ckptmgr adopt runs/alpha --from outputs --apply
  ckptmgr adopt runs/alpha --from /mnt/old/outputs --copy --apply
  ckptmgr adopt runs/alpha --from somebody/final --as-step 120000 --apply"""
COMMAND = "ckptmgr adopt"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--from", dest="source", metavar="DIR", required=True, help="where the checkpoints stand")
    parser.add_argument("--series", metavar="NAME", choices=("checkpoint", "hf"), help="only checkpoint, or only hf")
    parser.add_argument("--step", metavar="N", type=target.step, help="only this one, also if RUN has a later one")
    parser.add_argument("--as-step", metavar="N", type=target.step, help="the step of the only one, by your word")
    parser.add_argument("--copy", action="store_true", help="copy the bytes instead of sharing them by hard links")
    parser.add_argument("--deep", action="store_true", help="compare checksums first, where files have them")
    parser.add_argument("--apply", action="store_true", help="do it")


def run(args: argparse.Namespace, out: Output) -> int:
    """Print what would be taken in, or take it in."""
    rundir = target.locate(args)
    place = _place(args.source, rundir)
    if not args.apply or not os.path.lexists(rundir.journal_path):
        # No run is begun for what cannot be taken in.
        sources, left = _planned(args, out, rundir, place, _saved(rundir), deep=args.deep and not args.apply)
        if not (args.apply and sources):
            return _say(out, rundir, None, place, sources=sources, left=left, applied=args.apply)
    with target.changing(rundir, COMMAND, create=True) as journal:
        from ckptmgr import adoption, recovery

        with target.epoch(journal, COMMAND) as who:
            recovery.recover(journal, rundir, **who)
            sources, left = _planned(args, out, rundir, place, _live(journal), deep=args.deep)
            progress = Progress(out, sum(source.bytes for source in sources))
            if args.copy:
                _require_room(rundir, sources)
            try:
                for source in sources:
                    adoption.take_in(
                        journal, rundir, source, copy=args.copy, **who,
                        progress=functools.partial(progress.add, doing=f"reading {source.path.name}"),
                    )  # fmt: skip
            except OSError as error:
                raise _explained(error) from error
            finally:
                out.progress(None)
                recovery.project(journal.run_id, journal.checkpoints(live_only=True), rundir, series=journal.series())
        return _say(out, rundir, journal.run_id, place, sources=sources, left=left, applied=True)


def _place(given: str, rundir: RunDirectory) -> Path:
    """The directory that the checkpoints come from, absolute and free of links."""
    place = Path(given).resolve()
    if not place.is_dir():
        raise InvalidArgument(f"{given!r} is no directory", hint="give the one that the checkpoints stand in")
    if place == rundir.path:
        raise InvalidArgument(
            "RUN and --from are the same directory", hint="give a RUN of its own: what is adopted stays as it is"
        )
    return place


def _saved(rundir: RunDirectory) -> dict[str, list[CheckpointRecord]]:
    """What a run has already; nothing if there is none yet."""
    from ckptmgr.journal import Questions

    rundir.require_journal()
    try:
        with Questions.open_read_only(rundir.journal_path) as journal:
            return _live(journal)
    except JournalNotFound:
        return {}


def _live(journal: Questions) -> dict[str, list[CheckpointRecord]]:
    found: dict[str, list[CheckpointRecord]] = {}
    for record in sorted(journal.checkpoints(live_only=True), key=lambda record: record.commit_seq or 0):
        found.setdefault(record.series, []).append(record)
    return found


def _planned(
    args: argparse.Namespace,
    out: Output,
    rundir: RunDirectory,
    place: Path,
    saved: dict[str, list[CheckpointRecord]],
    *,
    deep: bool,
) -> tuple[list[Source], list[Left]]:
    """
    Raises:
        JournalNotFound: No layout is recognised.
        InvalidArgument: It is a run of ckptmgr, or several checkpoints, and ``--as-step``.
    """
    from ckptmgr import adoption, foreign
    from ckptmgr.rundir import RUN_ID_NAME

    if (place / RUN_ID_NAME).exists():
        raise InvalidArgument(
            f"{place} is a run of ckptmgr already",
            hint=f"`{shlex.join(('ckptmgr', 'ls', str(place)))}` says what it has",
        )
    read = 0

    def progress(count: int) -> None:
        nonlocal read
        read += count
        out.progress(lambda: f"comparing checksums: {size(read)}")

    report = foreign.judge(place, foreign.Asked(deep=deep, progress=progress))
    out.progress(None)
    if report is None:
        raise JournalNotFound(
            f"{place} has no layout that ckptmgr knows",
            hint="it knows those of " + ", ".join(layout.LAYOUT for layout in foreign.LAYOUTS),
            path=str(place),
        )
    return adoption.plan(
        report, saved=saved, is_taken=rundir.exists, series=args.series, step=args.step, as_step=args.as_step
    )


def _require_room(rundir: RunDirectory, sources: list[Source]) -> None:
    """
    Raises:
        InvalidArgument: The file system of the run has not the room for copies of all.
    """
    free, _ = rundir.space()
    needed = sum(source.bytes for source in sources)
    if needed > free:
        raise InvalidArgument(
            f"copies of all take {size(needed)}, and {size(free)} are free",
            hint="leave out --copy where both are on one file system, or take one after the other with --step",
        )


def _explained(error: OSError) -> OSError:
    """The same error, with what to do about a link that cannot be made."""
    if error.errno == errno.EXDEV:
        error.strerror = "RUN is on another file system, which links do not reach: give --copy"
    elif error.errno in (errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
        error.strerror = f"{error.strerror}: a second name for the file was refused, so give --copy"
    return error


def _say(
    out: Output,
    rundir: RunDirectory,
    run_id: str | None,
    place: Path,
    *,
    sources: list[Source],
    left: list[Left],
    applied: bool,
) -> int:
    code = Exit.OK if sources else Exit.NOT_SAFE
    if out.as_json:
        out.document(
            {
                "run": target.document(rundir, run_id),
                "exit_code": int(code),
                "from": str(place),
                "applied": applied,
                "adopted": [
                    {
                        "from": str(source.path),
                        "layout": source.layout,
                        "series": source.series,
                        "step": source.step,
                        "format": source.format.value,
                        "world_size": source.world_size,
                        "files": len(source.files),
                        "bytes": source.bytes,
                    }
                    for source in sources
                ],
                "left": [{"from": str(one.path), "step": one.step, "why": one.why} for one in left],
            }
        )
        return code
    if sources:
        word = Painted("adopted" if applied else "would adopt", "green")
        out.table("", "SERIES", "STEP", "SIZE", "LAYOUT", "FROM", right=("STEP", "SIZE")).add(
            [word, source.series, str(source.step), size(source.bytes), source.layout, str(source.path)]
            for source in sources
        )
    if left:
        out.table("", "STEP", "FROM", "WHY NOT", right=("STEP",)).add(
            [Painted("left", "dim"), "" if one.step is None else str(one.step), str(one.path), one.why] for one in left
        )
    if not sources:
        out.line(Painted("nothing to adopt", "red"))
    elif applied:
        out.note("what stands in DIR was only read", "`ckptmgr check RUN` says what to resume from")
    else:
        out.note("nothing was changed", "the same with --apply does it")
    return code
