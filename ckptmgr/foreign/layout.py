"""What every layout gives: where its checkpoints are, how one is judged, and what its own records say of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

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
    """The directories in *folder* whose names *pattern* matches in full, its first group being the step."""
    matches = folder.matching(pattern, Kind.DIRECTORY)
    return [Checkpoint(folder.folder(name), int(match[1]), judge) for name, match in matches.items()]


def step_of(name: str) -> int | None:
    """The last number in a name."""
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
