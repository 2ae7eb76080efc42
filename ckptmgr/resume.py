"""
May we resume, and from which checkpoint? Findings with stable ids, and a verdict.

Pure: the rows of the journal and what was found on disk in, a report out. Directories without a row
are never candidates. Order is by ``commit_seq``, newest first: after a run has been set back the
highest step number is not the newest checkpoint. The report never chooses silently: an older
checkpoint is chosen with the verdict OLDER, and the caller decides whether that will do.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptmgr.errors import InvalidArgument, printable
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState
from ckptmgr.manifest import MANIFEST_NAME, FileEntry, Manifest

if TYPE_CHECKING:
    from ckptmgr.journal import Questions, Verification
    from ckptmgr.recovery import Found

#: Every finding there is: id → what it means. Ids are never reused for something else.
FINDINGS: Mapping[str, str] = {
    "R001": "nothing is committed",
    "R002": "the directory of a committed checkpoint is missing",
    "R003": "the manifest is missing, unreadable, or another checkpoint's",
    "R004": "a file is missing or has another size than was committed",
    "R005": "a file has other bytes than were committed",
    "R006": "state that differs by rank was saved with another world size",
    "R007": "a newer attempt failed",
    "R008": "a directory is not known to the journal",
    "R009": "an attempt was interrupted, and recovery has not decided it yet",
    "R010": "a newer attempt is in flight",
    "R011": "the journal and the manifest contradict each other",
    "R012": "a published checkpoint that is newer than all others is not known to the journal",
    "R013": "a file that was not committed stands in the directory of a checkpoint",
    "R014": "meta.json or a latest link does not say what the journal says",
    "R015": "the checkpoint to resume from is of an earlier step than was asked for",
    "R016": "the checkpoint to resume from was committed longer ago than was asked for",
}
DAMAGE = frozenset({"R002", "R003", "R004", "R005", "R011"})

_SHOWN = 3
_REBUILD = "move the journal and its -journal file away together, then `ckptmgr recover RUN --rebuild --apply`"
_OVERLOOKED = (
    "if the journal is an older copy, move it and its -journal file away together and run "
    "`ckptmgr recover RUN --rebuild --apply`; if the directory does not belong here, move that away"
)
_RECOVER = "run `ckptmgr recover RUN` to see what would be done; opening a CheckpointManager does it"


class Level(enum.StrEnum):
    """How bad a finding is. A candidate with an error is not safe to resume from."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class Verdict(enum.StrEnum):
    """What a report comes to."""

    #: The newest committed checkpoint can be resumed from.
    SAFE = "safe"
    #: The newest cannot, an older one can.
    OLDER = "older"
    #: Nothing is committed.
    NONE = "none"
    #: There are committed checkpoints, and every one is damaged.
    CORRUPT = "corrupt"
    #: None can be resumed from under these circumstances, but not all are damaged.
    UNSAFE = "unsafe"


#: From good to bad.
_ORDER = (Verdict.SAFE, Verdict.OLDER, Verdict.NONE, Verdict.UNSAFE, Verdict.CORRUPT)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """What several of them come to, where all are needed; at least one."""
    return max(verdicts, key=_ORDER.index)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One result of the check. ``step`` and ``checkpoint_id`` are None where it is about no single attempt."""

    id: str
    level: Level
    text: str
    hint: str
    series: str
    step: int | None = None
    checkpoint_id: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON-able facts."""
        return {**dataclasses.asdict(self), "level": self.level.value}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A live committed checkpoint, and whether it can be resumed from."""

    record: CheckpointRecord
    findings: tuple[Finding, ...]

    @property
    def safe(self) -> bool:
        """Whether no finding is an error."""
        return all(finding.level is not Level.ERROR for finding in self.findings)

    @property
    def damaged(self) -> bool:
        """Whether what is on disk is not what was committed."""
        return any(finding.id in DAMAGE for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The candidate as JSON-able facts."""
        return {
            "checkpoint_id": self.record.id,
            "step": self.record.step,
            "directory": self.record.directory,
            "safe": self.safe,
            "findings": [finding.to_dict() for finding in self.findings],
        }


@dataclasses.dataclass(frozen=True)
class ResumeReport:
    """What can be resumed from in one series, and why the rest cannot."""

    series: str
    #: Newest first; all, or as far as it took to find a safe one.
    candidates: tuple[Candidate, ...]
    #: Findings about no candidate: failed, unfinished, unknown.
    findings: tuple[Finding, ...]
    #: What was demanded and the newest safe one does not fulfil; then none is chosen. See `demand`.
    unmet: tuple[Finding, ...] = ()
    #: How many other live checkpoints nobody looked at.
    not_looked_at: int = 0

    @property
    def chosen(self) -> CheckpointRecord | None:
        """The newest checkpoint that is safe to resume from, if it is all that was demanded."""
        return None if self.unmet else self._newest_safe

    @property
    def _newest_safe(self) -> CheckpointRecord | None:
        return next((candidate.record for candidate in self.candidates if candidate.safe), None)

    @property
    def newest_is_safe(self) -> bool:
        """Whether the newest committed checkpoint is the chosen one, and no newer one is unknown to the journal."""
        return bool(self.candidates) and self.candidates[0].safe and not self._overlooks_one and not self.unmet

    @property
    def passed_over(self) -> tuple[Finding, ...]:
        """What speaks against everything that is newer than the chosen one, or against all where none is chosen."""
        chosen = self.chosen
        newer: list[Finding] = [finding for finding in self.findings if finding.id == "R012"]
        for candidate in self.candidates:
            if candidate.record is chosen:
                break
            newer += candidate.findings
        return (*self.unmet, *(finding for finding in newer if finding.level is Level.ERROR))

    @property
    def _overlooks_one(self) -> bool:
        return any(finding.id == "R012" for finding in self.findings)

    @property
    def verdict(self) -> Verdict:
        """What it comes to, in one word."""
        if not self.candidates:
            return Verdict.UNSAFE if self._overlooks_one else Verdict.NONE
        if self.unmet:
            return Verdict.UNSAFE
        if self.newest_is_safe:
            return Verdict.SAFE
        if self.chosen is not None:
            return Verdict.OLDER
        return Verdict.CORRUPT if all(candidate.damaged for candidate in self.candidates) else Verdict.UNSAFE

    @property
    def all_findings(self) -> tuple[Finding, ...]:
        """General findings first, then those of each candidate, newest first, and what was demanded last."""
        of_candidates = (finding for candidate in self.candidates for finding in candidate.findings)
        return (*self.findings, *of_candidates, *self.unmet)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able facts."""
        chosen = self.chosen
        return {
            "series": self.series,
            "verdict": self.verdict.value,
            "newest_is_safe": self.newest_is_safe,
            "chosen": None
            if chosen is None
            else {"checkpoint_id": chosen.id, "step": chosen.step, "directory": chosen.directory},
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "not_looked_at": self.not_looked_at,
            "findings": [finding.to_dict() for finding in (*self.findings, *self.unmet)],
        }


def asked_of(journal: Questions, series: str, step: int | None, newest: int) -> list[CheckpointRecord]:
    """
    The attempts that `check` judges, in order of their numbers, without reading the whole history of *series*.

    Others that have left something on disk are missing yet: `recovery.with_traces` adds them.

    Args:
        journal: Of the run.
        series: Which series.
        step: Only the attempts to save this step, and what is in flight.
        newest: Else, how many of the live checkpoints, the newest first.
    """
    if step is None:
        return journal.newest(series, newest)
    by_id = {record.id: record for record in journal.of_step(series, step)}
    if (busy := journal.in_flight(series)) is not None:
        by_id[busy.id] = busy
    return [by_id[id] for id in sorted(by_id)]


def looks(total: int, first: int = 1) -> Iterator[int]:
    """
    How many of *total* to look at until one is safe: the *first* newest, then twice as many each time, then all.

    Whoever wants to know from which to resume need not read the manifests of thousands that are older.
    """
    count = first
    while count < total:
        yield count
        count *= 2
    yield total


def check(
    records: Sequence[CheckpointRecord],
    found: Sequence[Found],
    *,
    series: str,
    step: int | None = None,
    world_size: int | None = None,
    per_rank_used: Container[str] | None = None,
    live_epoch: bool = False,
    files: Mapping[int, Sequence[FileEntry]] | None = None,
    besides: Collection[str] = (),
) -> ResumeReport:
    """
    Judge every committed checkpoint of *series* that was looked at. Pure and deterministic.

    Args:
        records: Rows of the journal, all or those of `asked_of` with traces; other series are ignored.
        found: What stands in the series' directory. Names whose files were not verified
            (``mismatches`` is None) are judged by directory and manifest alone.
        series: Which series.
        step: Judge only this step.
        world_size: The number of ranks that would resume; None if that is not known.
        per_rank_used: Which names of per-rank state would be loaded; None for all.
        live_epoch: Whether a manager has the run open, so that attempts in flight are its own.
        files: What the journal recorded of each attempt's files, where that is to be compared with its manifest.
        besides: Directories of live checkpoints that nobody has looked at; of those the report says how many.

    Raises:
        InvalidArgument: A step or world size that cannot be one, a path listed twice, or a
            committed row without its place in the commit order.
    """
    _whole("step", step, 0)
    _whole("world_size", world_size, 1)
    at = {item.path: item for item in found if item.series == series}
    if len(at) != sum(item.series == series for item in found):
        raise InvalidArgument("a path is listed twice")
    rows = sorted((record for record in records if record.series == series), key=lambda record: record.id)
    asked = [record for record in rows if step is None or record.step == step]
    # Publishing moves the checkpoint that it replaces aside, and it is back after recovery at the latest.
    moving = {r.overwrites for r in rows if r.state is CheckpointState.GATHERED and r.overwrites is not None}
    candidates = []
    live = (record for record in asked if record.is_live and record.directory not in besides)
    for record in sorted(live, key=_order, reverse=True):
        item = at.get(record.directory)
        if record.id in moving and (item is None or item.holds != record.id):
            findings = [_moved_aside(record, live_epoch=live_epoch)]
        else:
            findings = _on_disk(record, item, (files or {}).get(record.id))
        candidates.append(Candidate(record, (*findings, *_across_ranks(record, world_size, per_rank_used))))
    general = [] if candidates else [_nothing(series, step)]
    general += _attempts(asked, candidates, live_epoch=live_epoch)
    newest = max((candidate.record.id for candidate in candidates), default=0)
    general += _unknown(rows, at.values(), newest=newest if step is None else None)
    return ResumeReport(series, tuple(candidates), tuple(general), not_looked_at=len(besides))


def _order(record: CheckpointRecord) -> int:
    if record.commit_seq is None:
        raise InvalidArgument(f"attempt {record.id} is committed and has no commit number")
    return record.commit_seq


def _on_disk(record: CheckpointRecord, item: Found | None, files: Sequence[FileEntry] | None) -> list[Finding]:
    if item is None or not item.is_directory:
        why = "is missing" if item is None else "is a link or a file, not a directory"
        return [_error("R002", record, f"{record.directory} {why}", "put it back, or resume from an older checkpoint")]
    elsewhere = "put the original directory back, or resume from an older checkpoint"
    if item.unreadable:
        text = f"{record.directory}: {'; '.join(item.mismatches or ())}"
        return [_error("R003", record, text, "see to the disk, or to who may read it, and check again")]
    if item.holds is None:
        return [_error("R003", record, f"{record.directory} has no readable {MANIFEST_NAME} of this run", elsewhere)]
    if item.holds != record.id:
        text = (
            f"{record.directory} holds attempt {item.holds}, as {MANIFEST_NAME} says; committed was attempt {record.id}"
        )
        return [_error("R003", record, text, elsewhere)]
    by_id: dict[str, list[str]] = {}
    if None not in (item.manifest_digest, record.manifest_digest) and item.manifest_digest != record.manifest_digest:
        by_id["R003"] = [f"{MANIFEST_NAME} is not the one that was committed"]
    elif item.manifest is not None and (contradictions := _contradictions(record, item.manifest, files)):
        by_id["R011"] = contradictions
    for mismatch in item.mismatches or ():
        by_id.setdefault(_KIND_OF_MISMATCH.get(mismatch.partition(":")[0], "R004"), []).append(mismatch)
    restore = "restore the files, or resume from an older checkpoint"
    found = [
        _error(id, record, f"{record.directory}: {_some(texts)}", _REBUILD if id == "R011" else restore)
        for id, texts in sorted(by_id.items())
    ]
    if item.extra:
        text = f"{record.directory} holds what was not committed: {printable(_some(item.extra))}"
        hint = "ckptmgr does not read it; move it away if other programs might"
        found.append(Finding("R013", Level.WARNING, text, hint, record.series, record.step, record.id))
    return found


def _contradictions(record: CheckpointRecord, manifest: Manifest, files: Sequence[FileEntry] | None) -> list[str]:
    """Where row and manifest differ, although the digest in the row is this manifest's."""
    wrong = [
        f"{MANIFEST_NAME} says {name} {theirs}, the journal {ours}"
        for name in ("series", "step", "format", "world_size", "per_rank", "metrics", "bytes")
        if (theirs := getattr(manifest, name)) != (ours := getattr(record, name))
    ]
    if files is not None:
        differ = {entry.path for entry in {*manifest.files} ^ {*files}}
        wrong += [f"{MANIFEST_NAME} and the journal differ on {path}" for path in sorted(differ)]
    return wrong


#: Mismatches that only show when the bytes are read.
_UNSEEN = frozenset({"digest", "unreadable"})
_KIND_OF_MISMATCH = {"missing": "R004", "size": "R004", "digest": "R005", "manifest": "R003"}


def _moved_aside(record: CheckpointRecord, *, live_epoch: bool) -> Finding:
    if live_epoch:
        return _error("R010", record, f"{record.directory} is being overwritten right now", "ask again in a moment")
    text = f"{record.directory} was being overwritten when the run was interrupted; recovery is pending"
    return _error("R009", record, text, _RECOVER)


def _across_ranks(
    record: CheckpointRecord, world_size: int | None, per_rank_used: Container[str] | None
) -> list[Finding]:
    names = [name for name in record.per_rank if per_rank_used is None or name in per_rank_used]
    if not names or world_size is None or world_size == record.world_size:
        return []
    text = (
        f"{', '.join(names)} differs by rank and was saved by {record.world_size} ranks; "
        f"{world_size} ranks cannot take it up"
    )
    hint = f"resume with {record.world_size} ranks, or leave {', '.join(names)} out of the state that is resumed"
    return [_error("R006", record, text, hint)]


def _nothing(series: str, step: int | None) -> Finding:
    what = f"{series} has no committed checkpoint" + ("" if step is None else f" of step {step}")
    return Finding("R001", Level.ERROR, what, "run `ckptmgr ls RUN` to see what there is", series, step)


def _attempts(asked: Iterable[CheckpointRecord], candidates: Sequence[Candidate], *, live_epoch: bool) -> list[Finding]:
    newest = candidates[0].record.id if candidates else 0
    findings = []
    for record in asked:
        about = (record.series, record.step, record.id)
        if record.state is CheckpointState.FAILED and record.id > newest:
            text = f"attempt {record.id} to save step {record.step} failed: {record.reason or 'no reason recorded'}"
            hint = f"run `ckptmgr show RUN {record.step} --series {record.series}` to see each rank's cause"
            findings.append(Finding("R007", Level.WARNING, text, hint, *about))
        elif record.is_in_flight and live_epoch:
            text = f"attempt {record.id} to save step {record.step} is in flight ({record.state})"
            findings.append(
                Finding(
                    "R010",
                    Level.INFO,
                    text,
                    "wait for it to be committed; `ckptmgr watch RUN` shows whether it goes on",
                    *about,
                )
            )
        elif record.is_in_flight:
            outcome = "committed if it is intact" if record.state is CheckpointState.GATHERED else "rolled back"
            text = (
                f"attempt {record.id} to save step {record.step} was interrupted while {record.state}; "
                f"recovery is pending, and it will be {outcome}"
            )
            findings.append(Finding("R009", Level.WARNING, text, _RECOVER, *about))
    return findings


def _unknown(rows: Sequence[CheckpointRecord], found: Iterable[Found], *, newest: int | None) -> list[Finding]:
    """What no row accounts for. A checkpoint that was begun after attempt *newest* must not go unnoticed."""
    known = set()
    for record in rows:
        known |= {record.staging_directory, record.retired_directory}
        # A retired or failed row has no claim on the final name any more.
        if record.is_in_flight or (record.state is CheckpointState.COMMITTED and record.retired_at is None):
            known.add(record.directory)
    attempts = {record.id for record in rows}
    findings = []
    for item in sorted(found, key=lambda item: item.path):
        if item.path in known or item.is_our_link:
            continue
        text = f"{printable(item.path)} is not known to the journal; it is never resumed from and never deleted"
        id, level, hint = "R008", Level.INFO, "run `ckptmgr recover RUN` to see what it holds"
        if newest is not None and _is_published(item) and item.holds not in attempts and (item.holds or 0) > newest:
            text = f"{item.path} holds attempt {item.holds} of this run, published, and the journal ends before it"
            id, level, hint = "R012", Level.ERROR, _OVERLOOKED
        findings.append(Finding(id, level, text, hint, item.series, item.step))
    return findings


def _is_published(item: Found) -> bool:
    """Whether it stands under its final name with a manifest of this run that says so."""
    manifest = item.manifest
    return manifest is not None and item.path == f"{item.series}/{manifest.format.directory_name(manifest.step)}"


def _error(id: str, record: CheckpointRecord, text: str, hint: str) -> Finding:
    return Finding(id, Level.ERROR, text, hint, record.series, record.step, record.id)


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more


def of_projections(wrong: Sequence[str], series: str) -> tuple[Finding, ...]:
    """Findings about ``meta.json`` and the latest links, from what `RunDirectory.stale_projections` found."""
    hint = "nothing is decided by it; the next start of a manager or `ckptmgr recover RUN --apply` makes it anew"
    return tuple(Finding("R014", Level.WARNING, text, hint, series) for text in wrong)


def demand(
    report: ResumeReport, *, min_step: int | None = None, max_age_s: float | None = None, now: float = 0.0
) -> ResumeReport:
    """
    The same report, with what speaks against the checkpoint to resume from although it is safe.

    An older one is never taken instead: what is demanded is about how far the run has come. Pure.

    Args:
        report: As `check` made it.
        min_step: The least step that will do.
        max_age_s: For how many seconds it may have been committed, at most.
        now: Unix seconds.
    """
    record = report.chosen
    if record is None:
        return report
    unmet = []
    if min_step is not None and record.step < min_step:
        text = f"{record.directory} is of step {record.step}, and step {min_step} or later was asked for"
        unmet.append(_error("R015", record, text, "was the right run given? `ckptmgr log RUN` says what became of it"))
    age = now - (record.committed_at or 0.0)
    # By a clock that is wrong, here or there, it may be of any age.
    if max_age_s is not None and abs(age) > max_age_s:
        when = f"{age:.0f} s ago" if age > 0 else f"in {-age:.0f} s, by the clock here"
        text = f"{record.directory} was committed {when}, and {max_age_s:.0f} s ago is the most that was asked for"
        unmet.append(_error("R016", record, text, "`ckptmgr log RUN` says why nothing newer was committed"))
    return dataclasses.replace(report, unmet=tuple(unmet))


def recall(report: ResumeReport, verified: Mapping[int, Verification]) -> ResumeReport:
    """
    The same report, with what the last comparison of the bytes of a checkpoint found and a look at names and sizes
    cannot see.

    What is known to be damaged does not become safe by being looked at less closely. Pure.

    Args:
        report: As `check` made it, without comparing bytes.
        verified: By attempt, its last verification.
    """

    def judged(candidate: Candidate) -> Candidate:
        record = candidate.record
        last = verified.get(record.id)
        unseen = [text for text in last.mismatches if text.partition(":")[0] in _UNSEEN] if last is not None else []
        if not unseen or candidate.damaged:
            return candidate
        again = f"`ckptmgr verify RUN --step {record.step} --series {record.series}`"
        text = f"{record.directory}: {_some(unseen)}, as its last verification found"
        found = _error("R005", record, text, f"restore the files and run {again}, or resume from an older checkpoint")
        return dataclasses.replace(candidate, findings=(*candidate.findings, found))

    return dataclasses.replace(report, candidates=tuple(map(judged, report.candidates)))


def shares(files: Iterable[FileEntry], ranks: int, *, as_saved: bool) -> list[list[FileEntry]]:
    """
    Who reads which file, each once, when *ranks* ranks verify a checkpoint together.

    Args:
        files: All of them.
        ranks: How many ranks there are.
        as_saved: As many saved it: then each reads what it wrote, which it will load from its cache a moment
            later. Else the sizes decide.
    """
    found: list[list[FileEntry]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for entry in sorted(files, key=lambda entry: (-entry.size, entry.path)):
        rank = entry.rank if as_saved and entry.rank < ranks else load.index(min(load))
        found[rank].append(entry)
        load[rank] += entry.size
    return found


def _whole(name: str, value: object, least: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise InvalidArgument(f"{name} is {value!r}, not a whole number of at least {least}")
