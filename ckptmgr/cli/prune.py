"""``ckptmgr prune``: what would go by these keep rules and why the rest stays; ``--apply`` lets it go."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptmgr import recovery, requests, retention
from ckptmgr.cli import asking, check, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted, age, size
from ckptmgr.errors import InvalidArgument, JournalCorrupt, JournalError
from ckptmgr.requests import Answer
from ckptmgr.retention import KeepAny, KeepBest, KeepEvery, KeepFor, KeepLast, KeepRule, RetentionPlan

if TYPE_CHECKING:
    from ckptmgr.journal import Journal, Questions
    from ckptmgr.lifecycle import CheckpointRecord
    from ckptmgr.rundir import RunDirectory

DESCRIPTION = """\
Say which checkpoints of a series would go by these keep rules, and why the
rest stays. A checkpoint stays if any rule keeps it; the newest, the newest that
is safe to resume from, pinned ones and what is in flight stay whatever the
rules say. Nothing is changed without --apply, which retires as a manager does:
marked in the journal first, deleted afterwards. A live run is asked to do it;
otherwise the run lock is taken."""
EXAMPLES = """\
  ckptmgr prune runs/alpha --keep-last 3
  ckptmgr prune runs/alpha --keep-every 10000 --keep-best loss:min:3
  ckptmgr prune runs/alpha --series hf --keep-within 7d --apply
  ckptmgr prune runs/alpha --keep-last 1 --json | jq .bytes"""

COMMAND = "ckptmgr prune"
#: Between two looks how far a manager is with deleting.
_LOOK_S = 0.5
_MOST_LOOKED_AT = 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--series", metavar="NAME", help="its series (default: checkpoint, or the only one)")
    for flag, metavar, kind, text in (
        ("--keep-last", "N", last, "keep the N that committed last"),
        ("--keep-every", "STEPS", every, "keep each whose step is a multiple of STEPS"),
        ("--keep-within", "AGE", within, "keep what committed within AGE: 90m, 12h, 7d, 2w"),
        ("--keep-best", "METRIC:MODE:N", best, "keep the N best by a metric; MODE is min or max"),
    ):
        parser.add_argument(
            flag, metavar=metavar, dest="rules", action="append", type=kind, default=[], help=f"{text}; may be repeated"
        )
    parser.add_argument("--apply", action="store_true", help="do it")
    asking.configure(parser)


def last(text: str) -> KeepRule:
    """The argparse type of ``--keep-last``."""
    return _rule(lambda: KeepLast(target.step(text)))


def every(text: str) -> KeepRule:
    """The argparse type of ``--keep-every``."""
    return _rule(lambda: KeepEvery(target.step(text)))


def within(text: str) -> KeepRule:
    """The argparse type of ``--keep-within``."""
    return _rule(lambda: KeepFor(target.period(text) / 3600))


def best(text: str) -> KeepRule:
    """The argparse type of ``--keep-best``."""
    metric, *rest = text.rsplit(":", 2)
    if len(rest) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not METRIC:MODE:N, as in loss:min:3")
    mode, count = rest
    return _rule(lambda: KeepBest(target.step(count), metric, mode))


def _rule(make: Callable[[], KeepRule]) -> KeepRule:
    try:
        return make()
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(error.message) from error


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What stays and what goes, or went: by checkpoint id, with the reasons; and who did it, if it was a manager."""

    records: Mapping[int, CheckpointRecord]
    keep: Mapping[int, Sequence[str]]
    drop: Mapping[int, str]
    by: str | None = None

    @property
    def leaving(self) -> list[CheckpointRecord]:
        """What goes, oldest first."""
        return [record for record in self.records.values() if record.id in self.drop]

    @property
    def bytes(self) -> int:
        """The space of what goes."""
        return sum(record.bytes for record in self.leaving)

    @property
    def gone(self) -> int:
        """How many of them are deleted."""
        return sum(record.retired_at is not None for record in self.leaving)


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the plan, or carry it out."""
    if not args.rules:
        raise InvalidArgument(
            "no keep rule is given, and without one nothing but the newest would stay",
            hint="say what to keep, as in `ckptmgr prune RUN --keep-last 3`; `ckptmgr prune --help` has all rules",
        )
    rule = KeepAny(tuple(args.rules))
    with target.reading(args, directory=True) as (journal, rundir):
        target.require_series(journal, args.series)
        series = target.choose_series(journal, args.series)
        safe = newest_safe(journal, rundir, series)
        outcome = planned(journal, series, rule, safe)
        live_epoch = target.live_epoch(journal)
        pending = () if args.apply or live_epoch is not None else recovery.preview(journal, rundir).changes
        about = target.document(rundir, journal.run_id)
    if args.apply:
        answer, by = asking.carry_out(
            rundir, out, command=COMMAND, here=lambda journal: retire(journal, rundir, series, rule, out),
            timeout_s=args.timeout, kind=requests.PRUNE, series=series, rule=rule, safe=safe,
        )  # fmt: skip
        outcome = became(args, out, answer, by)
    if out.as_json:
        out.document({"run": about, **document(outcome, series, rule, applied=args.apply)})
        return Exit.OK
    print_outcome(out, outcome, applied=args.apply)
    if args.apply:
        if outcome.gone < len(outcome.drop):
            out.note(f"{outcome.gone} of {len(outcome.drop)} are deleted so far; {outcome.by} goes on with it")
    elif pending:
        out.note(f"a crash left {len(pending)} things undecided", "`ckptmgr recover RUN --apply` comes first")
    elif outcome.drop:
        if live_epoch is not None:
            out.note("a manager has the run open; --apply asks it, and it also keeps what it has resumed from")
        out.note("nothing was changed", "the same with --apply does it")
    return Exit.OK


def newest_safe(journal: Questions, rundir: RunDirectory, series: str) -> int | None:
    """
    The newest checkpoint whose names and sizes are as committed, where that is not simply the newest.

    The last good one must not go because something newer, which is damaged, stays.
    """
    try:
        report = check.judge(journal, rundir, series, first=1)
    except JournalCorrupt:
        raise
    except JournalError:
        return None  # a manager commits faster than it can be looked at: what is newest has just been written
    return None if report.chosen is None or report.newest_is_safe else report.chosen.id


def planned(journal: Questions, series: str, rule: KeepRule, safe: int | None) -> Outcome:
    """What *rule* would let go of *series* as it is now."""
    records, plan = _decide(journal, series, rule, safe)
    return Outcome(
        records,
        {kept.record.id: kept.reasons for kept in plan.keep},
        {dropped.record.id: dropped.reason for dropped in plan.drop},
    )


def _decide(
    journal: Questions, series: str, rule: KeepRule, safe: int | None
) -> tuple[dict[int, CheckpointRecord], RetentionPlan]:
    live = sorted(journal.checkpoints(series=series, live_only=True), key=lambda record: record.commit_seq or 0)
    protected = {} if safe is None else {safe: requests.SAFE}
    attempt = journal.in_flight(series)
    if attempt is not None and attempt.overwrites is not None:
        protected[attempt.overwrites] = requests.OVERWRITTEN
    return {record.id: record for record in live}, retention.plan(live, rule, now=time.time(), protected=protected)


def retire(journal: Journal, rundir: RunDirectory, series: str, rule: KeepRule, out: Output) -> Answer:
    """
    Let go what *rule* does not keep, as a manager would: the journal first. The caller holds the run lock.

    Raises:
        JournalError: A crash left something that recovery has not decided.
    """
    if pending := recovery.preview(journal, rundir).changes:
        raise JournalError(
            f"a crash left {len(pending)} things undecided, the first: {pending[0].text}; nothing was pruned",
            hint="run `ckptmgr recover RUN --apply` first",
        )
    records, plan = _decide(journal, series, rule, newest_safe(journal, rundir, series))
    marks = requests.marks(plan, socket.gethostname(), os.getpid())
    if marks:
        with target.epoch(journal, COMMAND) as who:
            journal.mark_retiring(marks, epoch=who["epoch"])
            # Crash here: what a prune lets go is marked, and stands in meta.json; recovery deletes it.
            is_projected = _project(journal, rundir, unless_full=True)
            leaving = [records[mark.checkpoint_id] for mark in reversed(marks)]
            for number, record in enumerate(leaving):
                out.progress(lambda n=number: f"deleting {n + 1} of {len(leaving)}")  # type: ignore[misc]
                # Crash here: a prune is about to delete the next that it has marked; recovery goes on with it.
                rundir.retire(record)
                # Crash here: what a prune has deleted still says retiring; recovery finishes it.
                journal.finish_retirement(record.id, epoch=who["epoch"])
            out.progress(None)
            if not is_projected:
                _project(journal, rundir, unless_full=False)
    return Answer(
        requests.DONE,
        keep={kept.record.id: kept.reasons for kept in plan.keep},
        drop={mark.checkpoint_id: mark.reason for mark in marks},
    )


def _project(journal: Journal, rundir: RunDirectory, *, unless_full: bool) -> bool:
    """
    Bring ``meta.json`` and the ``latest`` links up to the journal. Whether there was room for that.

    Raises:
        OSError: The disk refuses, and not *unless_full* or the reason is another one.
    """
    try:
        recovery.project(journal.run_id, journal.checkpoints(live_only=True), rundir, series=journal.series())
    except OSError as error:
        # What is about to be deleted makes room; nothing is decided by what stands there meanwhile.
        if not unless_full or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return True


def became(args: argparse.Namespace, out: Output, answer: Answer, by: str | None) -> Outcome:
    """What *answer* is about, as the journal has it when all of it is deleted, or when that takes too long."""
    deadline = time.monotonic() + args.timeout
    with target.reading(args) as (journal, _):
        found = [journal.checkpoint(id) for id in (*answer.keep, *answer.drop)]
        records = {record.id: record for record in sorted(found, key=lambda record: record.commit_seq or 0)}
        outcome = Outcome(records, answer.keep, answer.drop, by)
        while outcome.gone < len(outcome.drop) and time.monotonic() < deadline:
            out.progress(lambda: f"deleted {outcome.gone} of {len(outcome.drop)}")
            time.sleep(_LOOK_S)
            # Oldest first, as they are deleted; the journal of a live run is not to be asked more than that.
            left = [record.id for record in outcome.leaving if record.retired_at is None]
            records.update((id, journal.checkpoint(id)) for id in left[:_MOST_LOOKED_AT])
        out.progress(None)
    return outcome


def document(outcome: Outcome, series: str, rule: KeepRule, *, applied: bool) -> dict[str, Any]:
    """The outcome of the JSON contract."""
    records = outcome.records

    def facts(record: CheckpointRecord) -> dict[str, Any]:
        return {
            "checkpoint_id": record.id,
            "step": record.step,
            "directory": record.directory,
            "bytes": record.bytes,
        }

    return {
        "series": series,
        "rules": [part.text for part in rule.parts],
        "applied": applied,
        "by": outcome.by,
        "keep": [
            {**facts(record), "reasons": list(outcome.keep[record.id])}
            for record in records.values()
            if record.id in outcome.keep
        ],
        "drop": [
            {**facts(record), "reason": outcome.drop[record.id], "gone": record.retired_at is not None}
            for record in outcome.leaving
        ],
        "bytes": outcome.bytes,
    }


def print_outcome(out: Output, outcome: Outcome, *, applied: bool) -> None:
    """Print one line for each checkpoint, oldest first, and what it comes to."""
    now = time.time()
    if outcome.records:
        out.table("STEP", "AGE", "SIZE", "VERDICT", "WHY", right=("STEP", "AGE", "SIZE")).add(
            [
                str(record.step),
                age(now - (record.committed_at or record.created_at)),
                size(record.bytes),
                Painted("drop", "red") if record.id in outcome.drop else Painted("keep", "green"),
                outcome.drop.get(record.id) or ", ".join(outcome.keep.get(record.id, ())),
            ]
            for record in outcome.records.values()
        )
    if not outcome.drop:
        out.line(Painted("nothing to prune", "green"))
        return
    what = f"{len(outcome.drop)} of {len(outcome.records)} checkpoints, {size(outcome.bytes)}"
    who = f" by {outcome.by}" if outcome.by is not None else ""
    out.line(Painted(f"retired {what}{who}" if applied else f"would retire {what}", "yellow"))
