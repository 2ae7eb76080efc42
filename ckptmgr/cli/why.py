"""``ckptmgr why``: why a checkpoint is kept, dropped, failed or not resumable, and what to do next."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from ckptmgr import retention
from ckptmgr.cli import check, describe, show, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted, age, timestamp
from ckptmgr.errors import disk_is_full
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState
from ckptmgr.resume import Finding, Level

if TYPE_CHECKING:
    from ckptmgr.journal import Decision, Pin, Questions, Verification
    from ckptmgr.rundir import RunDirectory

DESCRIPTION = """\
Say why the checkpoint of a step is kept, why it was dropped, why it failed, or
why it cannot be resumed from, and which command comes next. If the step was
saved more than once, all attempts are told, the one that counts first. Names
and sizes are compared with what was committed; `ckptmgr check --deep` compares
every byte."""
EXAMPLES = """\
  ckptmgr why runs/alpha 12000
  ckptmgr why runs/alpha 12000 --series hf
  ckptmgr why runs/alpha 12000 --json | jq -r '.attempts[].verdict'"""

KEPT, UNSAFE, RETIRING, RETIRED, FAILED, IN_FLIGHT, INTERRUPTED = (
    "kept", "not resumable", "retiring", "retired", "failed", "in flight", "interrupted",
)  # fmt: skip
_COLOURS = {KEPT: "green", UNSAFE: "red", FAILED: "red", IN_FLIGHT: "yellow", INTERRUPTED: "yellow"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One attempt, and what is known about its fate."""

    record: CheckpointRecord
    verdict: str
    reasons: tuple[str, ...]
    newest: bool
    decision: Decision | None
    decided_by: CheckpointRecord | None
    pin: Pin | None
    verified: Verification | None
    findings: tuple[Finding, ...]
    next: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("step", metavar="STEP", type=target.step, help="the step of the checkpoint")
    parser.add_argument("--series", metavar="NAME", help="its series (default: checkpoint, or the only one)")


def run(args: argparse.Namespace, out: Output) -> int:
    """Print every attempt at the step."""
    with target.reading(args, directory=True) as (journal, rundir):
        series = target.choose_series(journal, args.series)
        first = show.find(journal, series, args.step)
        others = [record for record in journal.of_step(series, args.step) if record.id != first.id]
        cases = [look(journal, rundir, record) for record in (first, *reversed(others))]
        about = target.document(rundir, journal.run_id)
    if out.as_json:
        attempts = [document(case, rundir) for case in cases]
        out.document({"run": about, "series": series, "step": args.step, "attempts": attempts})
        return Exit.OK
    for number, case in enumerate(cases):
        if number:
            out.line()
        print_case(out, case)
    return Exit.OK


def look(journal: Questions, rundir: RunDirectory, record: CheckpointRecord) -> Case:
    """Everything that journal and disk say about the fate of one attempt."""
    decision = journal.decision_on(record.id)
    if decision is not None and (decision.verdict == "keep") != record.is_live:
        decision = None  # it was let go since, by an overwrite or a prune, and the reason of that says so
    live_epoch = target.live_epoch(journal)
    newest = max(
        (one for one in journal.newest(record.series, 1) if one.is_live),
        key=lambda one: one.commit_seq or 0,
        default=None,
    )
    findings: tuple[Finding, ...] = ()
    if record.is_live:
        report = check.judge(journal, rundir, record.series, step=record.step)
        findings = tuple(f for one in report.candidates if one.record.id == record.id for f in one.findings)
    is_newest = newest is not None and newest.id == record.id
    verdict, reasons = judge(record, decision, findings, newest=is_newest, live_epoch=live_epoch)
    return Case(
        record=record,
        verdict=verdict,
        reasons=reasons,
        newest=is_newest,
        decision=decision,
        decided_by=journal.checkpoint(decision.decided_by) if decision is not None else None,
        pin=journal.pin_of(record.series, record.step) if record.is_live else None,
        verified=describe.last_of(journal.verifications(record.id)),
        findings=findings,
        next=next_command(
            record,
            verdict,
            findings,
            newest=is_newest,
            goes_next=goes_next(journal, record, reasons),
            live_epoch=live_epoch,
        ),
    )


def judge(
    record: CheckpointRecord,
    decision: Decision | None,
    findings: tuple[Finding, ...],
    *,
    newest: bool,
    live_epoch: int | None,
) -> tuple[str, tuple[str, ...]]:
    """What became of an attempt, in one of the words above, and why."""
    if record.is_in_flight:
        if record.epoch == live_epoch:
            return IN_FLIGHT, (f"epoch {record.epoch} is saving it, and it is {record.state}",)
        return INTERRUPTED, (f"epoch {record.epoch} left it {record.state}",)
    if record.state is CheckpointState.FAILED:
        return FAILED, (record.reason or "no reason recorded",)
    if record.retire_started_at is not None:
        return RETIRED if record.retired_at is not None else RETIRING, (record.retire_reason or "",)
    if wrong := tuple(f"{each.id} {each.text}" for each in findings if each.level is Level.ERROR):
        return UNSAFE, wrong
    decided = {record.id: (decision.verdict, decision.reasons)} if decision is not None else {}
    reasons = [why for why in describe.kept_because(record, decided) if why != retention.NEWEST]
    return KEPT, (*([retention.NEWEST] if newest else []), *reasons)


def goes_next(journal: Questions, record: CheckpointRecord, reasons: tuple[str, ...]) -> bool:
    """Whether the next commit lets it go, the keep rules being the same, as far as that is certain."""
    count = retention.newer_that_end_it(reasons)
    if count is None:
        return False
    live = (one for one in journal.newest(record.series, count) if one.is_live)
    return sum((one.commit_seq or 0) >= (record.commit_seq or 0) for one in live) >= count


def next_command(
    record: CheckpointRecord,
    verdict: str,
    findings: tuple[Finding, ...],
    *,
    newest: bool,
    goes_next: bool,
    live_epoch: int | None,
) -> str:
    """What happens next, or which command makes it happen."""
    where = f"RUN {record.step} --series {record.series}"
    latest = f"`ckptmgr latest RUN --series {record.series}`"
    recover = "the next start of a manager decides, or `ckptmgr recover RUN --apply`"
    causes = [record.reason or "", *(str(failure.get("cause")) for failure in record.failures)]
    again = "the next save works"
    if disk_is_full(causes):
        again = "the next save works once there is space: `ckptmgr stats RUN` says what takes it"
    if record.pinned:
        stays = f"it stays until it is unpinned: `ckptmgr unpin {where}`"
    elif newest:
        stays = f"it stays at least until the next commit; {latest} names it"
    elif goes_next:
        stays = f"the next commit of its series lets it go; `ckptmgr pin {where}` keeps it"
    else:
        stays = f"it goes when a commit finds that no keep rule keeps it; `ckptmgr pin {where}` keeps it"
    return {
        KEPT: stays,
        UNSAFE: next((each.hint for each in findings if each.level is Level.ERROR and each.hint), recover)
        + f"; `ckptmgr check RUN --series {record.series}` says what is safe",
        RETIRING: recover
        if live_epoch is None
        else f"epoch {live_epoch} deletes it after its next commit at the latest; it is never resumed from again",
        RETIRED: f"it is gone; {latest} names what to resume from",
        FAILED: f"it is never resumed from, and {again}; `ckptmgr show {where}` has its history",
        IN_FLIGHT: "`ckptmgr log RUN --follow` tells when it is COMMITTED",
        INTERRUPTED: recover,
    }[verdict]


def document(case: Case, rundir: RunDirectory) -> dict[str, Any]:
    """One attempt of the JSON contract."""
    decision, by = case.decision, case.decided_by
    decisions = {case.record.id: (decision.verdict, decision.reasons)} if decision is not None else {}
    return {
        "checkpoint": describe.document(case.record, decisions, case.verified, rundir.path),
        "verdict": case.verdict,
        "reasons": list(case.reasons),
        "newest": case.newest,
        "decision": None
        if decision is None or by is None
        else {
            "verdict": decision.verdict,
            "reasons": list(decision.reasons),
            "at": timestamp(decision.at),
            "checkpoint_id": by.id,
            "step": by.step,
        },
        "pin": None if case.pin is None else {"note": case.pin.note, "at": timestamp(case.pin.pinned_at)},
        "findings": [finding.to_dict() for finding in case.findings],
        "hint": case.next,
    }


def print_case(out: Output, case: Case) -> None:
    """Print one attempt: what became of it, why, and what comes next."""
    now = time.time()
    record, decision, by = case.record, case.decision, case.decided_by

    def when(at: float) -> str:
        return f"{timestamp(at, timespec='seconds')} ({age(now - at)} ago)"

    def fact(name: str, text: str) -> None:
        out.labelled(f"  {name}", text, indent=13)

    out.line(
        f"{record.series} step {record.step}, attempt {record.id}: ",
        Painted(case.verdict, _COLOURS.get(case.verdict, "dim")),
        f" ({record.state.value})",
    )
    for reason in case.reasons or ("no retention decision has been made about it yet",):
        fact("because", reason)
    if case.pin is not None:
        fact("pinned", when(case.pin.pinned_at) + (f": {case.pin.note}" if case.pin.note else ""))
    for failure in record.failures:
        silent = ", silent" if failure.get("silent") else ""
        host = failure.get("host") or "unknown host"
        fact(f"rank {failure.get('rank')!s:<5}", f"on {host}{silent}: {failure.get('cause')}")
    if record.finished_at is not None and record.state is CheckpointState.FAILED:
        fact("failed", when(record.finished_at))
    if record.retire_started_at is not None:
        fact("let go", when(record.retire_started_at))
    if record.retired_at is not None:
        fact("deleted", when(record.retired_at))
    if decision is not None and by is not None:
        fact("decided", f"{when(decision.at)}, {decision.verdict}, by the commit of step {by.step} (attempt {by.id})")
    if case.verdict == KEPT:
        fact("on disk", "names and sizes are as committed")
    if case.verified is not None and record.is_live:
        fact("trust", describe.trust(case.verified, now))
    for finding in case.findings:
        fact("finding", f"{finding.level.value} {finding.id}: {finding.text}")
        if finding.hint:
            fact("", f"hint: {out.hint(finding.hint)}")
    fact("next", out.hint(case.next))
