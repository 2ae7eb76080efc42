"""What ``ckptmgr check`` says of a directory that ckptmgr did not write."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from ckptmgr.cli import describe, target
from ckptmgr.cli.output import Output, Painted, size
from ckptmgr.errors import CheckpointNotFound, InvalidArgument, JournalNotFound
from ckptmgr.resume import Verdict

if TYPE_CHECKING:
    from ckptmgr.foreign.report import ForeignReport, Judged
    from ckptmgr.rundir import RunDirectory


def directory(args: argparse.Namespace) -> RunDirectory | None:
    """The directory to judge without a journal, or None if RUN has or had one, or is no directory."""
    if args.journal is not None:
        return None
    rundir = target.locate(args)
    if not rundir.path.is_dir() or os.path.lexists(rundir.journal_path) or rundir.run_id() is not None:
        return None
    return rundir


def run(args: argparse.Namespace, out: Output, rundir: RunDirectory) -> int | None:
    """
    Print the findings and the verdict; None if there is nothing, and ``--allow-empty``.

    Raises:
        JournalNotFound: No layout is recognised either.
        CheckpointNotFound: ``--require`` names what is not there.
        InvalidArgument: ``--series`` names what is not there; or ``--max-age``, which nothing here could tell.
    """
    from ckptmgr import foreign

    read = 0

    def progress(count: int) -> None:
        nonlocal read
        read += count
        out.progress(lambda: f"comparing checksums: {size(read)}")

    asked = foreign.Asked(
        step=args.step, min_step=args.min_step, required=frozenset(args.require), world_size=args.world_size,
        deep=args.deep, progress=progress,
    )  # fmt: skip
    report = foreign.judge(rundir.path, asked)
    out.progress(None)
    if report is None:
        if args.allow_empty:
            return None
        raise JournalNotFound(
            f"there is no journal at {rundir.journal_path}, and {rundir.path} has no layout that ckptmgr knows",
            hint="it knows those of " + ", ".join(layout.LAYOUT for layout in foreign.LAYOUTS),
            path=str(rundir.journal_path),
        )
    if args.max_age is not None:
        raise InvalidArgument(
            "--max-age needs a journal: nothing here says when a checkpoint was complete",
            hint="use --min-step for a directory that ckptmgr did not write",
        )
    there = {judged.series for judged in report.layouts}
    if missing := sorted(set(args.require) - there):
        raise CheckpointNotFound(
            f"there is no {missing[0]!r} in {rundir.path}; it has {', '.join(sorted(there))}",
            hint="a directory that ckptmgr did not write has `checkpoint`, and `hf` for weights alone",
            series=missing[0], step=None,
        )  # fmt: skip
    if args.series is not None:
        report = _of_series(report, {args.series, *args.require})
    code = describe.STATUS_OF[report.verdict]
    if out.as_json:
        out.document({"exit_code": int(code), "deep": args.deep, **report.to_dict()})
    else:
        _print(report, out, deep=args.deep)
    return code


def _of_series(report: ForeignReport, asked: Collection[str]) -> ForeignReport:
    import dataclasses

    kept = tuple(judged for judged in report.layouts if judged.series in asked)
    if missing := sorted(set(asked) - {judged.series for judged in kept}):
        known = ", ".join(sorted({judged.series for judged in report.layouts}))
        raise InvalidArgument(f"no series {missing[0]!r} in this directory; it has {known}")
    return dataclasses.replace(report, layouts=kept)


def _print(report: ForeignReport, out: Output, *, deep: bool) -> None:
    rows = [
        (judged, finding)
        for judged in report.layouts
        for finding in (
            *judged.findings,
            *(found for each in judged.candidates for found in each.findings),
            *judged.unmet,
        )
    ]
    if rows:
        out.table("LEVEL", "ID", "LAYOUT", "CHECKPOINT", "FINDING").add(
            [
                Painted(finding.level.value, describe.COLOUR_OF[finding.level]),
                finding.id,
                judged.layout,
                "" if finding.path is None else finding.path or ".",
                f"{finding.text}; hint: {out.hint(finding.hint)}" if finding.hint else finding.text,
            ]
            for judged, finding in rows
        )
    for judged in report.layouts:
        out.line(f"{judged.layout}, {judged.series}: {_counted(judged)}")
    chosen = report.chosen
    if chosen is None:
        nothing = {Verdict.NONE: "nothing to resume from"}.get(report.verdict, "not safe to resume: none is complete")
        if any(judged.unmet for judged in report.asked):
            nothing = "not what was asked for"
        out.line(Painted(nothing, "red"))
    elif report.verdict is Verdict.SAFE:
        out.line(Painted(f"complete as far as its files tell: {report.absolute(chosen)}", "green"))
    elif report.verdict is Verdict.OLDER:
        out.line(Painted(f"the newest is not complete; an older one is: {report.absolute(chosen)}", "yellow"))
    else:
        out.line(Painted(f"not all layouts have a complete one; this is: {report.absolute(chosen)}", "red"))
    for judged in report.layouts:
        out.note(f"complete, for {judged.layout}: {judged.means}")
    if chosen is not None:
        hint = "" if deep else "`ckptmgr check RUN --deep` also compares checksums, where a file has them"
        out.note("nothing here was recorded by ckptmgr, so other bytes of the right size are not seen", hint)


def _counted(judged: Judged) -> str:
    complete = sum(candidate.complete for candidate in judged.candidates)
    newest = judged.chosen
    which = f", the newest of them {newest.path or '.'}" if newest is not None else ""
    return f"{len(judged.candidates)} found, {complete} complete{which}"
