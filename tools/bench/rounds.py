"""Runs the peers of a workload in interleaved rounds, each in a process of its own, and collects samples."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench import machine, workloads

ROOT = Path(__file__).resolve().parents[2]
#: How long one command may take; then the peer is out.
TIMEOUT_S = 240.0
#: Saves in each round without a training beside them, and seconds after which no other is begun.
_MOST_SAVES = 3
_SAVES_S = 3.0


class PeerFailed(Exception):
    """A peer cannot go on; the text says why."""


@dataclasses.dataclass
class Results:
    """All that a run found out; what the file holds. Tables, charts and targets are made of nothing else."""

    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    noise: list[dict[str, float]] = dataclasses.field(default_factory=list)
    #: By workload and peer: what is to be known of it, and what went wrong with it.
    peers: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    #: Rows of workload, peer, measure, round and value.
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    #: What was left out, and why.
    skipped: list[str] = dataclasses.field(default_factory=list)

    def add(self, workload: str, peer: str, number: int, **measures: float) -> None:
        """Enter values; booleans and missing ones are none."""
        for measure, value in measures.items():
            row = {"workload": workload, "peer": peer, "measure": measure, "round": number, "value": float(value)}
            self.samples.append(row)

    def about(self, workload: str, peer: str) -> dict[str, Any]:
        """What is known of a peer, to be added to."""
        return self.peers.setdefault(workload, {}).setdefault(peer, {})

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def with_later(self, later: Results) -> Results:
        """Both runs, of one machine: of a workload that the *later* one has measured again, only what that says."""
        again = {"workloads": list(later.peers), **later.machine}
        return Results(
            machine={**self.machine, "again": [*self.machine.get("again", ()), again]},
            options=self.options,
            noise=[*self.noise, *later.noise],
            peers={**self.peers, **later.peers},
            samples=[*(row for row in self.samples if row["workload"] not in later.peers), *later.samples],
            skipped=list(dict.fromkeys([*self.skipped, *later.skipped])),
        )

    @classmethod
    def from_json(cls, text: str) -> Results:
        """What `to_json` wrote."""
        return cls(**json.loads(text))


class Worker:
    """
    The process of one peer.

    Args:
        peer: Its name.
        workload: The workload's name.
        size: As of `workloads.specs`.
        descriptor: The memory file with the tensors.
        folder: Made anew, and removed at the end.
        calibration_s: How long the training is timed on both sides of a save.
    """

    def __init__(
        self, peer: str, workload: str, size: int, descriptor: int, folder: Path, calibration_s: float = 0.7
    ) -> None:
        self.peer = peer
        self._folder = folder
        folder.mkdir(parents=True)
        self._log = folder.with_name(f"{folder.name}.log")
        order = {
            "peer": peer, "workload": workload, "size": size, "descriptor": descriptor, "folder": str(folder),
            "calibration_s": calibration_s,
        }  # fmt: skip
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", str(theirs.fileno()), json.dumps(order)],
                env=environment(), pass_fds=[theirs.fileno(), descriptor], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        self._pipe = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """The top of its processes."""
        return self._process.pid

    def ready(self) -> None:
        """
        Wait until it takes commands.

        Raises:
            PeerFailed: It does not.
        """
        self._receive(TIMEOUT_S)

    def ask(self, command: str, timeout_s: float = TIMEOUT_S, **words: Any) -> dict[str, Any]:
        """
        Have a command of `worker.Service` done.

        Raises:
            PeerFailed: It raised, died, or did not answer in time.
        """
        try:
            self._pipe.send((command, words))
        except OSError as error:
            raise PeerFailed(f"it is gone: {error}") from error
        return self._receive(timeout_s)

    def stop(self) -> None:
        """End it and everything below it, and remove its files."""
        with contextlib.suppress(PeerFailed):
            self.ask("close", 20)
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            if not self._pipe.poll(timeout_s):
                raise PeerFailed(f"no answer within {timeout_s:g} s")
            answer: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError) as error:
            lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            said = lines[-1][:200] if lines else ""
            raise PeerFailed(f"it died (exit status {self._process.returncode}): {said}") from error
        if "error" in answer:
            raise PeerFailed(answer["error"][:300])
        return answer


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a workload is run."""

    workload: str
    size: int
    peers: Sequence[str]
    rounds: int
    seed: int
    #: Saves with a training beside them in each round, by peer; 0 leaves them out.
    training: dict[str, int]
    #: Seconds after which a peer sits out the rounds that are left, two rounds at least having been run.
    budget_s: float
    #: Peers that never do.
    always: Sequence[str]
    folder: Path
    #: How long the training is timed on both sides of a save, in seconds.
    calibration_s: float = 0.7
    #: Whether to load from a cold disk too, for which the page cache of the whole machine is dropped.
    cold: bool = True
    #: Additional workers per peer that live for one save only, for more first saves.
    firsts: int = 0


def run(plan: Plan, results: Results) -> None:
    """Run all rounds of a workload."""
    layout = workloads.specs(plan.workload, plan.size)
    descriptor = workloads.memory_file(layout)
    chance = random.Random(plan.seed)
    living: dict[str, Worker] = {}
    spent: dict[str, float] = {}
    try:
        say(f"{plan.workload}: starting {len(plan.peers)} peers")
        for peer in plan.peers:
            name = "".join(letter if letter.isalnum() else "-" for letter in peer)
            folder = plan.folder / f"{plan.workload}-{name}"
            living[peer] = Worker(peer, plan.workload, plan.size, descriptor, folder, plan.calibration_s)
        for peer in plan.peers:
            with _noting(results, plan, peer, living):
                living[peer].ready()
        for number, peer in enumerate(list(living)):
            with _noting(results, plan, peer, living):
                _start(results, plan, living[peer], fill=number == 0)
        for number in range(plan.firsts):
            for peer in chance.sample(list(living), len(living)):
                say(f"{plan.workload}: first save of {peer}")
                with _noting(results, plan, peer, living):
                    _first(results, plan, peer, descriptor, number)
        for number in range(plan.rounds):
            results.noise.append({"at": time.time(), **machine.noise(plan.folder)})
            for peer in chance.sample(list(living), len(living)):
                if number >= 2 and spent[peer] > plan.budget_s and peer not in plan.always:
                    results.about(plan.workload, peer)["rounds"] = f"{number} rounds: slow"
                    living.pop(peer).stop()
                    continue
                say(f"{plan.workload}: round {number + 1} of {plan.rounds}: {peer}")
                began = time.monotonic()
                with _noting(results, plan, peer, living):
                    _round(results, plan, living[peer], number)
                spent[peer] = spent.get(peer, 0.0) + time.monotonic() - began
    finally:
        for worker in living.values():
            worker.stop()
        os.close(descriptor)


def many_tensors(results: Results, peer: str, count: int, descriptors: int, folder: Path) -> None:
    """Save *count* small tensors twice with no more than so many *descriptors* open."""
    workload = f"moe {count}"
    layout = workloads.specs("moe", count)
    descriptor = workloads.memory_file(layout)
    worker = Worker(peer, "moe", count, descriptor, folder / "many")
    try:
        worker.ready()
        results.about(workload, peer).update(worker.ask("about"))
        worker.ask("fill", seed=1)
        worker.ask("limit_descriptors", most=descriptors)
        worker.ask("open")
        for number in range(2):
            found = worker.ask("save")
            results.add(workload, peer, number, **(_first_words(found) if number == 0 else found))
    except PeerFailed as error:
        results.about(workload, peer)["problem"] = str(error)
    finally:
        worker.stop()
        os.close(descriptor)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """What the processes of a bench are given."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "JAX_PLATFORMS": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


@contextlib.contextmanager
def _noting(results: Results, plan: Plan, peer: str, living: dict[str, Worker]) -> Iterator[None]:
    """A peer that fails is out, and its row says why."""
    try:
        yield
    except PeerFailed as error:
        say(f"{plan.workload}: {peer} is out: {error}")
        results.about(plan.workload, peer)["problem"] = str(error)
        if (worker := living.pop(peer, None)) is not None:
            worker.stop()


def _start(results: Results, plan: Plan, worker: Worker, *, fill: bool) -> None:
    results.about(plan.workload, worker.peer).update(worker.ask("about"))
    if fill:
        worker.ask("fill", seed=plan.seed)
    with machine.Watch(worker.pid) as watch:
        before = watch.held()
    results.about(plan.workload, worker.peer)["held_before"] = before
    results.add(plan.workload, worker.peer, 0, **worker.ask("open"))


def _first(results: Results, plan: Plan, peer: str, descriptor: int, number: int) -> None:
    """The first save of a process that does no other."""
    worker = Worker(peer, plan.workload, plan.size, descriptor, plan.folder / "first", plan.calibration_s)
    try:
        worker.ready()
        worker.ask("open")
        results.add(plan.workload, peer, number, **_first_words(worker.ask("save")))
    finally:
        worker.stop()


def _first_words(found: dict[str, Any]) -> dict[str, float]:
    return {f"first_{name}": value for name, value in found.items() if name in ("stall_s", "complete_s", "durable_s")}


def _round(results: Results, plan: Plan, worker: Worker, number: int) -> None:
    def add(found: dict[str, Any]) -> None:
        results.add(plan.workload, worker.peer, number, **found)

    if number == 0:
        results.add(plan.workload, worker.peer, plan.firsts, **_first_words(worker.ask("save")))
        checked = worker.ask("check")
        results.about(plan.workload, worker.peer).update(checked)
        # Before anything is loaded: what that leaves in malloc's hands is not the save's.
        before = results.about(plan.workload, worker.peer)["held_before"]
        for _ in range(2):
            with machine.Watch(worker.pid) as watch:
                worker.ask("save")
            add({"extra_bytes": max(0, watch.peak_bytes - before), "written_bytes": watch.written_bytes})
    began = time.monotonic()
    for _ in range(_MOST_SAVES):
        add(worker.ask("save"))
        if time.monotonic() - began > _SAVES_S:
            break
    for _ in range(plan.training.get(worker.peer, 0)):
        add(worker.ask("train_and_save"))
    add(worker.ask("load", cold=False))
    if plan.cold and why_not_cold() is None:
        add(worker.ask("load", cold=True))


def why_not_cold() -> str | None:
    """Why nothing can be loaded from a cold disk here, or None."""
    if os.geteuid() != 0:
        return "cold loads: only root may drop the page cache"
    if not os.access("/proc/sys/vm/drop_caches", os.W_OK):
        return "cold loads: this machine does not let the page cache be dropped"
    return None


def several_ranks(
    results: Results, worlds: Sequence[int], workloads_: Sequence[str], size: int, small: int, rounds: int, seed: int,
    folder: Path, timeout_s: float = 900.0,
) -> None:  # fmt: skip
    """The cases of `bench.ranks` on each number of ranks."""
    for world in worlds:
        say(f"{world} ranks")
        there = folder / f"ranks-{world}"
        there.mkdir(parents=True)
        order = {
            "size": size, "small": small, "rounds": rounds, "seed": seed, "folder": str(there),
            "into": str(there / "found.json"), "workloads": list(workloads_),
        }  # fmt: skip
        with socket.socket() as finder:
            finder.bind(("127.0.0.1", 0))
            port = finder.getsockname()[1]
        known = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        processes = []
        try:
            for rank in range(world):
                with (there / f"rank-{rank}.log").open("w") as log:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "bench.ranks", json.dumps(order)], env=known | {"RANK": str(rank)},
                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                        )
                    )  # fmt: skip
            deadline = time.monotonic() + timeout_s
            with contextlib.suppress(subprocess.TimeoutExpired):
                for process in processes:
                    process.wait(max(0.1, deadline - time.monotonic()))
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)
        if not (there / "found.json").exists():
            said = (there / "rank-0.log").read_text(errors="replace").strip().splitlines()[-1:]
            for workload in workloads_:
                results.about(f"{workload}, {world} ranks", "ckptmgr")["problem"] = f"the ranks died: {said}"
        else:
            found = json.loads((there / "found.json").read_text())
            for row in found["rows"]:
                workload = f"{row['workload']}, {world} ranks"
                results.about(workload, row["case"])
                results.add(workload, row["case"], row["round"], **{row["measure"]: row["value"]})
            for name, problem in found["problems"].items():
                workload, _, case = name.partition(": ")
                results.about(f"{workload}, {world} ranks", case)["problem"] = problem
        shutil.rmtree(there, ignore_errors=True)


def long_histories(results: Results, numbers: Sequence[int], rounds: int, saves: int, seed: int, folder: Path) -> None:
    """The figures of `bench.history`, for runs that hold so many checkpoints each."""
    chance = random.Random(seed)
    made = []
    for number in numbers:
        say(f"a run that holds {number} checkpoints")
        there = folder / f"history-{number}"
        there.mkdir(parents=True)
        if (problem := _history(["make", str(there), str(number)])[1]) is None:
            made.append(number)
        else:
            results.about(f"journal, {number}", "ckptmgr")["problem"] = problem
    for turn in range(rounds):
        for number in chance.sample(made, len(made)):
            found, problem = _history(["measure", str(folder / f"history-{number}"), str(saves)])
            about = results.about(f"journal, {number}", "ckptmgr")
            if problem is not None:
                about["problem"] = problem
            for measure, values in found.items():
                for value in values:
                    results.add(f"journal, {number}", "ckptmgr", turn, **{measure: value})
    for number in numbers:
        shutil.rmtree(folder / f"history-{number}", ignore_errors=True)


def _history(words: list[str]) -> tuple[dict[str, list[float]], str | None]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.history", *words], env=environment(), capture_output=True, text=True,
            check=False, timeout=900,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return {}, str(error)[-200:]
    if done.returncode:
        return {}, (done.stderr.strip().splitlines() or ["no word"])[-1][:300]
    return json.loads(done.stdout) if done.stdout else {}, None
