"""
No memory left: the kernel's OOM killer kills, for real, by a limit on a control group.

At a call one process takes more memory than there is. Either it alone stands in a group that has almost none, so
that it is the one to go; or the whole job has one limit, as in a container, and the kernel chooses.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from child_process import Ended
from crash_run import Scenario

from torture import runs, shim
from torture.faults import KILLED, MOST_S, Ground, Sweep
from torture.report import NotTried
from torture.shim import Action, Call, Orders, Phase, Struck

#: What a process has that is to go at once, and what a job of one rank has, bytes: enough to live, less than `EAT`.
_ALONE, _JOB = 16 << 20, 160 << 20
#: While several ranks have something to do.
_SHARED_WORK = (Phase.PREWRITTEN, Phase.WRITING, Phase.SHARDS, Phase.GATHERED)


@dataclasses.dataclass(frozen=True)
class _Names:
    """What the files of a memory group are called, by the version of control groups."""

    limit: str
    swap: tuple[str, str]
    kills: str


_V1 = _Names("memory.limit_in_bytes", ("memory.swappiness", "0"), "memory.oom_control")
_V2 = _Names("memory.max", ("memory.swap.max", "0"), "memory.events")


class Group:
    """
    A control group of its own, with so little memory, in bytes, and no swap. Gone when the block ends.

    Raises:
        NotTried: There cannot be one here; says why.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def __enter__(self) -> Group:
        home, self._names = _home()
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="ckptmgr-torture-", dir=home))
        except OSError as error:
            raise NotTried(f"needs a memory control group of its own: {error}") from error
        (self._folder / self._names.limit).write_text(str(self._limit))
        swap, none = self._names.swap
        if (self._folder / swap).exists():
            (self._folder / swap).write_text(none)
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                self._folder.rmdir()
            except OSError as error:
                # Who was killed may take a moment to go.
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
            else:
                return

    @property
    def processes(self) -> str:
        """The file into which a process writes 0 to enter."""
        return str(self._folder / "cgroup.procs")

    @property
    def kills(self) -> int:
        """How many of it the OOM killer has killed."""
        words = (self._folder / self._names.kills).read_text().split()
        return int(words[words.index("oom_kill") + 1])


def _home() -> tuple[Path, _Names]:
    """Where a group can be made."""
    if os.geteuid() != 0:
        raise NotTried("needs root, to limit memory")
    mine = {
        names: path
        for _, names, path in (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    }
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, place = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup" and "memory" in options.split(","):
            here = _below(Path(place), root, next(path for names, path in mine.items() if "memory" in names.split(",")))
            return here, _V1
        if kind == "cgroup2":
            here = _below(Path(place), root, mine.get("", "/"))
            # A group with processes in it can have none below it that has a limit; one further up can.
            for above in (here, *here.parents):
                control = above / "cgroup.subtree_control"
                if control.exists() and "memory" in control.read_text().split():
                    return above, _V2
    raise NotTried("needs control groups that limit memory")


def _below(place: Path, root: str, path: str) -> Path:
    """Where the group *path* is seen, if of all groups those below *root* are mounted at *place*."""
    here = place / os.path.relpath(path, root)
    return here if path.startswith(root) and here.is_dir() else place


class OutOfMemory(Sweep):
    """
    Who makes the call takes too much memory, alone in its group.

    Args:
        words: Series and scenario.
        world: Ranks.
        role: Who.
        phases: When.
    """

    def __init__(self, words: str, world: int, role: int, phases: Iterable[Phase] = tuple(Phase)) -> None:
        who = "writer" if role % 2 else "trainer"
        wanted = frozenset(phases)

        def orders(call: Call) -> Orders | None:
            return Orders(call.number, Action.EAT) if call.role == role and call.phase in wanted else None

        super().__init__(f"OOM kill of the {who}", words, world, orders, afterwards=True, victim=f"rank {role // 2}")

    @property
    def same(self) -> object:
        """All that need a memory limit and let the same run go by."""
        return ("out of memory", self.words, self.world)

    def prepare(self, ground: Ground, folder: Path) -> list[Call]:
        """See that memory can be limited here; the calls are those of any run."""
        del folder
        with Group(_ALONE) as group:
            ended = ground.forks.run(take_too_much, group.processes)
            if ended.status != KILLED or not group.kills:
                raise NotTried(f"the limit of a control group kills nobody here: {ended.output or ended.status}")
        calls: list[Call] = ground.whole(Sweep("", self.words, self.world, lambda *_: None, afterwards=False))
        return calls

    def _live(
        self, ground: Ground, folder: Path, place: Path, orders: Orders, *, afterwards: bool
    ) -> tuple[Ended, Path]:
        with Group(_ALONE) as group:
            orders = dataclasses.replace(orders, group=group.processes)
            ended, run = super()._live(ground, folder, place, orders, afterwards=afterwards)
            _assert_killed(group, place, ended)
        return ended, run


class OutOfMemoryTogether(OutOfMemory):
    """The writer takes too much, and the limit is the whole job's: the kernel may well kill the larger trainer."""

    def __init__(self, words: str) -> None:
        super().__init__(words, 1, shim.writer(0))
        self.fault = "OOM by the writer, the kernel chooses"

    def _live(
        self, ground: Ground, folder: Path, place: Path, orders: Orders, *, afterwards: bool
    ) -> tuple[Ended, Path]:
        assert self._scenario is not None
        run = ground.past(self._scenario, folder)
        shim.give(place, run, orders)
        with Group(_JOB) as group:
            args = (group.processes, run, place, self._scenario, afterwards)
            ended = ground.forks.run(live_within, *args, timeout_s=MOST_S)
            _assert_killed(group, place, ended)
        return ended, run

    def _dead(self, orders: Orders, struck: Struck, statuses: Mapping[int, int]) -> set[int]:
        del orders, struck
        return {shim.trainer(0) if statuses[0] == KILLED else shim.writer(0)}


def _assert_killed(group: Group, place: Path, ended: Ended) -> None:
    assert group.kills or not shim.struck(place).times, f"nobody was killed, so nothing was tried\n{ended.output}"


def take_too_much(processes: str) -> None:
    """In a child: enter a group, and take more than it has."""
    Path(processes).write_text("0")
    _ = b"x" * (2 * _JOB)


def live_within(processes: str, run: Path, orders: Path, scenario: Scenario, afterwards: bool) -> None:
    """In a child: the run, with all of its processes in a group."""
    Path(processes).write_text("0")
    runs.live(run, orders, scenario, 1, afterwards)


def sweeps() -> Iterator[Sweep]:
    """All of them."""
    for words in ("dcp first", "dcp steady", "hf overwrite"):
        yield OutOfMemory(words, 1, shim.trainer(0))
        yield OutOfMemory(words, 1, shim.writer(0))
    for words in ("dcp steady", "hf overwrite"):
        for role in (shim.trainer(0), shim.writer(0), shim.writer(1)):  # the trainer of rank 1 makes no call
            yield OutOfMemory(words, 2, role, _SHARED_WORK)
    for words in ("dcp overwrite", "hf steady"):
        yield OutOfMemoryTogether(words)
