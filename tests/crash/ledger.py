"""
The crash ledger: for every ``# Crash here:`` comment of the product, what a crash there leaves and what becomes of it.

``test_crash_ledger.py`` lives through every row, and holds rows and comments together.
docs/explanation/crash-ledger.md tells the same in prose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from child_process import AtComment

#: Format and scenario. Before publishing nothing depends on which of them it is, so a few stand for all;
#: the sweep (test_crash_sweep.py) has the rest.
UNPUBLISHED = ("dcp first", "dcp overwrite", "hf steady")
PUBLISHED = ("dcp first", "dcp steady", "dcp overwrite", "dcp overwrite-aside", "hf steady", "hf overwrite")
RETIRING = tuple(where for where in PUBLISHED if "first" not in where)


@dataclasses.dataclass(frozen=True)
class Left:
    """
    What a crash while saving leaves, and how it ends.

    Args:
        at: The comment.
        state: The row of the attempt that was under way.
        new: Where its directory is: ``nowhere``, ``staging`` or ``final``.
        then: What recovery makes of the row.
        old: Where the checkpoint is that it lets go or replaces, if not under its final name, by scenario.
        scenarios: In which it is tried.
        fails: The save is to fail for another reason first.
    """

    at: AtComment
    state: str
    new: str
    then: str
    old: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scenarios: tuple[str, ...] = UNPUBLISHED
    fails: bool = False


def _left(comment: str, *facts: str, **more: object) -> Left:
    return Left(AtComment(comment), *facts, **more)  # type: ignore[arg-type]


_ASIDE = {"overwrite": "retired", "overwrite-aside": "retired"}

SAVING = (
    _left("PREWRITTEN without a staging directory", "PREWRITTEN", "nowhere", "FAILED"),
    _left("PREWRITTEN with an empty staging directory", "PREWRITTEN", "staging", "FAILED"),
    _left("PREWRITTEN with metadata in the staging directory", "PREWRITTEN", "staging", "FAILED"),
    _left("WRITING with no rank's bytes", "WRITING", "staging", "FAILED"),
    Left(
        AtComment("WRITING with files whose names may not be durable yet", in_writer=True),
        "WRITING",
        "staging",
        "FAILED",
    ),
    _left("WRITING with every byte in the staging directory", "WRITING", "staging", "FAILED"),
    _left("WRITING with a durable manifest", "WRITING", "staging", "FAILED"),
    _left("WRITING without its staging directory", "WRITING", "nowhere", "FAILED", fails=True),
    _left("GATHERED with a complete staging directory", "GATHERED", "staging", "COMMITTED"),
    Left(
        AtComment("GATHERED with the old directory set aside"),
        "GATHERED",
        "staging",
        "COMMITTED",
        old={"overwrite-aside": "retired"},
        scenarios=("dcp overwrite-aside", "hf overwrite-aside"),
    ),
    Left(
        AtComment("GATHERED with a published directory"),
        "GATHERED",
        "final",
        "COMMITTED",
        old={"overwrite": "the new one's staging", "overwrite-aside": "retired"},
        scenarios=PUBLISHED,
    ),
    _left("GATHERED and published durably", "GATHERED", "final", "COMMITTED", old=_ASIDE, scenarios=PUBLISHED),
    _left(
        "COMMITTED with a stale meta.json and link", "COMMITTED", "final", "COMMITTED", old=_ASIDE, scenarios=PUBLISHED
    ),
    _left(
        "COMMITTED and retiring under its final name", "COMMITTED", "final", "COMMITTED", old=_ASIDE, scenarios=RETIRING
    ),
    Left(
        AtComment("the row says retiring, the directory has its retired name"),
        "COMMITTED",
        "final",
        "COMMITTED",
        old={"steady": "retired"},
        scenarios=("dcp steady", "hf steady"),
    ),
    _left(
        "the directory is gone, the row still says retiring",
        "COMMITTED",
        "final",
        "COMMITTED",
        old=dict.fromkeys(("steady", "overwrite", "overwrite-aside"), "nowhere"),
        scenarios=RETIRING,
    ),
)


@dataclasses.dataclass(frozen=True)
class Twice:
    """
    A crash while saving, and another while the next start recovers.

    Args:
        at: The comment at which recovery dies.
        first: The comment at which the save died.
        scenario: What was being saved.
        damage: Which copy of the new checkpoint loses a byte in between: ``staging``, ``final`` or none.
        then: What becomes of the attempt.
    """

    at: AtComment
    first: AtComment
    scenario: str
    then: str
    damage: str = ""


def _twice(comment: str, first: str, *facts: str) -> Twice:
    return Twice(AtComment(comment), AtComment(first), *facts)


RECOVERING = (
    _twice("as before, but of this epoch", "WRITING with every byte", "dcp steady", "FAILED"),
    _twice("as before, but of this epoch", "GATHERED with a complete", "dcp overwrite", "COMMITTED"),
    _twice("in flight without a directory", "WRITING with every byte", "dcp overwrite", "FAILED"),
    _twice("GATHERED and published; ", "GATHERED with a complete", "dcp first", "COMMITTED"),
    _twice("GATHERED and published; ", "GATHERED with a complete", "dcp overwrite", "COMMITTED"),
    _twice("GATHERED and published; ", "GATHERED with the old", "dcp overwrite-aside", "COMMITTED"),
    _twice("retiring, and nothing of it on disk", "COMMITTED and retiring", "dcp steady", "COMMITTED"),
    _twice("retiring, and nothing of it on disk", "GATHERED and published durably", "dcp overwrite", "COMMITTED"),
    _twice("GATHERED without any copy", "GATHERED with a complete", "dcp steady", "FAILED", "staging"),
    _twice("GATHERED without any copy", "GATHERED and published durably", "dcp first", "FAILED", "final"),
    _twice(
        "a live checkpoint stands aside and its name is free",
        "GATHERED and published durably",
        "dcp overwrite",
        "FAILED",
        "final",
    ),
)

#: Rebuilding a damaged journal with `ckptmgr recover --rebuild --apply`.
REBUILDING = (
    AtComment("the first checkpoints are in the journal, in order"),
    AtComment("the first checkpoints are in the journal, in order", nth=3),
    AtComment("no journal; rebuilding again starts anew"),
    AtComment("a rollback journal without its database"),
)

#: `ckptmgr prune --apply` of a run that nobody has open; the second of three deletions, where there are several.
PRUNING = (
    AtComment("what a prune lets go is marked"),
    AtComment("a prune is about to delete the next", nth=2),
    AtComment("what a prune has deleted still says retiring", nth=2),
)

#: A manager that a command has asked to prune.
ASKED = (
    AtComment("what a command wants to be rid of is marked"),
    AtComment("a request is done and nobody has said so"),
)

#: `ckptmgr adopt --apply`: the comment, the state of the attempt, and where its directory is.
ADOPTING = (
    (AtComment("an adoption PREWRITTEN without a staging directory"), "PREWRITTEN", "nowhere"),
    (AtComment("an adoption WRITING with none of its files"), "WRITING", "staging"),
    (AtComment("an adoption WRITING with a durable manifest", nth=2), "WRITING", "staging"),
    (AtComment("an adoption that failed, in flight without its staging directory"), "WRITING", "nowhere"),
    (AtComment("an adoption GATHERED with a complete staging directory", nth=2), "GATHERED", "staging"),
    (AtComment("an adoption GATHERED and published durably"), "GATHERED", "final"),
)

#: A manager that was stopped and comes too late: another one has taken the run over meanwhile.
TOO_LATE = (AtComment("a live checkpoint stands at the retired name of another"),)
