"""
Two hosts: what happens when they cannot hear each other.

Each rank lives in a network namespace of its own, with a wire to the other. At a call of the run both stand
still, the wire is cut, and they go on. The disk they share, so the row that rank 0 writes decides for both.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from child_process import Ended
from crash_run import Save, Scenario

from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointState
from ckptmgr.rundir import RunDirectory
from torture import faults, namespaces, runs, shim
from torture.faults import MOST_S, NOT_REACHED, Ground, Outcome, StoppedSweep
from torture.namespaces import Hosts
from torture.runs import Trouble
from torture.shim import EVERYONE, Action, Call, Orders, Phase

#: Longest that a rank may take to know, from the cut on: rank 1 waits for the outcome of what rank 0 writes, reads
#: back and decides, and then asks the journal.
HEARD_WITHIN_S = 2 * runs.BETWEEN_HOSTS.write_s + 3 * runs.BETWEEN_HOSTS.gather_s + 2
#: From the first byte that rank 1 writes to the last word that it waits for.
_PHASES = (Phase.SHARDS, Phase.GATHERED, Phase.RENAME, Phase.COMMITTED)


class LinkCut(StoppedSweep):
    """
    The wire between two ranks is cut while they save, and mended when both know what became of the save.

    Args:
        fault: What the table calls it.
        words: Series and scenario.
        cut: What is done to the wire.
    """

    def __init__(self, fault: str, words: str, cut: Callable[[Hosts], None]) -> None:
        super().__init__(
            fault, words, 2, lambda call: Orders(call.number, Action.STOP, target=EVERYONE), afterwards=True
        )
        self._cut = cut
        self._hosts: dict[Path, Hosts] = {}
        self._heard_s: dict[Path, float] = {}

    @property
    def same(self) -> object:
        """Nothing is shared."""
        return self

    def prepare(self, ground: Ground, folder: Path) -> list[Call]:
        """See that there can be such hosts; the calls are those of the run on one host."""
        del folder
        namespaces.require()
        calls: list[Call] = ground.whole(faults.Sweep("", self.words, 2, lambda *_: None, afterwards=False))
        return calls

    def points(self, prepared: Sequence[Call]) -> Iterator[int]:
        """The first and the last call of each phase: each costs a timeout."""
        for phase in _PHASES:
            # What happens after the commit has the phase of what was before it.
            end = next((n for n, call in enumerate(prepared, 1) if call.phase is Phase.COMMITTED), 0)
            mine = [
                n for n, call in enumerate(prepared, 1) if call.phase is phase and (n < end or phase is Phase.COMMITTED)
            ]
            yield from sorted({mine[0], mine[-1]}) if mine else ()

    def strike(self, ground: Ground, folder: Path, n: int, prepared: Sequence[Call]) -> Outcome:
        """Cut the wire at the *n*-th call; both are told the same, and can go on."""
        with Hosts() as hosts:
            self._hosts[folder] = hosts
            orders = self._orders(prepared[n - 1])
            assert orders is not None
            phase = prepared[n - 1].phase.name
            try:
                ended, struck, run = self._go(ground, folder, orders, afterwards=True)
                phase = struck.phase.name if struck.times else NOT_REACHED
                if not self._told_alike(run, ended):
                    self._restart(ground, run, hosts)
                ground.forks.do(runs.judge, run, timeout_s=MOST_S)
            except AssertionError as error:
                return Outcome(phase, f"{orders} ({prepared[n - 1].phase.name}): {error}")
            finally:
                del self._hosts[folder]
                self._heard_s.pop(folder, None)
        shutil.rmtree(folder)
        return Outcome(phase)

    def _live(
        self, ground: Ground, folder: Path, place: Path, orders: Orders, *, afterwards: bool
    ) -> tuple[Ended, Path]:
        assert self._scenario is not None
        run = ground.past(self._scenario, folder)
        shim.give(place, run, orders)
        trouble = Trouble(None, runs.await_word, (folder / "mended", place))
        args = (run, place, self._scenario, 2, afterwards, trouble, self._hosts[folder].pids)
        return ground.forks.run(runs.live, *args, timeout_s=MOST_S), run

    def _meanwhile(self, ground: Ground, folder: Path) -> None:
        del ground
        hosts = self._hosts[folder]
        self._cut(hosts)

        def mend() -> None:
            began = time.monotonic()
            while not all(runs.told(folder / "alpha", rank) for rank in range(2)) and time.monotonic() < began + MOST_S:
                time.sleep(0.02)
            self._heard_s[folder] = time.monotonic() - began
            hosts.mend()
            (folder / "mended").touch()

        threading.Thread(target=mend, daemon=True).start()

    def _told_alike(self, run: Path, ended: Ended) -> bool:
        """Both heard the same, and what the row says, in time; whether the next save worked in the same processes."""
        assert self._scenario is not None
        told = [runs.told(run, rank) for rank in range(2)]
        assert all(told), f"a rank was told nothing: {told}\n{ended.output}"
        first = [words[0][0] for words in told]
        assert first in (["acknowledged"] * 2, ["failed"] * 2), f"told different things: {told}\n{ended.output}"
        late = self._heard_s.get(run.parent, 0.0)
        assert late < HEARD_WITHIN_S, f"told {late:.1f} s after the cut: {told}"
        with Journal.open_read_only(RunDirectory(run).journal_path) as journal:
            row = [row for row in journal.checkpoints() if row.step == self._scenario.now[-1].step][-1]
        states = {"acknowledged": CheckpointState.COMMITTED, "failed": CheckpointState.FAILED}
        assert row.state is states[first[0]], f"told {first[0]}, and the row is {row.state}"
        last = {words[-1][0] for words in told}
        assert last == {"acknowledged"} or last <= {"failed", "error"}, f"told different things: {told}\n{ended.output}"
        return last == {"acknowledged"}

    def _restart(self, ground: Ground, run: Path, hosts: Hosts) -> None:
        """The job is started anew on both hosts."""
        place = run.with_name("orders-again")
        shim.give(place, run, Orders())
        series = self.words.partition(" ")[0]
        again = Scenario((), (Save(series, 60),))
        ended = ground.forks.run(runs.live, run, place, again, 2, False, None, hosts.pids, timeout_s=MOST_S)
        told = [runs.told(run, rank)[-1][:2] for rank in range(2)]
        assert told == [["acknowledged", 60]] * 2, f"the job that was started anew: {told}\n{ended.output}"


def sweeps() -> list[LinkCut]:
    """All of them."""
    cuts = (("link down", Hosts.cut), ("blackhole", Hosts.blackhole))
    return [
        LinkCut(f"{name} between two hosts", words, cut) for name, cut in cuts for words in ("dcp steady", "hf steady")
    ]
