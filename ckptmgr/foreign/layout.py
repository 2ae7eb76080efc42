"""What every layout gives: where its checkpoints are, how one is judged, and what its own records say of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign.contents import Look
from ckptmgr.foreign.ground import Folder, Kind
from ckptmgr.foreign.report import Faults

#: Digits of a step or rank: what int64 has room for.
NUMBER = "([0-9]{1,18})"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One that was found and not looked at yet."""

    #: The directory that it is, or that the file is in.
    folder: Folder
    step: int | None
    judge: Callable[[Look], None]
    #: The file, if it is one.
    name: str = ""
    #: Those of a higher one are newer, whatever their step.
    generation: int = 0

    @property
    def path(self) -> str:
        """Relative to the directory that is judged; empty for itself."""
        return "/".join(part for part in (self.folder.path, self.name) if part)

    @property
    def age(self) -> tuple[int, int, str]:
        """What they are put in order by, the newest last."""
        return self.generation, -1 if self.step is None else self.step, self.path


@dataclasses.dataclass
class Found:
    """The checkpoints of one layout and kind, and what is to be said besides."""

    layout: str
    series: str
    means: str
    checkpoints: list[Checkpoint]
    faults: Faults = dataclasses.field(default_factory=Faults)


def numbered(folder: Folder, pattern: str, judge: Callable[[Look], None]) -> list[Checkpoint]:
    """The directories in *folder* whose names *pattern* matches in full, its first group being the step; and links."""
    matches = folder.matching(pattern, Kind.DIRECTORY)
    links = folder.matching(pattern, Kind.LINK)
    return [
        *(Checkpoint(folder.folder(name), int(match[1]), judge) for name, match in matches.items()),
        *(Checkpoint(folder.folder(name), int(match[1]), _judge_link) for name, match in links.items()),
    ]


def _judge_link(look: Look) -> None:
    # Left out, an older one would be called the newest.
    look.note("F016", why="a link")


def is_newest(step: int, known: Iterable[Checkpoint]) -> bool:
    """Whether *step* is newer than all of *known*, and there are some."""
    steps = [each.step for each in known if each.step is not None]
    return bool(steps) and step > max(steps)


def judge_missing(look: Look) -> None:
    """What the library has recorded as its newest checkpoint, once it was complete, and which is gone."""
    look.note("F002", why="the whole directory, which is recorded as the newest checkpoint")


def siblings(folder: Folder, known: list[Checkpoint], claimed: set[str], judge: Callable[[Look], None]) -> None:
    """Add what is called as those in *known* are, but for the number: what a save has only begun, or is unreadable."""
    paths = {each.path for each in known} | claimed
    stems = {_stem(each.folder.path) for each in known if each.folder.path}
    for name, entry in folder.entries.items():
        below = folder.folder(name)
        if entry.kind is Kind.DIRECTORY and below.path not in paths and _stem(below.path) in stems and _is_flat(below):
            known.append(Checkpoint(below, step_of(name), judge))


def _is_flat(folder: Folder) -> bool:
    # What has directories of its own may be another run of that name.
    try:
        return all(entry.kind is not Kind.DIRECTORY for entry in folder.entries.values())
    except (OSError, CheckpointError):
        return True


def _stem(path: str) -> str | None:
    stem, count = re.subn("[0-9]+", "0", path.rpartition("/")[2])
    return stem if count else None


def step_of(name: str) -> int | None:
    """The last number in a name, unless it is one of the hashes that revisions are called by."""
    if re.fullmatch("[0-9a-f]{40}", name):
        return None
    numbers = re.findall("[0-9]+", name, re.ASCII)
    return int(numbers[-1]) if numbers and len(numbers[-1]) <= 18 else None


def unfinished(folder: Folder, faults: Faults, pattern: str, kind: Kind = Kind.DIRECTORY) -> bool:
    """Note everything in *folder* that *pattern* matches in full, as what a save has not finished."""
    names = folder.matching(pattern, kind)
    for name in names:
        faults.add("F010", folder.folder(name).path)
    return bool(names)


def gaps(numbers: Iterable[int]) -> list[int]:
    """Which numbers from 0 to the highest are not there; the first hundred of them."""
    known = {*numbers}
    found: list[int] = []
    for number in range(max(known, default=-1)):
        if len(found) == 100:
            break
        if number not in known:
            found.append(number)
    return found
