"""
One rank of a soak, from a start of the job to its death or the end of the plan.

    python -m soak.trainer '{"folder": …, "rank": 0, "world": 1, …}'

What it measures goes to ``samples-<life>-<rank>.jsonl``, what became of each move to
``outcomes-<rank>.jsonl``, what was acknowledged to ``acknowledged.jsonl``, all in the soak's folder.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import errno
import faulthandler
import json
import logging
import os
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torture.shim import TAKES_SPACE, Action, Armed, Orders

from ckptmgr import (
    DCP,
    CheckpointManager,
    CheckpointState,
    HuggingFace,
    KeepEvery,
    KeepLast,
    PendingSave,
    PerRank,
    SaveFailed,
    Series,
    Timeouts,
    WriterOptions,
)
from ckptmgr.errors import CheckpointError, InvalidArgument, SaveInFlight
from soak import measures, plants
from soak.plan import Move, Plan

SERIES = ("dcp", "hf")
#: Steps; a move has two, so that few more are live at the end than at first.
KEPT_EVERY = 2000
#: Exit status of a rank that has lost another one.
LOST_A_RANK = 3
#: Long enough for a busy machine, short enough that a stopped writer or rank costs seconds.
PATIENCE = Timeouts(setup_s=60, write_s=8, gather_s=5, collective_s=60, close_s=60, close_on_error_s=10)
_SILENT_S = 13.0 + 2.0  # write_s and gather_s of it, and a little more
_COMMITTED, _FAILED = "committed", "failed"


@dataclasses.dataclass(frozen=True)
class Life:
    """One start of the job: who this is, where, from which move on, and until when on the wall clock."""

    folder: str
    rank: int
    world: int
    seed: int
    moves: int
    number: int
    first: int
    until: float
    every: int
    plant: Sequence[str] = ()
    faults: bool = True
    one_life: bool = False

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.folder, "run")


def live(life: Life) -> int:
    """Go through the plan; returns the exit status."""
    for plant in life.plant:
        plants.PLANTS[plant]()
    rank = _Rank(life)
    try:
        return rank.go()
    finally:
        rank.close()


class _LostARankError(Exception):
    """Another rank has died, as planned."""


class _Raises:
    """Something in the state that cannot be saved."""

    def state_dict(self) -> dict[str, Any]:
        raise ValueError("this rank has nothing to save")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


class _Lost(torch.Tensor):
    """A tensor whose device is lost when it is to be copied."""

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.detach, torch.Tensor.copy_, torch._foreach_copy_):
            raise RuntimeError("the device is lost")
        return super().__torch_function__(function, kinds, args, kwargs)


class _Rank:
    """A rank that trains: the model that its step fills, the manager, and what it has been told."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.plan = Plan(life.seed, life.moves, life.world, life.one_life)
        self.costs = measures.Costs()
        self.armed = Armed(Path(life.folder, "orders"), life.rank) if life.faults else None
        if life.world > 1:
            store = dist.TCPStore("127.0.0.1", _port(life), life.world, is_master=life.rank == 0)
            dist.init_process_group(
                "gloo", store=store, rank=life.rank, world_size=life.world, timeout=datetime.timedelta(seconds=90)
            )
            self.mesh = dist.init_device_mesh("cpu", (life.world,))
        self.models: dict[int, torch.nn.Module] = {}
        #: The step and gen last acknowledged in this life, and how often each step was saved.
        self.newest: dict[str, tuple[int, int]] = {}
        self.hook_fails = False
        self.hooks = 0
        self.started: list[float] = []
        self.plain: dict[str, list[dict[str, float]]] = {one: [] for one in SERIES}
        self.manager = self._open()

    def go(self) -> int:
        """All moves of this life."""
        try:
            self._look_back()
            for number in range(self.life.first, self.life.moves):
                move = self.plan.move(number)
                if number % self.life.every == 0 and self._is_over(number):
                    break
                try:
                    word = getattr(self, f"_{move.kind}")(move)
                except _LostARankError:
                    return LOST_A_RANK
                except BaseException as error:
                    error.add_note(f"in move {move}")
                    raise
                self._note(f"outcomes-{self.life.rank}", number, move.kind, move.series, word)
            self.manager.close()
        except BaseException:
            with contextlib.suppress(BaseException):
                self.manager.__exit__(*sys.exc_info())
            raise
        return 0

    def close(self) -> None:
        """Leave the world of ranks."""
        if self.life.world > 1 and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    # -- the moves ----------------------------------------------------------------------------------

    def _plain(self, move: Move) -> str:
        self.costs.taken()
        wall, cpu = time.monotonic(), time.process_time()
        self._must_commit(move, move.step)
        cost = {"save_ms": 1000 * (time.monotonic() - wall), "save_cpu_ms": 1000 * (time.process_time() - cpu)}
        if self.life.rank == 0:  # the others would keep what they never tell
            self.plain[move.series].append(cost | self.costs.taken())
        return _COMMITTED

    def _overwrite(self, move: Move) -> str:
        if move.series not in self.newest:
            return self._plain(move)
        step, gen = self.newest[move.series]
        self._must_commit(move, step, gen + 1)
        return _COMMITTED

    def _fresh_model(self, move: Move) -> str:
        state = self._state(move, move.step, 0)
        state["model"] = copy.deepcopy(state["model"])
        return self._must(_COMMITTED, self._wait(self._save(move, move.step, state=state), move, move.step, 0))

    def _resume(self, move: Move) -> str:
        self._check_resume()
        return self._plain(move)

    def _read_export(self, move: Move) -> str:
        self._check_export()
        return self._plain(move)

    def _skip_while_busy(self, move: Move) -> str:
        with self._paused_writer(move) as go_on:
            first = self._save(move, move.step)
            assert self._save(move, move.step + 1, when_busy="skip") is None
            go_on()
        return self._must(_COMMITTED, self._wait(first, move, move.step, 0))

    def _refuse_while_busy(self, move: Move) -> str:
        with self._paused_writer(move) as go_on:
            first = self._save(move, move.step)
            try:
                self._save(move, move.step + 1, when_busy="raise")
            except SaveInFlight:
                pass
            else:
                raise AssertionError("a busy series took a save")
            go_on()
        return self._must(_COMMITTED, self._wait(first, move, move.step, 0))

    def _wait_while_busy(self, move: Move) -> str:
        with self._paused_writer(move) as go_on:
            first = self._save(move, move.step)
            threading.Timer(0.2, go_on).start()
            second = self._save(move, move.step + 1, gen=0)
        self._must(_COMMITTED, self._wait(first, move, move.step, 0))
        return self._must(_COMMITTED, self._wait(second, move, move.step + 1, 0))

    def _failing_hook(self, move: Move) -> str:
        before = self.hooks
        self.hook_fails = True
        try:
            self._must_commit(move, move.step)
        finally:
            self.hook_fails = False
        assert self.life.rank or self.hooks == before + 1, "the hook was not called"
        return _COMMITTED

    def _slow_rank(self, move: Move) -> str:
        if self.life.rank == move.victim:
            time.sleep(1.0)
        self._must_commit(move, move.step)
        return _COMMITTED

    def _raising_state(self, move: Move) -> str:
        state = self._state(move, move.step, 0)
        if move.series == "dcp":
            state["odd"] = _Raises() if self.life.rank == move.victim else torch.nn.Linear(1, 1)
        elif self.life.rank == move.victim:
            state = {"model": "this is no model"}
        try:
            self._save(move, move.step, state=state)
        except InvalidArgument:
            pass
        else:
            raise AssertionError("a state that cannot be taken was saved")
        self._must_commit(move, move.step + 1)
        return "refused"

    def _failing_capture(self, move: Move) -> str:
        """The ranks have agreed on a plan, and then a tensor cannot be copied."""
        state = self._state(move, move.step, 0)
        odd = torch.zeros(3)
        more = {f"odd-{self.life.rank}": odd.as_subclass(_Lost) if self.life.rank == move.victim else odd}
        state |= more if move.series == "dcp" else {"odd": more}
        word = self._wait(self._save(move, move.step, state=state), move, move.step, 0)
        assert word == _FAILED, "a tensor that cannot be copied was saved"
        self._must_commit(move, move.step + 1)
        return word

    def _no_descriptors(self, move: Move) -> str:
        """The victim's trainer can open nothing; of a rank that is not 0 that may be no trouble."""
        state = self._state(move, move.step, 0)
        if self.life.rank == 0:
            self._note("begun", move.series, move.step, 0)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            if self.life.rank == move.victim:
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # every new one would be larger
            pending = self.manager.save(move.step, state, move.series, metrics={"gen": 0, "width": move.width})
            assert pending is not None
            while not pending.done():
                time.sleep(0.005)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        word = self._wait(pending, move, move.step, 0)
        self._must_commit(move, move.step + 1)
        return word

    def _disk_error(self, move: Move) -> str:
        return self._on_bad_disk(move, sticky=False)

    def _full_disk(self, move: Move) -> str:
        return self._on_bad_disk(move, sticky=True)

    def _on_bad_disk(self, move: Move, *, sticky: bool) -> str:
        self._spoil(move, sticky=sticky)
        word = self._wait(self._save(move, move.step), move, move.step, 0)
        self._calm()
        self._must_commit(move, move.step + 1)
        return word

    def _idle_writer_killed(self, move: Move) -> str:
        if self.life.rank == move.victim:
            os.kill(self._writer(), signal.SIGKILL)
        self._must_commit(move, move.step)
        return _COMMITTED

    def _writer_killed(self, move: Move) -> str:
        with self._paused_writer(move):
            pending = self._save(move, move.step)
            time.sleep(0.3)
            self._kill_writer(move)
        word = self._wait(pending, move, move.step, 0)
        self._must_commit(move, move.step + 1)
        return word

    def _writer_killed_and_polled(self, move: Move) -> str:
        with self._paused_writer(move):
            pending = self._save(move, move.step)
            assert pending is not None
            time.sleep(0.3)
            self._kill_writer(move)
        while not pending.done():
            time.sleep(0.01)
        if pending.state is CheckpointState.FAILED:
            for _ in range(3):
                try:
                    self.manager.poll()
                except SaveFailed:
                    break
            else:
                raise AssertionError("nobody heard of a failed save")
        word = self._wait(pending, move, move.step, 0)
        self._must_commit(move, move.step + 1)
        return word

    def _stopped_writer(self, move: Move) -> str:
        if self.life.rank == move.victim:
            os.kill(self._writer(), signal.SIGSTOP)
        word = self._wait(self._save(move, move.step), move, move.step, 0)
        assert word == _FAILED, "a stopped writer has written"
        self._must_commit(move, move.step + 1)
        return word

    def _frozen_rank(self, move: Move) -> str:
        """A rank that stands still for longer than the others wait; their groups have to be made anew."""
        if self.life.rank != move.victim:
            word = self._wait(self._save(move, move.step), move, move.step, 0)
        else:
            me, writer = os.getpid(), self._writer()
            os.kill(writer, signal.SIGSTOP)
            pending = self._save(move, move.step)
            with subprocess.Popen(["sh", "-c", f"sleep {_SILENT_S}; kill -CONT {me} {writer}"]):
                os.kill(me, signal.SIGSTOP)
            word = self._wait(pending, move, move.step, 0)
        self._must_commit(move, move.step + 1)
        return word

    def _reopen(self, move: Move) -> str:
        self.manager.close()
        self.manager = self._open()
        return self._plain(move)

    def _leave_with_error(self, move: Move) -> str:
        """The with-block ends with an error while a save is in flight; what becomes of that save is open."""
        try:
            with self.manager:
                self._save(move, move.step)
                raise KeyError("something in the training")
        except KeyError:
            pass
        self.manager = self._open()
        self._must_commit(move, move.step + 1)
        return "left"

    def _reopen_on_bad_disk(self, move: Move) -> str:
        self.manager.close()
        self._spoil(move, sticky=move.random.random() < 0.5)
        with contextlib.suppress(CheckpointError, OSError):
            self._open().close()
        self._calm()
        self.manager = self._open()
        self._must_commit(move, move.step)
        return _COMMITTED

    def _death_of_all(self, move: Move) -> str:
        self._save(move, move.step)
        self._die(move)
        raise AssertionError("dead")

    def _death_of_one(self, move: Move) -> str:
        pending = self._save(move, move.step)
        if self.life.rank == move.victim:
            self._die(move)
        with contextlib.suppress(SaveFailed):
            self._wait(pending, move, move.step, 0)
        error = _LostARankError(f"rank {move.victim}")
        self.manager.__exit__(type(error), error, None)
        raise error

    # -- what moves are made of ---------------------------------------------------------------------

    def _open(self) -> CheckpointManager:
        cpu = time.process_time()
        opened = CheckpointManager(
            self.life.run,
            series=[
                Series("dcp", DCP(), keep=KeepLast(2) | KeepEvery(KEPT_EVERY)),
                Series("hf", HuggingFace(max_shard_size="48KB"), keep=KeepLast(2)),
            ],
            on_commit=self._hook,
            timeouts=PATIENCE,
            writers=WriterOptions(nice=0),
        )
        if self.life.rank == 0:
            self.started.append(1000 * (time.process_time() - cpu))
        return opened

    def _hook(self, event: Any) -> None:
        self.hooks += 1
        if self.hook_fails:
            raise RuntimeError(f"the hook does not like {event.series} step {event.step}")

    def _state(self, move: Move, step: int, gen: int) -> dict[str, Any]:
        model = self._model(move.width)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.fill_(value_of(step, gen, number))
        if move.series == "hf":
            return {"model": model}
        position = {"position": 7 * step + gen, "rank": self.life.rank}
        return {"model": model, "at": [step, gen], "width": move.width, "loader": PerRank(position)}

    def _model(self, width: int) -> torch.nn.Module:
        if width not in self.models:
            model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, width))
            if self.life.world > 1:
                for module in model:
                    for name, parameter in list(module.named_parameters(recurse=False)):
                        part = parameter.detach().chunk(self.life.world)[self.life.rank].clone()
                        whole = DTensor.from_local(part, self.mesh, [Shard(0)])
                        module.register_parameter(name, torch.nn.Parameter(whole))
            self.models[width] = model
        return self.models[width]

    def _save(
        self, move: Move, step: int, *, gen: int = 0, state: dict[str, Any] | None = None, **options: Any
    ) -> PendingSave | None:
        if self.life.rank == 0:
            self._note("begun", move.series, step, gen)
        state = self._state(move, step, gen) if state is None else state
        return self.manager.save(step, state, move.series, metrics={"gen": gen, "width": move.width}, **options)

    def _wait(self, pending: PendingSave | None, move: Move, step: int, gen: int) -> str:
        assert pending is not None
        try:
            pending.wait()
        except SaveFailed as failed:
            self.why = str(failed)
            return _FAILED
        self.newest[move.series] = (step, gen)
        if self.life.rank == 0:
            self._note("acknowledged", move.series, step, gen)
        return _COMMITTED

    def _must_commit(self, move: Move, step: int, gen: int = 0) -> None:
        pending = self._save(move, step, gen=gen, overwrite=gen > 0)
        self._must(_COMMITTED, self._wait(pending, move, step, gen))

    def _must(self, word: str, found: str) -> str:
        assert found == word, f"{found}, not {word}: {getattr(self, 'why', '')}"
        return found

    def _writer(self) -> int:
        pid = self.manager.writer_pid
        return pid if pid is not None else os.getpid()

    def _die(self, move: Move) -> None:
        time.sleep(move.random.random() * 0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def _paused_writer(self, move: Move) -> Any:
        """The victim's writer stands still; gives a function that lets it go on."""
        pid = self.manager.writer_pid if self.life.rank == move.victim else None

        def go_on() -> None:
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

        if pid is not None:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield go_on
        finally:
            go_on()

    def _kill_writer(self, move: Move) -> None:
        if self.life.rank == move.victim and (pid := self.manager.writer_pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _spoil(self, move: Move, *, sticky: bool) -> None:
        if self.armed is None or self.life.rank:
            return
        code = move.random.choice([errno.ENOSPC, errno.EIO])
        at = 1 + move.random.randrange(70)
        if code == errno.ENOSPC:
            self.armed.order(Orders(at, Action.FAIL, code, sticky=sticky, kinds=TAKES_SPACE))
        else:
            self.armed.order(Orders(at, Action.FAIL, code, sticky=sticky))

    def _calm(self) -> None:
        if self.life.world > 1:
            dist.barrier()  # or a rank could be struck while it begins the save that must commit
        if self.armed is not None and self.life.rank == 0:
            self.armed.calm()
        if self.life.world > 1:
            dist.barrier()

    # -- looking -------------------------------------------------------------------------------------

    def _look_back(self) -> None:
        """After a start: what was acknowledged can be resumed from, or something newer can."""
        self._check_resume()
        self._check_export()

    def _check_resume(self) -> None:
        acknowledged = _notes(self.life, "acknowledged", "dcp")
        blank: dict[str, Any] = {"at": None, "width": None}
        resumed = self.manager.resume(blank, series="dcp")
        if resumed is None:
            assert not acknowledged, f"{acknowledged[-1]} was acknowledged and nothing can be resumed"
            return
        (step, gen), width = blank["at"], blank["width"]
        assert (step, gen) >= max(acknowledged, default=(0, 0)), f"{step} {gen} is older than what was acknowledged"
        move = dataclasses.replace(self.plan.move(0), width=width, series="dcp")
        state = self._state(move, 0, 0)
        state["loader"] = PerRank({})
        assert self.manager.resume(state, series="dcp") is not None
        assert state["loader"].value == {"position": 7 * step + gen, "rank": self.life.rank}
        for number, parameter in enumerate(state["model"].parameters()):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            assert bool((local == value_of(step, gen, number)).all()), f"{step} {gen} has other weights"

    def _check_export(self) -> None:
        if self.life.rank == 0:
            acknowledged = _notes(self.life, "acknowledged", "hf")
            latest = self.life.run / "hf" / "hf-latest"
            if not latest.exists():
                assert not acknowledged, f"{acknowledged[-1]} was acknowledged and there is no export"
            else:
                check_export(latest, acknowledged)
        if self.life.world > 1:
            dist.barrier()  # the next save may retire what is being read

    # -- measuring ------------------------------------------------------------------------------------

    def _is_over(self, number: int) -> bool:
        """Measure, and agree whether there is no time left."""
        over = torch.tensor([int(time.time() > self.life.until)])
        if self.life.world > 1:
            dist.all_reduce(over)
        where = {"saves": number, "life": self.life.number, "rank": self.life.rank}
        here = measures.of_this_python() | measures.of_process(os.getpid())
        self._note(f"samples-{self.life.rank}", {"role": "trainer", **where, **here})
        if (pid := self.manager.writer_pid) is not None:
            self._note(f"samples-{self.life.rank}", {"role": "writer", "pid": pid, **where, **measures.of_process(pid)})
        if self.life.rank == 0:
            self._note("samples-run", {"role": "run", **where, **self._of_run()})
        return bool(over.item())

    def _of_run(self) -> dict[str, float]:
        found = measures.of_run(self.life.run, SERIES)
        found["log_bytes"] = self.costs.logged() / self.life.every
        both = [cost for one in SERIES for cost in self.plain[one]]
        for one in SERIES:
            if self.plain[one]:
                found[f"vm_steps_{one}"] = statistics.median(cost["vm_steps"] for cost in self.plain[one])
            self.plain[one].clear()
        for name in ("records_read", "transactions", "journal_ms", "journal_cpu_ms", "save_ms", "save_cpu_ms"):
            if both:
                found[name] = statistics.median(cost[name] for cost in both)
        if self.started:
            found["start_cpu_ms"] = statistics.median(self.started)
        self.started.clear()
        return found

    def _note(self, name: str, *words: Any) -> None:
        with Path(self.life.folder, f"{name}.jsonl").open("a") as stream:
            stream.write(json.dumps(words[0] if len(words) == 1 else words) + "\n")


def value_of(step: int, gen: int, number: int) -> float:
    """What fills the parameter of that number; a float32 holds it exactly."""
    return float(step * 16 + gen % 4 * 4 + number)


def check_export(folder: Path, acknowledged: list[tuple[int, int]]) -> tuple[int, int]:
    """Load an export as anybody would: one save wrote all of it, none older than what was acknowledged."""
    step = int(folder.resolve().name.removeprefix("hf-"))
    loaded: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded |= safetensors.torch.load_file(file)
    gens = {int(loaded[name].flatten()[0].item()) // 4 % 4 for name in loaded}
    assert len(gens) == 1, f"{folder} was written by more than one save"
    (gen,) = gens
    for number, name in enumerate(("0.weight", "0.bias", "1.weight", "1.bias")):
        assert bool((loaded[name] == value_of(step, gen, number)).all()), f"{folder} {name} is not of step {step}"
    newest = max(acknowledged, default=(0, 0))
    assert (step, gen) >= (newest[0], newest[1] % 4), f"{folder} is older than {newest}, which was acknowledged"
    return step, gen


def _notes(life: Life, name: str, series: str) -> list[tuple[int, int]]:
    path = Path(life.folder, f"{name}.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return [(step, gen) for of, step, gen in map(json.loads, lines) if of == series]


def _port(life: Life) -> int:
    """A port that rank 0 finds free and tells the others."""
    place = Path(life.folder, f"port-{life.number}")
    if life.rank == 0:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        scratch = place.with_suffix(".new")
        scratch.write_text(str(port))
        scratch.rename(place)
        return int(port)
    deadline = time.monotonic() + 60
    while not place.exists():
        assert time.monotonic() < deadline, "rank 0 does not come"
        time.sleep(0.02)
    return int(place.read_text())


def main(entry: Callable[[Life], int] = live) -> None:
    """Live as the first argument says."""
    faulthandler.register(signal.SIGUSR1)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    life = Life(**json.loads(sys.argv[1]))
    status = entry(life)
    # The threads of Gloo do not survive the interpreter's end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
