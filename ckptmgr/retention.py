"""
What to keep: keep rules, and the plan that says which checkpoints may go and why the rest stays.

Pure: records in, plan with reasons out. Nothing here touches a disk, a clock or the journal; the
plan becomes retirement marks, which the journal takes in the transaction that commits the
checkpoint that made the others dispensable.

Whatever the rules say, three kinds of checkpoint never go: the newest committed one, pinned ones,
and those the caller protects (say, the one that was resumed from and is not superseded yet).
Order is by ``commit_seq``; a step number says nothing about age once a run has been set back.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ckptmgr.errors import InvalidArgument
from ckptmgr.lifecycle import CheckpointRecord, RetirementMark

#: Why the checkpoint that committed last stays.
NEWEST = "newest committed"
_NOTHING_PROTECTED: Mapping[int, str] = {}


class KeepRule(abc.ABC):
    """
    One reason to keep checkpoints. ``rule | rule`` keeps what either keeps.

    A rule sees the live committed checkpoints of one series, newest first, and is independent of
    every other rule: ``KeepLast(3) | KeepEvery(5000)`` keeps the last three of all, not the last
    three that are no multiple of 5000.
    """

    @property
    @abc.abstractmethod
    def text(self) -> str:
        """The rule in words; it is the reason that each checkpoint it keeps is given."""

    @abc.abstractmethod
    def keeps(self, newest_first: Sequence[CheckpointRecord], *, now: float) -> frozenset[int]:
        """The ids of the checkpoints this rule keeps. ``now`` is in Unix seconds."""

    @property
    def parts(self) -> tuple[KeepRule, ...]:
        """The rules this one is made of, itself if it is a single one."""
        return (self,)

    def __or__(self, other: KeepRule) -> KeepRule:
        return KeepAny((*self.parts, *other.parts)) if isinstance(other, KeepRule) else NotImplemented


@dataclasses.dataclass(frozen=True)
class KeepAny(KeepRule):
    """Keeps what any of its rules keeps. Made by ``|``."""

    rules: tuple[KeepRule, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, KeepRule) for rule in self.rules):
            raise InvalidArgument(f"rules is {self.rules!r}, not a tuple of keep rules")
        if not self.rules:
            raise InvalidArgument("no keep rule given", hint="use KeepAll() to keep everything")

    @property
    def text(self) -> str:
        return " | ".join(rule.text for rule in self.rules)

    @property
    def parts(self) -> tuple[KeepRule, ...]:
        return tuple(part for rule in self.rules for part in rule.parts)

    def keeps(self, newest_first: Sequence[CheckpointRecord], *, now: float) -> frozenset[int]:
        return frozenset().union(*(rule.keeps(newest_first, now=now) for rule in self.rules))


@dataclasses.dataclass(frozen=True)
class KeepAll(KeepRule):
    """Keeps everything."""

    @property
    def text(self) -> str:
        return "all"

    def keeps(self, newest_first: Sequence[CheckpointRecord], *, now: float) -> frozenset[int]:  # noqa: ARG002
        return frozenset(record.id for record in newest_first)


@dataclasses.dataclass(frozen=True)
class KeepLast(KeepRule):
    """Keeps the *n* that committed last."""

    n: int

    def __post_init__(self) -> None:
        _positive_int("n", self.n)

    @property
    def text(self) -> str:
        return f"last {self.n}"

    def keeps(self, newest_first: Sequence[CheckpointRecord], *, now: float) -> frozenset[int]:  # noqa: ARG002
        return frozenset(record.id for record in newest_first[: self.n])


@dataclasses.dataclass(frozen=True)
class KeepEvery(KeepRule):
    """Keeps each checkpoint whose step is a multiple of *steps*, step 0 included."""

    steps: int

    def __post_init__(self) -> None:
        _positive_int("steps", self.steps)

    @property
    def text(self) -> str:
        return f"every {self.steps} steps"

    def keeps(self, newest_first: Sequence[CheckpointRecord], *, now: float) -> frozenset[int]:  # noqa: ARG002
        return frozenset(record.id for record in newest_first if record.step % self.steps == 0)


@dataclasses.dataclass(frozen=True)
class KeepBest(KeepRule):
    """
    Keeps the *n* best by a metric that was given to ``save``.

    Checkpoints without that metric, or where it is NaN or infinite, are never among the best. Of
    two that are equally good the newer one wins.
    """

    n: int
    metric: str
    mode: str = "min"

    def __post_init__(self) -> None:
        _positive_int("n", self.n)
        if not isinstance(self.metric, str) or not self.metric:
            raise InvalidArgument(f"metric is {self.metric!r}, not the name of a metric")
        if self.mode not in ("min", "max"):
            raise InvalidArgument(f"mode is {self.mode!r}, not 'min' or 'max'")

    @property
    def text(self) -> str:
        return f"best {self.n} by {self.metric} ({self.mode})"

    def keeps(self, newest_first: Sequence[CheckpointRecord], *, now: float) -> frozenset[int]:  # noqa: ARG002
        scored = [
            (value if self.mode == "min" else -value, record.id)
            for record in newest_first
            if (value := _finite(record.metrics.get(self.metric))) is not None
        ]
        # The sort is stable, so of equals the newer stays in front.
        scored.sort(key=lambda pair: pair[0])
        return frozenset(id for _, id in scored[: self.n])


@dataclasses.dataclass(frozen=True)
class KeepFor(KeepRule):
    """Keeps each checkpoint for *hours* after it committed."""

    hours: float

    def __post_init__(self) -> None:
        hours = _finite(self.hours)
        if hours is None or hours <= 0:
            raise InvalidArgument(f"hours is {self.hours!r}, not a positive number")

    @property
    def text(self) -> str:
        return f"younger than {self.hours:g} h"

    def keeps(self, newest_first: Sequence[CheckpointRecord], *, now: float) -> frozenset[int]:
        horizon = now - 3600 * self.hours
        return frozenset(r.id for r in newest_first if r.committed_at is not None and r.committed_at > horizon)


class Kept(NamedTuple):
    """A checkpoint that stays, and every reason why."""

    record: CheckpointRecord
    reasons: tuple[str, ...]


class Dropped(NamedTuple):
    """A checkpoint that may go, and why nothing protects it."""

    record: CheckpointRecord
    reason: str


@dataclasses.dataclass(frozen=True)
class RetentionPlan:
    """What stays and what may go, both newest first."""

    keep: tuple[Kept, ...]
    drop: tuple[Dropped, ...]

    @property
    def marks(self) -> tuple[RetirementMark, ...]:
        """The plan as the journal takes it to start retirements."""
        return tuple(RetirementMark(item.record.id, item.reason) for item in self.drop)

    @property
    def decisions(self) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
        """The plan as the journal takes it to remember why: (checkpoint id, "keep" or "drop", reasons)."""
        kept = tuple((item.record.id, "keep", item.reasons) for item in self.keep)
        return kept + tuple((item.record.id, "drop", (item.reason,)) for item in self.drop)


def plan(
    records: Sequence[CheckpointRecord],
    rule: KeepRule,
    *,
    now: float,
    protected: Mapping[int, str] = _NOTHING_PROTECTED,
) -> RetentionPlan:
    """
    Decide what stays. Pure and deterministic; the order of *records* does not matter.

    Args:
        records: The live committed checkpoints of one series, and nothing else.
        rule: What to keep.
        now: Unix seconds, for rules that look at age.
        protected: Checkpoint id → reason, for those that must stay whatever the rule says.

    Raises:
        InvalidArgument: A record is not live, of another series, or listed twice; *rule* is no
            keep rule; *now* is not a finite number.
    """
    if not isinstance(rule, KeepRule):
        raise InvalidArgument(
            f"{rule!r} is not a keep rule", hint="combine rules with |, as in KeepLast(3) | KeepAll()"
        )
    if _finite(now) is None:
        raise InvalidArgument(f"now is {now!r}, not Unix seconds")
    newest_first = _newest_first(records)
    kept_by = [(part.text, part.keeps(newest_first, now=now)) for part in rule.parts]
    keep = []
    drop = []
    for position, record in enumerate(newest_first):
        reasons = [text for text, ids in kept_by if record.id in ids]
        if position == 0:
            reasons.append(NEWEST)
        if record.pinned:
            reasons.append("pinned")
        if record.id in protected:
            reasons.append(protected[record.id])
        if reasons:
            keep.append(Kept(record, tuple(reasons if len(reasons) == 1 else dict.fromkeys(reasons))))
        else:
            drop.append(Dropped(record, f"no rule keeps it ({rule.text})"))
    return RetentionPlan(tuple(keep), tuple(drop))


def unsettled(kept: Sequence[Kept], rule: KeepRule) -> list[CheckpointRecord] | None:
    """
    Of what a plan keeps, what *rule* must be asked about again when the next checkpoint commits; None if about all.

    A checkpoint that is kept for its step alone, or because everything is, stays kept for that and for nothing
    else, as long as others are only added: nobody unpins, overwrites or removes one.
    """
    if not all(type(part) in (KeepAll, KeepLast, KeepEvery, KeepBest, KeepFor) for part in rule.parts):
        return None  # it may think again about any of them
    lasting = {part.text for part in rule.parts if isinstance(part, KeepAll | KeepEvery)}
    return [record for record, reasons in kept if not lasting.issuperset(reasons)]


_NOBODY_KEEPS = re.compile(r"no rule keeps it \((.*)\)")
_LAST = re.compile(r"last ([0-9]+)")
_TEXTS = (
    ("all", re.compile(r"all")),
    ("every", re.compile(r"every ([0-9]+) steps")),
    ("last", _LAST),
    ("best", re.compile(r"best ([0-9]+) by .* \((?:min|max)\)")),
    ("hours", re.compile(r"younger than (\S+) h")),
    ("none", re.compile(r"newest committed|pinned")),
)


class Growth(NamedTuple):
    """What keep rules come to while a series goes on saving."""

    #: Of all saves, the share that stays for ever.
    share: float
    #: How many of the others there are once the rules have something to let go.
    level: float


def growth(reasons: Iterable[str], *, steps_between: int, seconds_between: float) -> Growth | None:
    """
    What the rules come to that are named by *reasons*, as the journal has them; None if a rule is none of ours.

    Args:
        reasons: Why checkpoints are kept, and why others were let go.
        steps_between: From one save to the next.
        seconds_between: From one save to the next.
    """
    share, level = 0.0, 1.0
    texts = [match[1].split(" | ") if (match := _NOBODY_KEEPS.fullmatch(text)) else [text] for text in reasons]
    for text in {part for parts in texts for part in parts}:
        kind, found = next(((kind, found) for kind, how in _TEXTS if (found := how.fullmatch(text))), (None, None))
        if kind is None or found is None:
            return None
        if kind == "all":
            share = 1.0
        elif kind == "every":
            share = max(share, math.gcd(steps_between, int(found[1])) / int(found[1]))
        elif kind in ("last", "best"):
            level = max(level, float(found[1]))
        elif kind == "hours":
            level = max(level, 3600 * float(found[1]) / seconds_between)
    return Growth(share, level)


def newer_that_end_it(reasons: Sequence[str]) -> int | None:
    """
    How many newer checkpoints it takes until nothing keeps what is kept for *reasons*, as the journal has them.

    None where more than being among the last keeps it, or where a rule is none of ours.
    """
    last = [int(found[1]) for found in map(_LAST.fullmatch, reasons) if found]
    return max(last) if last and len(last) == len([reason for reason in reasons if reason != NEWEST]) else None


def _newest_first(records: Sequence[CheckpointRecord]) -> list[CheckpointRecord]:
    by_seq: dict[int, CheckpointRecord] = {}
    for record in records:
        if not record.is_live or record.commit_seq is None or record.committed_at is None:
            raise InvalidArgument(f"attempt {record.id} is not a live committed checkpoint")
        if record.commit_seq in by_seq:
            raise InvalidArgument(f"attempts {by_seq[record.commit_seq].id} and {record.id} share a commit number")
        by_seq[record.commit_seq] = record
    if len({record.id for record in records}) != len(by_seq):
        raise InvalidArgument("an attempt is listed twice")
    if len({record.series for record in records}) > 1:
        raise InvalidArgument("the records belong to more than one series")
    return [by_seq[seq] for seq in sorted(by_seq, reverse=True)]


def _positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgument(f"{name} is {value!r}, not a whole number of at least 1")


def _finite(value: object) -> float | None:
    """*value* as a float, or None if it is no finite number (NaN, infinite, a bool, too large, not a number)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
