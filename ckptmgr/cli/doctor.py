"""``ckptmgr doctor``: try on a directory's own storage what a run relies on, and say what holds there."""

from __future__ import annotations

import argparse

from ckptmgr import storage
from ckptmgr.cli import target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted
from ckptmgr.filesystems import Level, file_system
from ckptmgr.storage import Place, Role, StorageReport, Verdict

DESCRIPTION = """\
Try on the storage of a directory what a run relies on there: exclusive
creation, renaming, fsync, locks between processes, a SQLite journal, space,
names; and say what its file system is known to guarantee beyond that. It
works in a directory of its own inside DIR, which it removes. A run directory
that is in use is not disturbed. Storage that does not answer is a finding."""
EXAMPLES = """\
  ckptmgr doctor runs/alpha
  ckptmgr doctor runs/alpha --need 200GB
  ckptmgr doctor runs/alpha --journal /local/alpha.journal.db --json"""
TARGET = ("DIR", "a run directory, or where one would go; it need not exist")

_STATUS = {Verdict.TRUSTED: Exit.OK, Verdict.LIMITED: Exit.OK, Verdict.UNFIT: Exit.NOT_SAFE}
_COLOURS = {Level.ERROR: "red", Level.WARNING: "yellow", Level.INFO: "dim", Level.OK: "green"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--need", metavar="SIZE", type=target.size, help="free space that must be there, such as 200GB")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=target.seconds,
        help="seconds that one step may take until it counts as stuck (10)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Print what was seen in each place, and the verdict."""
    from ckptmgr.doctor import STEP_S, examine

    places = examine(
        args.run,
        args.journal,
        timeout_s=args.timeout if args.timeout is not None else STEP_S,
        progress=lambda text: out.progress(lambda: text),
    )
    out.progress(None)
    report = storage.judge(places, need=args.need)
    code = _STATUS[report.verdict]
    if out.as_json:
        out.document({"exit_code": int(code), "need_bytes": args.need, **report.to_dict()})
        return code
    for place in places:
        out.line(Painted(headline(place), "bold"))
        out.table("LEVEL", "ID", "FINDING").add(
            [
                Painted(finding.level.value, _COLOURS[finding.level]),
                finding.id,
                f"{finding.text}; hint: {out.hint(finding.hint)}" if finding.hint else finding.text,
            ]
            for finding in report.of(place)
        )
        out.line()
    out.line(verdict_line(report))
    return code


def headline(place: Place) -> str:
    """The place, what would stand there, and what it is on."""
    holds = " and ".join({Role.RUN: "the run", Role.JOURNAL: "the journal"}[role] for role in place.holds)
    on = ""
    if (mount := place.mount) is not None:
        source = f", {mount.source}" if mount.source not in ("", "none", mount.type) else ""
        on = f": {file_system(mount).name}{source} at {mount.point}"
    return f"{place.path or place.asked}, for {holds}{on}"


def verdict_line(report: StorageReport) -> Painted:
    """The answer in one line."""
    place = report.places[0]
    where = place.path or place.asked
    if report.verdict is Verdict.TRUSTED:
        return Painted(f"a run can be trusted in {where}", "green")
    if report.verdict is Verdict.LIMITED:
        limits = ", ".join(report.ids(Level.WARNING))
        return Painted(f"a run can be trusted in {where} within these limits: {limits}", "yellow")
    bad = {one.path for one in report.findings if one.level is Level.ERROR}
    what = "a run" if where in bad else "the journal"
    at = where if where in bad else next(iter(bad))
    return Painted(f"do not put {what} in {at}: {', '.join(report.ids(Level.ERROR))}", "red")
