"""
The process that one peer lives in, over all rounds of a workload: does what it is asked and answers with figures.

    python -m bench.worker SOCKET ORDER
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench import peers, workloads

#: How often a save in the background is asked whether it is done.
_POLL_S = 0.001


class Service:
    """The commands; each method that does not begin with an underscore is one."""

    def __init__(self, order: dict[str, Any]) -> None:
        layout = workloads.specs(order["workload"], order["size"])
        self._state = workloads.tensors(layout, order["descriptor"])
        self._bytes = sum(tensor.nbytes for tensor in self._state.values())
        self._folder = Path(order["folder"])
        self._peer = peers.make(order["peer"], self._state, self._folder)
        self._training = workloads.Training()
        self._training.run(lambda s: s > 0.1)
        self._step = 0
        self._calibration_s = order["calibration_s"]

    def about(self) -> dict[str, Any]:
        """What is to be known of the peer."""
        peer = self._peer
        return {
            "note": peer.note, "syncs": peer.syncs, "asynchronous": peer.asynchronous, "family": peer.family,
            "in_thread": peer.in_thread, "tensors": len(self._state), "state_bytes": self._bytes,
        }  # fmt: skip

    def fill(self, seed: int) -> dict[str, Any]:
        """Give the tensors their values."""
        workloads.fill(self._state, seed)
        return {}

    def open(self) -> dict[str, Any]:
        """Let the peer do what it can do before training."""
        began = time.perf_counter()
        self._peer.open()
        return {"open_s": time.perf_counter() - began}

    def save(self) -> dict[str, Any]:
        """One save with nothing beside it."""
        helper = self._helper_cpu()
        step = self._next()
        began = time.perf_counter()
        self._peer.save(step)
        stall = time.perf_counter() - began
        if isinstance(self._peer, peers.Ckptmgr):
            stall += self._overlapped()
        while not self._peer.done():
            time.sleep(_POLL_S)
        complete = time.perf_counter() - began
        if not self._peer.syncs:
            peers.sync_all(self._peer.place(step))
        durable = time.perf_counter() - began
        self._peer.finish()
        found = {"stall_s": stall, "complete_s": complete, "durable_s": durable}
        if helper is not None and (after := self._helper_cpu()) is not None:
            found |= {"helper_user_s": after[0] - helper[0], "helper_system_s": after[1] - helper[1]}
        self._clean()
        return found | {"stored_bytes": peers.size_of(self._peer.place(step))}

    def train_and_save(self) -> dict[str, Any]:
        """One save while a training loop runs, timed on both sides."""
        before = self._training.run(lambda s: s > self._calibration_s)
        step = self._next()
        began = time.perf_counter()
        self._peer.save(step)
        stall = time.perf_counter() - began
        syncing: threading.Thread | None = None

        def over(_: float) -> bool:
            nonlocal syncing
            if syncing is None and self._peer.done() and not self._peer.syncs:
                syncing = threading.Thread(target=peers.sync_all, args=(self._peer.place(step),))
                syncing.start()
            return self._peer.done() and (syncing is None or not syncing.is_alive())

        steps, trained_s = self._training.run(over, self._peer.updating)
        durable = time.perf_counter() - began
        self._peer.finish()
        self._clean()
        after = self._training.run(lambda s: s > self._calibration_s)
        rate = (before[0] + after[0]) / (before[1] + after[1])
        found = {"training_stall_s": stall, "training_durable_s": durable, "lost_s": durable - steps / rate}
        # A save that was over before a dozen steps says nothing of how much they were slowed.
        return found | ({"slowed": 1 - steps / trained_s / rate} if steps >= 12 else {})

    def load(self, cold: bool) -> dict[str, Any]:
        """Load the last save, and in every other way that its files can be loaded."""
        found = {}
        for name, load in {"load": self._peer.load, **self._peer.others()}.items():
            if cold and name == "stock":
                continue
            if cold:
                forget_pages()
            else:
                peers.read_all(self._peer.place(self._step))
            began = time.perf_counter()
            load(self._step)
            word = name if name == "load" else f"load_{name}"
            found[f"{word}_{'cold' if cold else 'warm'}_s"] = time.perf_counter() - began
        return found

    def check(self) -> dict[str, Any]:
        """
        Whether what is read back is the state at the save, though it changed as soon as ``save`` had returned.

        The change is turned back at the end: the other peers map the same memory.
        """
        expected = workloads.digests(self._state)
        step = self._next()
        self._peer.save(step)
        with self._peer.updating():
            workloads.change(self._state)
        while not self._peer.done():
            time.sleep(_POLL_S)
        self._peer.finish()
        self._clean()
        wrong = {}
        try:
            for name, load in {"load": self._peer.load, **self._peer.others()}.items():
                for tensor in self._state.values():
                    tensor.zero_()
                load(step)
                found = workloads.digests(self._state)
                wrong[name] = sum(found[key] != digest for key, digest in expected.items())
        finally:
            workloads.fill(self._state, 1)
        return {"wrong_tensors": max(wrong.values()), "wrong_in": [name for name, count in wrong.items() if count]}

    def limit_descriptors(self, most: int) -> dict[str, Any]:
        """As many descriptors as a shell gives a program."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return {}

    def close(self) -> dict[str, Any]:
        """End what the peer has started."""
        self._peer.close()
        return {}

    def _next(self) -> int:
        self._step += 1
        return self._step

    def _overlapped(self) -> float:
        """What an update of the weights still waits for that comes half a second after the save, or when it is done."""
        if not self._peer.overlap:
            return 0.0
        until = time.perf_counter() + 0.5
        while time.perf_counter() < until and not self._peer.done():
            time.sleep(_POLL_S)
        began = time.perf_counter()
        with self._peer.updating():
            return time.perf_counter() - began

    def _helper_cpu(self) -> tuple[float, float] | None:
        pid = self._peer.helper_pid()
        if pid is None:
            return None
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        return int(words[11]) / ticks, int(words[12]) / ticks

    def _clean(self) -> None:
        if not self._peer.deletes and self._step > 1:
            peers.remove(self._peer.place(self._step - 1))


def forget_pages() -> None:
    """
    Let the kernel forget every clean page of every file.

    Raises:
        OSError: This process may not.
    """
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1\n")


def main() -> None:
    """Serve until the socket is closed."""
    connection = Connection(int(sys.argv[1]))
    torch.set_num_threads(1)
    try:
        service = Service(json.loads(sys.argv[2]))
    except Exception as error:  # noqa: BLE001 - a peer that cannot live is an answer
        connection.send({"error": f"{type(error).__name__}: {error}"})
        return
    connection.send({})
    while True:
        try:
            command, words = connection.recv()
        except EOFError:
            break
        try:
            connection.send(getattr(service, command)(**words))
        except Exception as error:  # noqa: BLE001 - what a peer raises is an answer
            import traceback

            traceback.print_exc()
            connection.send({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)  # whatever threads a peer has left


if __name__ == "__main__":
    main()
