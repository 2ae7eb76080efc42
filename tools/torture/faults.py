"""
The sweeps: a fault at every call of a run, one after the other, each followed by everything that must hold.

A sweep lets its run go by once and writes all its calls down; each of them is a point. At a point the
run starts anew from the same past, the fault strikes at that call, and the judge opens what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import crash_run
from child_process import AtComment, Ended, ForkServer, assert_no_writer_of
from crash_run import Scenario, scenario_of, scenarios

from torture import mounts, runs, shim
from torture.shim import Action, Call, Kind, Orders, Phase

#: The columns of the table.
NOT_REACHED = "not reached"
TRANSITIONS = (*(phase.name for phase in Phase), NOT_REACHED)
#: The status of a process that was killed.
KILLED = -9
#: Longest that anything may take that ends by itself.
MOST_S = 90
#: An error of one of these on a file that is being saved ends the attempt: its bytes cannot be vouched for.
_MUST_FAIL = (Kind.CREATE, Kind.WRITE, Kind.ALLOCATE, Kind.TRUNCATE, Kind.FSYNC, Kind.CLOSE, Kind.MKDIR)


class Ground:
    """
    Where torture happens: a fork server with everything imported, and runs to start from, made once.

    Args:
        folder: On the disk that is to be used; everything goes below it.
        library: The shim.
        path: Folders that go before the import path of children, for mutants.
        stem: The address of a fork server with the shim to fork this one's from.
    """

    def __init__(self, folder: Path, library: Path, path: tuple[Path, ...] = (), stem: str | None = None) -> None:
        here = Path(__file__).resolve().parents[1]
        tests = here.parent / "tests"
        self.folder = folder
        self.forks = ForkServer(
            "ckptmgr.manager",
            "ckptmgr.cli",
            "torture.runs",
            path=(*path, here, tests / "crash", tests),
            environment={"LD_PRELOAD": str(library)},
            within=mounts.private() if stem is None else (),
            stem=stem,
        )
        self._made: dict[object, Any] = {}
        self._locks: dict[object, threading.Lock] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()

    def once(self, key: object, make: Callable[[Path], Any]) -> Any:
        """What *make* returns, called once per *key* with a name for a folder of its own."""
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._made:
                self._made[key] = make(self.folder / f"made-{next(self._numbers)}")
            return self._made[key]

    def past(self, scenario: Scenario, to: Path) -> Path:
        """Put a run that has lived through *scenario*'s past at a place."""

        def live(folder: Path) -> Path:
            self.forks.do(crash_run.prepare, folder / "alpha", scenario)
            self.forks.do(crash_run.recover_once, folder / "alpha")
            return folder / "alpha"

        return crash_run.copy_of(self.once(("past", scenario.before), live), to)

    def whole(self, technique: Any) -> Sequence[Any]:
        """What a technique prepares, once for all that are the same."""
        return self.once(("whole", technique.same), lambda folder: technique.prepare(self, folder))

    def close(self) -> None:
        """End all processes."""
        self.forks.close()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """
    What a point came to: where in the run's life the fault struck; a violation in words, or empty.

    *caught*: of a control, that the judge found what must be found.
    """

    phase: str
    violation: str = ""
    caught: bool = False


class Sweep:
    """
    One fault at every call of one run.

    Args:
        fault: What the table calls it.
        words: Series and scenario, such as ``dcp steady``, or ``create``.
        world: Ranks.
        orders: The order for a call, given what it was when nothing struck; None to leave it out.
        afterwards: The fault ends, and there is another save.
        kinds: Which calls are numbered.
        scenario: What *words* stand for, if it is none that they name.
        victim: Whom it concerns, where the fault's name does not say it.
    """

    def __init__(
        self,
        fault: str,
        words: str,
        world: int,
        orders: Callable[[Call], Orders | None],
        *,
        afterwards: bool,
        kinds: tuple[Kind, ...] = shim.CHANGES,
        scenario: Scenario | None = None,
        victim: str = "",
    ) -> None:
        self.fault = fault
        self.words = words
        self.world = world
        self._orders = orders
        self._afterwards = afterwards
        self._kinds = kinds
        self._victim = victim
        self._heard_within_s = runs.HEARD_WITHIN_S
        self._scenario = scenario or scenario_of(words)

    @property
    def name(self) -> str:
        """What it is called in a report."""
        return f"{self.fault} | {self.words} | {self.world}" + (f" | {self._victim}" if self._victim else "")

    @property
    def same(self) -> object:
        """Sweeps of which this is equal can share what `prepare` made."""
        return (self.words, self.world, self._kinds)

    def prepare(self, ground: Ground, folder: Path) -> list[Call]:
        """Let the run go by; all its calls."""
        trace = folder / "trace"
        ended, _, run = self._go(ground, folder, Orders(trace=str(trace), kinds=self._kinds), afterwards=False)
        assert ended.status == 0, ended.output
        runs.require_all_saved(run)
        ground.forks.do(runs.judge, run, timeout_s=MOST_S)
        return [call for call in shim.calls(trace) if call.kind in self._kinds]

    def points(self, prepared: Sequence[Call]) -> Iterator[int]:
        """The places among those of *prepared*, from 1, at which this fault makes sense."""
        return (n for n, call in enumerate(prepared, 1) if self._orders(call) is not None)

    def phase(self, n: int, prepared: Sequence[Call]) -> str:
        """Where in the run's life the *n*-th call was made when nothing struck."""
        return prepared[n - 1].phase.name

    def strike(self, ground: Ground, folder: Path, n: int, prepared: Sequence[Call]) -> Outcome:
        """Let the fault strike at the *n*-th call and judge what is left."""
        call = prepared[n - 1]
        orders = self._orders(call)
        assert orders is not None
        if orders.action is Action.FAIL and call.kind is Kind.FSYNC:
            orders = dataclasses.replace(orders, trace=str(folder / "trace"))
        phase = call.phase.name
        try:
            ended, struck, run = self._go(ground, folder, orders, afterwards=self._afterwards)
            if struck.times:
                phase = struck.phase.name
            self._survivors_heard(orders, struck, ended, run)
            if orders.trace:
                _assert_not_synced_again(Path(orders.trace), struck)
            ground.forks.do(runs.judge, run, timeout_s=MOST_S)
        except AssertionError as error:
            return Outcome(phase, f"{orders} ({call.kind.name.lower()} {Path(call.path).name}): {error}")
        shutil.rmtree(folder)
        return Outcome(phase if struck.times else NOT_REACHED)

    def _live(
        self, ground: Ground, folder: Path, place: Path, orders: Orders, *, afterwards: bool
    ) -> tuple[Ended, Path]:
        if self._scenario is None:
            run = folder / "runs" / "alpha"
            run.parent.mkdir(exist_ok=True)
            crash_run.assets(run)
            shim.give(place, run, orders)
            return ground.forks.run(runs.create, run, place, timeout_s=MOST_S), run
        run = ground.past(self._scenario, folder)
        shim.give(place, run, orders)
        args = (run, place, self._scenario, self.world, afterwards)
        return ground.forks.run(runs.live, *args, timeout_s=MOST_S), run

    def _go(self, ground: Ground, folder: Path, orders: Orders, *, afterwards: bool) -> tuple[Ended, shim.Struck, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / "orders"
        ended, run = self._live(ground, folder, place, orders, afterwards=afterwards)
        assert_all_gone(place)
        return ended, shim.struck(place), run

    def _survivors_heard(self, orders: Orders, struck: shim.Struck, ended: Ended, run: Path) -> None:
        """Who lives hears of it in time, all alike, and can save again."""
        kills = orders.action in (Action.KILL, Action.TORN, Action.EAT) and struck.times
        if orders.target == shim.EVERYONE and kills:
            assert ended.status == KILLED, f"status {ended.status}\n{ended.output}"
            return
        statuses = {0: ended.status}
        if self.world > 1:
            assert ended.status == 0, ended.output
            ((_, *each),) = runs.told(run, "world")
            statuses = dict(enumerate(each))
        dead = self._dead(orders, struck, statuses) if kills else set()
        lost = {role // 2 for role in dead if role % 2 == 0}
        hit = {role // 2 for role in dead}
        for rank, status in statuses.items():
            if rank in lost:
                assert status == KILLED, f"rank {rank}: status {status}\n{ended.output}"
                continue
            told = runs.told(run, rank)
            for word, *facts in told:
                late = facts[-1]
                assert late < self._heard_within_s, f"rank {rank} was told {word} after {late:.1f} s"
            for word, _, *facts in told[:1]:
                if word == "failed" and hit:
                    blamed = {blamed for blamed, _ in facts[0]}
                    assert blamed == hit, f"rank {rank} was told that {facts[0]}, and it was {hit} that died"
            if lost:
                # Without that rank nothing can be saved; every other one must know, by a typed error.
                assert told, f"rank {rank} was told nothing\n{ended.output}"
                continue
            assert status == 0, f"rank {rank}: status {status}\n{ended.output}"
            if self._afterwards and told[0][0] != "refused":
                assert told[-1][0] == "acknowledged", f"rank {rank}: {told}\n{ended.output}"
        if (
            orders.action is Action.FAIL
            and struck.kind in _MUST_FAIL
            and struck.times
            and ".incomplete/" in struck.path
        ):
            heard = {word for rank in statuses for word, *_ in runs.told(run, rank)}
            assert heard & {"failed", "refused"} or not heard, f"a save went on after {struck}"
        alive = [_without_times(runs.told(run, rank)) for rank in statuses if rank not in lost]
        assert lost or all(one == alive[0] for one in alive), f"the ranks were told different things: {alive}"

    def _dead(self, orders: Orders, struck: shim.Struck, statuses: Mapping[int, int]) -> set[int]:
        """The roles of those who have been killed, where it was not everyone."""
        del statuses
        return {struck.role if orders.target == shim.CALLER else orders.target}


class RecoverySweep(Sweep):
    """
    The same while the next start recovers from an earlier crash.

    Args:
        fault: What the table calls it.
        words: Series and scenario that crashed.
        first: The comment of the product at which it crashed.
        orders: As of a `Sweep`.
    """

    def __init__(self, fault: str, words: str, first: str, orders: Callable[[Call], Orders | None]) -> None:
        super().__init__(fault, words, 1, orders, afterwards=False)
        self._first = first
        self._left: Path | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"{super().name} | recovery after: {self._first}"

    @property
    def same(self) -> object:
        return (self.words, self._first)

    def _live(
        self, ground: Ground, folder: Path, place: Path, orders: Orders, *, afterwards: bool
    ) -> tuple[Ended, Path]:
        del afterwards  # nothing is saved
        assert self._scenario is not None
        run = crash_run.copy_of(self._left_behind(ground, folder), folder)
        shim.give(place, run, orders)
        return ground.forks.run(runs.recover, run, place, self._scenario.exchange, timeout_s=MOST_S), run

    def _left_behind(self, ground: Ground, folder: Path) -> Path:
        assert self._scenario is not None
        with self._lock:
            if self._left is None:
                left = ground.past(self._scenario, folder.with_name(f"{folder.name}-left"))
                ground.forks.crash(crash_run.crash_while_saving, left, self._scenario, AtComment(self._first))
                self._left = left
            return self._left


class StoppedSweep(Sweep):
    """All processes stop at a call; something happens; they go on."""

    def _meanwhile(self, ground: Ground, folder: Path) -> None:
        """What happens while they stand still; AssertionError where it comes to something that must not be."""
        raise NotImplementedError

    def _go(self, ground: Ground, folder: Path, orders: Orders, *, afterwards: bool) -> tuple[Ended, shim.Struck, Path]:
        if orders.action is not Action.STOP:
            return super()._go(ground, folder, orders, afterwards=afterwards)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(super()._go, ground, folder, orders, afterwards=afterwards)
            place = folder / "orders"
            while not first.done():
                time.sleep(0.01)
                if place.exists() and place.stat().st_size and shim.struck(place).times:
                    pids = shim.pids(place).values()
                    while not all(_is_stopped(pid) for pid in pids):
                        time.sleep(0.005)
                    try:
                        self._meanwhile(ground, folder)
                    finally:
                        # All of the group, as it was stopped: whoever waits for the ranks belongs to it.
                        for group in {group for pid in pids if (group := _group_of(pid))}:
                            os.killpg(group, signal.SIGCONT)
                    break
            return first.result()


class ZombieSweep(StoppedSweep):
    """A manager that is stopped at a call, and goes on when another has taken the run over and saved."""

    def _meanwhile(self, ground: Ground, folder: Path) -> None:
        series = self.words.partition(" ")[0]
        ended = ground.forks.run(runs.take_over, folder / "alpha", series, timeout_s=MOST_S)
        assert ended.status == 0, f"the heir: {ended.output}"

    def _survivors_heard(self, orders: Orders, struck: shim.Struck, ended: Ended, run: Path) -> None:
        del orders, run
        if struck.times and ended.status:
            assert "ckptmgr.errors." in ended.output.splitlines()[-1], f"status {ended.status}\n{ended.output}"


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def assert_all_gone(place: Path) -> None:
    """The run whose orders are at *place* has ended, so no trainer and no writer of it is left."""
    for role, pid in shim.pids(place).items():
        if role % 2 == 0:
            _assert_gone(pid)
            assert_no_writer_of(pid, within_s=2)


def _assert_gone(pid: int) -> None:
    """A process that was killed may take a moment to let go of what it holds."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        with contextlib.suppress(OSError):
            # A zombie of several threads still holds its files until the last of them is gone.
            dead = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if dead and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1:
                return
        assert time.monotonic() < deadline, f"process {pid} goes on after its run has ended"
        time.sleep(0.005)


def _without_times(told: list[list[Any]]) -> list[list[Any]]:
    return [words[:2] if words[0] == "refused" else words[:-1] for words in told]


def _assert_not_synced_again(trace: Path, struck: shim.Struck) -> None:
    """The kernel may have dropped the pages; a second fsync would call them written."""
    if struck.times and ".incomplete/" in struck.path:
        # A file that several ranks write is synced by each of them, once.
        mine = [call for call in shim.calls(trace) if call.kind is Kind.FSYNC and call.role == struck.role]
        assert struck.path not in {call.path for call in mine}, (
            f"{struck.path} was synced again after its fsync had failed"
        )


# --- which faults ------------------------------------------------------------------------------

SCENARIOS = tuple(f"{series} {how}" for series in crash_run.NAMES for how in scenarios(series))
#: What is written past the page cache: a run of its own, as it takes more bytes.
LARGE = "dcp large"
_CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE)
#: The product never looks which one it is, but for the hint: all four here, the first two everywhere.
_EVERY_CODE = ("dcp steady", "hf overwrite")
#: While rank 1 or a writer has something to do.
_SHARED_WORK = (Phase.PREWRITTEN, Phase.WRITING, Phase.SHARDS, Phase.GATHERED)


#: Crashes that leave something to do, one for each thing that recovery does.
CRASHED = (
    ("hf first", "PREWRITTEN with metadata in the staging directory"),
    ("dcp steady", "WRITING with a durable manifest"),
    ("dcp first", "GATHERED with a complete staging directory"),
    ("dcp overwrite", "GATHERED with a complete staging directory"),
    ("dcp overwrite", "GATHERED with a published directory"),
    ("hf overwrite-aside", "GATHERED with the old directory set aside"),
    ("hf steady", "COMMITTED with a stale meta.json and link"),
    ("dcp steady", "COMMITTED and retiring under its final name"),
    ("dcp steady", "the row says retiring, the directory has its retired name"),
    ("hf overwrite", "the directory is gone, the row still says retiring"),
)


def _kill(target: int, phases: Iterable[Phase] = tuple(Phase)) -> Callable[[Call], Orders | None]:
    wanted = frozenset(phases)
    return lambda call: Orders(call.number, Action.KILL, target=target) if call.phase in wanted else None


def _fail(code: int, *, sticky: bool) -> Callable[[Call], Orders | None]:
    no_space = code in (errno.ENOSPC, errno.EDQUOT)

    def orders(call: Call) -> Orders | None:
        if no_space and call.kind not in shim.TAKES_SPACE:
            return None
        return Orders(call.number, Action.FAIL, code, sticky=sticky)

    return orders


def _stop(call: Call) -> Orders | None:
    # Within a transaction SQLite keeps the heir out, which takes its whole patience and shows nothing.
    inside = ".journal.db" in call.path
    late = call.phase not in (Phase.START, Phase.END)
    return Orders(call.number, Action.STOP, target=shim.EVERYONE) if late and not inside else None


def _fail_close(call: Call) -> Orders | None:
    # SQLite does not care, and need not: what it has synced is synced.
    return None if ".journal.db" in call.path else Orders(call.number, Action.FAIL, errno.EIO, kinds=(Kind.CLOSE,))


def _write(action: Action) -> Callable[[Call], Orders | None]:
    return lambda call: Orders(call.number, action, target=shim.EVERYONE) if call.kind is Kind.WRITE else None


def sweeps() -> list[Sweep]:
    """All of them: fault × run."""
    found = [Sweep("SIGKILL of all", words, 1, _kill(shim.EVERYONE), afterwards=False) for words in SCENARIOS]
    found += [
        Sweep("SIGKILL of all", "create", 1, _kill(shim.EVERYONE), afterwards=False),
        *(
            Sweep("SIGKILL of all", words, 2, _kill(shim.EVERYONE), afterwards=False)
            for words in ("dcp first", "dcp overwrite", "hf steady")
        ),
    ]
    for words in ("dcp steady", "hf overwrite"):
        found.append(
            Sweep("SIGKILL of the trainer only", words, 1, _kill(shim.trainer(0), [Phase.SHARDS]), afterwards=False)
        )
        found.append(Sweep("SIGKILL of one writer", words, 1, _kill(shim.writer(0), [Phase.SHARDS]), afterwards=True))
        for rank in (0, 1):
            for fault, role in (
                ("SIGKILL of one writer", shim.writer(rank)),
                ("SIGKILL of one rank", shim.trainer(rank)),
            ):
                kill = _kill(role, _SHARED_WORK)
                found.append(Sweep(fault, words, 2, kill, afterwards=True, victim=f"rank {rank}"))
    found.append(Sweep("SIGKILL of all", LARGE, 1, _kill(shim.EVERYONE, [Phase.SHARDS]), afterwards=False))
    for code in (errno.ENOSPC, errno.EIO):
        found.append(Sweep(f"{errno.errorcode[code]} once", LARGE, 1, _fail(code, sticky=False), afterwards=True))
    for words in (*SCENARIOS, LARGE):
        found.append(Sweep("torn write, then SIGKILL", words, 1, _write(Action.TORN), afterwards=False))
        found.append(Sweep("short write", words, 1, _write(Action.SHORT), afterwards=True))
    for words in SCENARIOS:
        found.append(Sweep("EIO at close", words, 1, _fail_close, afterwards=True, kinds=(Kind.CLOSE,)))
        for code in _CODES if words in _EVERY_CODE else _CODES[:2]:
            for sticky in (False, True):
                name = f"{errno.errorcode[code]} {'sticky' if sticky else 'once'}"
                found.append(Sweep(name, words, 1, _fail(code, sticky=sticky), afterwards=True))
    for words in ("dcp steady", "hf overwrite"):
        for code in (errno.ENOSPC, errno.EIO):
            found.append(Sweep(f"{errno.errorcode[code]} once", words, 2, _fail(code, sticky=False), afterwards=True))
    for words in ("dcp first", "dcp steady", "dcp overwrite", "hf steady", "hf overwrite-aside"):
        found.append(ZombieSweep("SIGSTOP past a takeover", words, 1, _stop, afterwards=False))
    for words, first in CRASHED:
        found.append(RecoverySweep("SIGKILL of all", words, first, _kill(shim.EVERYONE)))
        found.append(RecoverySweep("EIO once", words, first, _fail(errno.EIO, sticky=False)))
        found.append(RecoverySweep("ENOSPC sticky", words, first, _fail(errno.ENOSPC, sticky=True)))
    return found
