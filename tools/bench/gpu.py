"""
How long a training loop with its state on a GPU waits for a save: ckptmgr and others, one after the other.

    python tools/bench/gpu.py --gib 1 4 --out gpu.json

A loop of matrix products and AdamW trains on, step after step, each waited for. The time that a save takes
from it is what its steps take longer than usual until the save is complete, the call itself included. Every
way of saving is used as its documentation says; what it has written last is read back and compared.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

GIB = 1 << 30
#: Rows of a micro-batch; with two of them a step takes longer than copying the state at 50 GB/s on an H100.
ROWS = 16384
MICRO_BATCHES = 2
#: Steps after a save that is abandoned.
STEPS_LOOKED_AT = 4
#: Above this size (GiB) some of the tensors are read back, not all.
ALL_UP_TO = 5

Tensors = dict[str, dict[str, torch.Tensor]]


class Trainer:
    """A stack of linear layers with AdamW whose parameters and moments take about *gib* GiB."""

    def __init__(self, gib: float, device: str) -> None:
        width = 4096 if gib <= ALL_UP_TO else 8192
        width, self._rows = (width, ROWS) if device == "cuda" else (512, 64)
        layers = max(1, round(gib * GIB / 12 / width**2))
        self._device = device
        self.model = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(layers)]).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self._batch = torch.randn(self._rows, width, device=device, dtype=torch.bfloat16)
        self.waited_s = 0.0
        self.step(contextlib.nullcontext)
        self.usual_s = statistics.median(self.timed(contextlib.nullcontext) for _ in range(7))

    @property
    def state(self) -> Tensors:
        """All tensors, those of the optimizer by the names of their parameters."""
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        return {"model": {name: p.detach() for name, p in self.model.named_parameters()}, "optimizer": moments}

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for part in self.state.values() for tensor in part.values())

    def step(self, updating: Callable[[], Any]) -> None:
        """One step, to its end."""
        with torch.autocast(self._device, torch.bfloat16):
            for _ in range(MICRO_BATCHES):
                self.model(self._batch).square().mean().backward()
        started = time.perf_counter()
        with updating():
            self.waited_s += time.perf_counter() - started
            self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize()

    def timed(self, updating: Callable[[], Any]) -> float:
        """How long one step takes, in seconds."""
        started = time.perf_counter()
        self.step(updating)
        return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Peer:
    """One way of saving. Complete means what it says itself; of these only ckptmgr has synced everything then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, state: Tensors) -> None:
        """What it can do before training starts."""

    def save(self, step: int, state: Tensors) -> None:
        """Save; whoever updates the state then does so in `updating`."""
        raise NotImplementedError

    def updating(self) -> Any:
        """What a training loop puts around its updates."""
        return contextlib.nullcontext()

    def done(self) -> bool:
        """Whether the last save is complete."""
        return True

    def finish(self) -> None:
        """Wait for it, and raise what went wrong."""

    def load(self, step: int, state: Tensors) -> None:
        """Load a save into the tensors of *state*, which may be some of it."""
        raise NotImplementedError

    def close(self) -> None:
        """End everything."""


class Ckptmgr(Peer):
    """ckptmgr."""

    def __init__(self, folder: Path, capture: Any) -> None:
        super().__init__(folder)
        self._capture = capture

    def open(self, state: Tensors) -> None:
        from ckptmgr import DCP, CheckpointManager, KeepLast, Series

        series = [Series("checkpoint", DCP(), keep=KeepLast(1))]
        self._manager = CheckpointManager(self.folder / "run", series=series, capture=self._capture)
        self._manager.warm_up(state)

    def save(self, step: int, state: Tensors) -> None:
        self._pending: Any = self._manager.save(step, state)

    def updating(self) -> Any:
        return self._manager.updating()

    def done(self) -> bool:
        return bool(self._pending.done())

    def finish(self) -> None:
        self._pending.wait()

    def load(self, step: int, state: Tensors) -> None:
        assert self._manager.resume(state, step, verify_digests=False) is not None

    def close(self) -> None:
        self._manager.close()


class TorchSave(Peer):
    """`torch.save`."""

    def save(self, step: int, state: Tensors) -> None:
        _remove(self.folder / f"step-{step - 1}")
        torch.save(state, self.folder / f"step-{step}")

    def load(self, step: int, state: Tensors) -> None:
        found = torch.load(self.folder / f"step-{step}", mmap=True, weights_only=True)
        for part, tensors in state.items():
            for name, tensor in tensors.items():
                tensor.copy_(found[part][name])


class DcpAsync(Peer):
    """`dcp.async_save` in a thread: as shipped, or with a stager that is kept, in pinned memory."""

    def __init__(self, folder: Path, *, pinned: bool = False, overlap: bool = False) -> None:
        super().__init__(folder)
        self._pinned, self._overlap = pinned, overlap
        self._stager: Any = None
        self._staged: Any = None

    def open(self, state: Tensors) -> None:
        del state
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if self._pinned:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=True, use_shared_memory=False, use_async_staging=self._overlap,
                    use_non_blocking_copy=True,
                )
            )  # fmt: skip
            # PyTorch before 2.13 closes a stager with each save, and could not keep it.
            self._stager.close = lambda: None

    def save(self, step: int, state: Tensors) -> None:
        _remove(self.folder / f"step-{step - 1}")
        answer: Any = dcp.async_save(state, checkpoint_id=self.folder / f"step-{step}", async_stager=self._stager)
        self._staged = getattr(answer, "staging_completion", None)
        self._future = getattr(answer, "upload_completion", answer)

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        if self._staged is not None:
            self._staged.result()
        yield

    def done(self) -> bool:
        return bool(self._future.done())

    def finish(self) -> None:
        self._future.result()

    def load(self, step: int, state: Tensors) -> None:
        dcp.load(state, checkpoint_id=self.folder / f"step-{step}")

    def close(self) -> None:
        if self._stager is not None:
            type(self._stager).close(self._stager)


class TorchCheckpointing(Peer):
    """torch_checkpointing: stages in a thread into shared memory, writes in a process; nothing is synced."""

    def open(self, state: Tensors) -> None:
        from torch_checkpointing.checkpoint_manager import CheckpointManager
        from torch_checkpointing.schema import ItemSpec
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        self._manager: Any = CheckpointManager.Config(
            default=ItemSpec(requires_copy=True), storage_config=LocalFileSystemStorageConfig(use_direct_io=False)
        ).build()
        self._manager.prewarm_staging(state)
        self._staged: Any = None

    def save(self, step: int, state: Tensors) -> None:
        _remove(self.folder / f"step-{step - 1}")
        self._future = self._manager.save(str(self.folder / f"step-{step}"), state)
        self._staged = self._manager._staging_future

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        if self._staged is not None:
            self._staged.result()
        yield

    def done(self) -> bool:
        return bool(self._future.done())

    def finish(self) -> None:
        self._future.result()

    def load(self, step: int, state: Tensors) -> None:
        self._manager.load(str(self.folder / f"step-{step}"), into=state)

    def close(self) -> None:
        self._manager.close()


#: In the order in which they are tried as long as there is time.
PEERS: dict[str, Callable[[Path], Peer]] = {
    "ckptmgr sync": lambda folder: Ckptmgr(folder, "sync"),
    "ckptmgr overlap": lambda folder: Ckptmgr(folder, "overlap"),
    "dcp.async pinned, overlapped": lambda folder: DcpAsync(folder, pinned=True, overlap=True),
    "torch_checkpointing": TorchCheckpointing,
    "dcp.async pinned": lambda folder: DcpAsync(folder, pinned=True),
    "dcp.async as shipped": DcpAsync,
    "torch.save": TorchSave,
}


def measure(
    make: Callable[[Path], Peer], trainer: Trainer, folder: Path, saves: int, *, abandon: bool
) -> dict[str, Any]:
    """All figures of one way of saving; to *abandon* is to look at some steps only and not at what was written."""
    folder.mkdir(parents=True)
    peer = make(folder)
    started = time.perf_counter()
    peer.open(trainer.state)
    found: dict[str, Any] = {"open_s": time.perf_counter() - started, "saves": []}
    try:
        trainer.step(peer.updating)
        for number in range(1, saves + 1):
            expected = _sums(trainer.state)
            found["saves"].append(_one_save(peer, trainer, number, abandon=abandon and number == saves))
        found["intact"] = None if abandon else _is_intact(peer, trainer, saves, expected)
    finally:
        if not abandon:
            peer.close()
    return found


def _one_save(peer: Peer, trainer: Trainer, number: int, *, abandon: bool) -> dict[str, float]:
    synchronize()
    trainer.waited_s = 0.0
    started = time.perf_counter()
    peer.save(number, trainer.state)
    called = time.perf_counter() - started
    steps = 0
    first_step_s = 0.0
    while True:
        taken = trainer.timed(peer.updating)
        steps += 1
        first_step_s = first_step_s or taken
        if peer.done() or (abandon and steps == STEPS_LOOKED_AT):
            break
    total = time.perf_counter() - started
    if not abandon:
        peer.finish()
    return {
        "call_s": called,
        "wait_s": trainer.waited_s,
        "until_next_step_s": called + first_step_s - trainer.usual_s,
        "lost_s": total - steps * trainer.usual_s,
        "complete_s": total,
        "steps": steps,
    }


def _sums(state: Tensors) -> dict[str, int]:
    """A sum over the bits of every tensor: exact, and the same on every device."""
    return {
        f"{part}.{name}": int(tensor.reshape(-1).view(torch.int32).sum(dtype=torch.int64))
        for part, tensors in state.items()
        for name, tensor in tensors.items()
    }


def _is_intact(peer: Peer, trainer: Trainer, step: int, expected: dict[str, int]) -> bool:
    state = trainer.state
    if trainer.nbytes > ALL_UP_TO * GIB:
        state = {part: {name: t for name, t in below.items() if name.startswith("0.")} for part, below in state.items()}
    like = {
        part: {name: torch.empty_like(tensor, device="cpu") for name, tensor in below.items()}
        for part, below in state.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.load(step, like)
    return all(expected[name] == value for name, value in _sums(like).items())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_speed(nbytes: int = GIB) -> float:
    """Bytes per second from the GPU to pinned memory, the best of three."""
    source = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    times = []
    for _ in range(4):
        synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize()
        times.append(time.perf_counter() - started)
    return nbytes / min(times[1:])


def run(
    gib: float, folder: Path, saves: int, budget_s: float, only: list[str], device: str, *, abandon: bool
) -> dict[str, Any]:
    """Every way of saving at one size, as long as there is time."""
    started = time.monotonic()
    trainer = Trainer(gib, device)
    found: dict[str, Any] = {"gib": trainer.nbytes / GIB, "usual_step_s": trainer.usual_s, "peers": {}}
    print(f"{found['gib']:.2f} GiB of state, a step takes {1000 * trainer.usual_s:.1f} ms, in {folder}", flush=True)
    print(f"{'':30} {'save':>8} {'wait':>8} {'stall':>8} {'lost':>8} {'complete':>9}   ms; first, then the median")
    for name, make in PEERS.items():
        if only and name not in only:
            continue
        if time.monotonic() - started > budget_s:
            print(f"{name:30} left out: no time", flush=True)
            continue
        place = folder / name.replace(" ", "-").replace(",", "")
        _remove(place)
        try:
            one = measure(make, trainer, place, saves, abandon=abandon)
        except Exception as error:  # noqa: BLE001 - a way that does not work here is a result
            print(f"{name:30} {type(error).__name__}: {str(error)[:300]}", flush=True)
            found["peers"][name] = {"error": f"{type(error).__name__}: {error}"}
        else:
            found["peers"][name] = one
            _print(name, one)
        finally:
            if not abandon:
                _remove(place)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return found


def _print(name: str, one: dict[str, Any]) -> None:
    keys = ("call_s", "wait_s", "until_next_step_s", "lost_s", "complete_s")
    first, *rest = one["saves"]
    rows = [(name, first)]
    if rest:
        rows.append(("", {key: statistics.median(save[key] for save in rest) for key in keys}))
    for label, save in rows:
        print(f"{label:30} " + " ".join(f"{1000 * save[key]:8.1f}" for key in keys), end="")
        back = {None: "not read back", True: "read back equal", False: "read back WRONG"}[one["intact"]]
        print(f"   opened in {one['open_s']:.2f} s, {back}" if label else "")
    sys.stdout.flush()


def main() -> int:
    """Measure, print a table per size and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--gib", type=float, nargs="+", default=[1, 4], help="sizes of the state")
    parser.add_argument("--saves", type=int, default=4, help="per way and size, the first included")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds per size after which no other way is begun")
    parser.add_argument("--only", nargs="*", default=[], choices=PEERS, help="these ways only")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-gpu"), help="where to write")
    parser.add_argument("--abandon", action="store_true", help="look at some steps after the last save, then die")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries this script out")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU", file=sys.stderr)
        return 1
    about: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if args.device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "pinned_bytes_per_s": copy_speed()}
        print(f"{about['gpu']}, torch {about['torch']}, to pinned memory {about['pinned_bytes_per_s'] / 1e9:.1f} GB/s")
    sizes = []
    for gib in args.gib:
        folder = args.folder.absolute()
        sizes.append(run(gib, folder, args.saves, args.budget, args.only, args.device, abandon=args.abandon))
        if args.out is not None:
            args.out.write_text(json.dumps({**about, "sizes": sizes}, indent=2) + "\n")
        gc.collect()
    if args.abandon:
        sys.stdout.flush()
        os._exit(0)  # whatever is still being written is of no use
    wrong = [name for size in sizes for name, one in size["peers"].items() if one.get("intact") is False]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
