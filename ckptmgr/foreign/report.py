"""
What is said about checkpoints of other libraries: findings with stable ids, checkpoints, and a verdict.

Pure. A checkpoint is *complete* if nothing was found that contradicts it: for a layout with an index, everything
that the index names is there in its size; for one without, what can be seen is whole. What that comes to is said
for each layout (`Judged.means`), since no layout here records what was committed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptmgr.errors import printable
from ckptmgr.resume import Level, Verdict, worst

#: Every finding there is: id → what it means. Ids are never reused for something else.
FINDINGS: Mapping[str, str] = {
    "F001": "no checkpoint of this layout is there",
    "F002": "what its index names, or what every checkpoint of this layout has, is missing",
    "F003": "a file has another size than its own header or the index says",
    "F004": "a file is empty",
    "F005": "a file holds nothing but zeros",
    "F006": "a file or directory cannot be read as what it should be",
    "F007": "files of some ranks or shards are missing",
    "F008": "the index has tensors that stand in no file",
    "F009": "a file has other bytes than its checksums were made of",
    "F010": "a save was not finished, or is still going on",
    "F011": "what should name the newest checkpoint cannot be read, or names none that is there",
    "F012": "the library that wrote it does not count this checkpoint among those it resumes from",
    "F013": "a file stands there that the index does not name",
    "F014": "it was saved by another number of ranks",
    "F015": "something was not looked at, or cannot be told from the files",
    "F016": "a link, a pipe or a device stands where a file or directory should be",
    "F017": "a checkpoint says of itself that it is of another step",
    "F018": "it is of an earlier step than was asked for",
}
DAMAGE = frozenset({"F002", "F003", "F004", "F005", "F006", "F007", "F008", "F009", "F017"})
#: Those that are warnings unless said otherwise.
_WARNINGS = frozenset({"F010", "F011", "F012", "F013", "F015"})
_OLDER = "do not resume from it; take an older one, or restore it from a copy"
_HINTS = {
    "F001": "was the right directory given?",
    "F009": "the storage gave back other bytes than were written: do not use it, and check the others with --deep",
    "F010": "if no training is running, it is a leftover of one that was killed",
    "F011": "give the checkpoint to resume from by its path",
    "F012": "give its path to resume from it, if you know that its save has ended",
    "F013": "it may be left from an earlier save into the same directory; a reader that takes all files would take it",
    "F014": "resume with as many ranks as saved it",
    "F015": "for this part, take what is said of the checkpoint with care",
    "F016": "no link is followed: give the directory that it leads to",
    "F018": "was the right directory given?",
}
#: Names that a finding spells out in its text, and that it carries.
_SHOWN = 3
_KEPT = 100


def _hint(id: str, level: Level) -> str:
    return _HINTS.get(id, _OLDER if level is Level.ERROR else _HINTS["F015"])


@dataclasses.dataclass(frozen=True)
class Finding:
    """One result. ``path`` is the checkpoint's, relative to the directory judged, or None if it is about no single one;
    ``files`` are some of the names that it is about, relative to the checkpoint."""

    id: str
    level: Level
    text: str
    hint: str
    path: str | None
    step: int | None
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON-able facts; without a checkpoint if it is about none."""
        facts = {**dataclasses.asdict(self), "level": self.level.value, "files": list(self.files)}
        return facts if self.path is not None else {k: v for k, v in facts.items() if k not in ("path", "step")}


class Faults:
    """Collects what is found out about one thing, and says it with one finding per id, however many files there are."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, Level], list[tuple[str, str]]] = {}
        self._counts: dict[tuple[str, Level], int] = {}

    def add(self, id: str, name: str, why: str = "", *, level: Level | None = None) -> None:
        """Note that the finding *id* is true of the file *name*, because of *why*; *name* may be empty."""
        key = (id, level or (Level.WARNING if id in _WARNINGS else Level.ERROR))
        self._counts[key] = self._counts.get(key, 0) + 1
        found = self._found.setdefault(key, [])
        if len(found) < _KEPT:
            found.append((printable(name), printable(why[:200])))

    def findings(self, path: str | None = None, step: int | None = None) -> tuple[Finding, ...]:
        """Everything that was noted, in order of the ids."""
        return tuple(
            Finding(
                id, level, self._text(id, level), _hint(id, level), path, step,
                tuple(name for name, _ in self._found[id, level] if name),
            )
            for id, level in sorted(self._found)
        )  # fmt: skip

    def _text(self, id: str, level: Level) -> str:
        said = [f"{name} ({why})" if name and why else name or why for name, why in self._found[id, level][:_SHOWN]]
        more = self._counts[id, level] - len(said)
        listed = ", ".join(part for part in said if part) + (f" and {more} more" if more else "")
        return FINDINGS[id] + (f": {listed}" if listed else "")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A checkpoint and what was found out about it. ``path`` is relative to the directory, empty for itself."""

    path: str
    step: int | None
    findings: tuple[Finding, ...]

    @property
    def complete(self) -> bool:
        """Whether no finding is an error."""
        return all(finding.level is not Level.ERROR for finding in self.findings)

    @property
    def damaged(self) -> bool:
        """Whether something of it is missing or torn."""
        return any(finding.id in DAMAGE and finding.level is Level.ERROR for finding in self.findings)


@dataclasses.dataclass(frozen=True)
class Judged:
    """The checkpoints of one layout and kind in a directory."""

    layout: str
    #: ``checkpoint``, or ``hf`` for weights alone.
    series: str
    #: What it means that one of these is complete, in a sentence.
    means: str
    #: Newest first.
    candidates: tuple[Candidate, ...]
    #: About no single checkpoint.
    findings: tuple[Finding, ...]
    #: What was asked for and the newest complete one does not fulfil; then none is chosen.
    unmet: tuple[Finding, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether a training can be resumed from these, not only a model loaded."""
        return self.series != "hf"

    @property
    def chosen(self) -> Candidate | None:
        """The newest complete one, if it is what was asked for."""
        complete = (candidate for candidate in self.candidates if candidate.complete)
        return None if self.unmet else next(complete, None)

    @property
    def verdict(self) -> Verdict:
        """What it comes to, in the words of the resume check."""
        if not self.candidates:
            return Verdict.NONE
        if self.unmet:
            return Verdict.UNSAFE
        if self.chosen is self.candidates[0]:
            return Verdict.SAFE
        if self.chosen is not None:
            return Verdict.OLDER
        return Verdict.CORRUPT if all(candidate.damaged for candidate in self.candidates) else Verdict.UNSAFE


@dataclasses.dataclass(frozen=True)
class ForeignReport:
    """What stands in a directory that ckptmgr did not write; at least one layout."""

    directory: Path
    layouts: tuple[Judged, ...]
    #: Series that are asked about besides.
    required: frozenset[str] = frozenset()

    @property
    def asked(self) -> tuple[Judged, ...]:
        """What the verdict is about: what a training can be resumed from, or the exports if that is all or required."""
        asked = tuple(judged for judged in self.layouts if judged.trains or judged.series in self.required)
        return asked or self.layouts

    @property
    def verdict(self) -> Verdict:
        """The worst of `asked`."""
        return worst(judged.verdict for judged in self.asked)

    @property
    def chosen(self) -> Candidate | None:
        """The newest complete one of the first layout that has one."""
        return next((judged.chosen for judged in self.asked if judged.chosen is not None), None)

    def absolute(self, candidate: Candidate) -> Path:
        """Where a checkpoint stands."""
        return self.directory / candidate.path

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able facts."""
        chosen = self.chosen
        return {
            "directory": str(self.directory),
            "verdict": self.verdict.value,
            "path": str(self.absolute(chosen)) if chosen is not None else None,
            "step": chosen.step if chosen is not None else None,
            "layouts": [
                {
                    "layout": judged.layout,
                    "series": judged.series,
                    "means": judged.means,
                    "verdict": judged.verdict.value,
                    "path": str(self.absolute(judged.chosen)) if judged.chosen is not None else None,
                    "findings": [finding.to_dict() for finding in judged.findings],
                    "checkpoints": [
                        {
                            "path": str(self.absolute(candidate)),
                            "step": candidate.step,
                            "complete": candidate.complete,
                            "findings": [
                                finding.to_dict()
                                for finding in (*candidate.findings, *judged.unmet)
                                if finding.path == candidate.path
                            ],
                        }
                        for candidate in judged.candidates
                    ],
                }
                for judged in self.layouts
            ],
        }
