"""
What a report is made from: one look at the journal and at what stands on disk.

Everything in it may have been written by anybody. It is bounded here where it is not bounded by the journal:
only one checkpoint's files are read, whatever their number.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ckptmgr import durability
from ckptmgr.cli import check, describe, target
from ckptmgr.cli.output import Output
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, EpochRecord
from ckptmgr.resume import Finding, ResumeReport, Verdict

if TYPE_CHECKING:
    from ckptmgr.rundir import RunDirectory

#: Series of which the disk is asked whether one may resume; further ones are listed without a verdict.
MOST_SERIES = 12


@dataclasses.dataclass(frozen=True)
class SeriesFacts:
    """One series: its numbers, and whether one may resume from it. ``verdict`` is None if that was not asked."""

    name: str
    numbers: Mapping[str, float]
    verdict: Verdict | None = None
    step: int | None = None
    path: str | None = None
    #: What speaks against everything that is newer, and what else there is to know.
    against: tuple[Finding, ...] = ()
    besides: tuple[Finding, ...] = ()
    #: The command that compares every byte of it.
    deep: str = "`ckptmgr check RUN --deep`"


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """One run at one moment. ``series`` has the one that is resumed from first; ``records`` are by attempt."""

    name: str
    run_id: str
    directory: str
    journal: str
    seen_at: float
    live_epoch: int | None
    series: tuple[SeriesFacts, ...]
    records: Sequence[CheckpointRecord]
    decisions: describe.Decisions
    epochs: Sequence[EpochRecord]
    #: The newest committed checkpoint of the first series, and who wrote how much of it.
    newest: CheckpointRecord | None
    rank_bytes: Mapping[int, int]
    #: How those have come into the journal that no manager saved, by attempt.
    origins: Mapping[int, str] = dataclasses.field(default_factory=dict)


def gather(args: argparse.Namespace, out: Output) -> RunFacts:
    """
    Look at the run that *args* name. Takes no lock and changes nothing.

    Raises:
        CheckpointError: As `target.reading`.
    """
    with target.reading(args, directory=True) as (journal, rundir):
        records = journal.checkpoints()
        seen_at = time.time()
        names = list(dict.fromkeys(record.series for record in records))
        if target.DEFAULT_SERIES in names:
            names.remove(target.DEFAULT_SERIES)
            names.insert(0, target.DEFAULT_SERIES)
        series = tuple(
            _of_series(
                name,
                durability.of_series([r for r in records if r.series == name], now=seen_at),
                check.judge(journal, rundir, name, first=1) if place < MOST_SERIES else None,
                rundir,
                out,
            )
            for place, name in enumerate(names)
        )
        first = [record for record in records if names and record.series == names[0]]
        newest = max(
            (record for record in first if record.state is CheckpointState.COMMITTED),
            key=lambda record: record.commit_seq or 0,
            default=None,
        )
        rank_bytes: dict[int, int] = {}
        for file in journal.files(newest.id) if newest is not None else ():
            rank_bytes[file.rank] = rank_bytes.get(file.rank, 0) + file.size
        return RunFacts(
            name=rundir.path.name,
            run_id=journal.run_id,
            directory=str(rundir.path),
            journal=str(rundir.journal_path),
            seen_at=seen_at,
            live_epoch=target.live_epoch(journal),
            series=series,
            records=records,
            decisions=describe.decisions(journal, records),
            epochs=journal.epochs(),
            newest=newest,
            rank_bytes=rank_bytes,
            origins=journal.origins(record.id for record in records if record.is_live),
        )


def _of_series(
    name: str, numbers: Mapping[str, float], report: ResumeReport | None, rundir: RunDirectory, out: Output
) -> SeriesFacts:
    if report is None:
        return SeriesFacts(name, numbers)
    against = report.passed_over
    return SeriesFacts(
        name=name,
        numbers=numbers,
        verdict=report.verdict,
        step=report.chosen.step if report.chosen is not None else None,
        path=str(rundir.absolute(report.chosen.directory)) if report.chosen is not None else None,
        deep=out.hint(f"`ckptmgr check RUN --series {name} --deep`"),
        against=tuple(_with_run(finding, out) for finding in against),
        besides=tuple(_with_run(finding, out) for finding in report.all_findings if finding not in against),
    )


def _with_run(finding: Finding, out: Output) -> Finding:
    return dataclasses.replace(finding, hint=out.hint(finding.hint))
