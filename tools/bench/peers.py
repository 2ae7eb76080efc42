"""
The ways of saving that are compared: the floor, ckptmgr, and others, behind one small interface.

A peer is used as its documentation says, by one process that keeps it from save to save. What a peer leaves
undone (syncing its files) is done for it by the worker, and the time until *durable* includes that.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import inspect
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OURS = "ckptmgr"
FLOOR = "floor"
_POPULATE_WRITE = 23
_IOV_MAX = 1024


class Unavailable(Exception):
    """The peer cannot be used here; the text says why."""


class Peer:
    """
    One way of saving.

    Args:
        state: The tensors, by flat name; they are what is saved, and what is loaded into.
        folder: Where it may write; empty.
    """

    #: What is to be known to read its figures.
    note = ""
    #: Whether all it wrote is durable when it says that it is complete.
    syncs = False
    #: Whether it works on after ``save`` has returned.
    asynchronous = True
    #: "dcp" for those that PyTorch's distributed checkpoints are made of, else empty.
    family = ""
    #: Whether what it does in the background is done by a thread of the trainer.
    in_thread = False
    #: Whether it deletes what is superseded.
    deletes = False

    def __init__(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        self.state = state
        self.folder = folder

    @functools.cached_property
    def nested(self) -> dict[str, dict[str, torch.Tensor]]:
        """The same tensors as a trainer has them: one mapping for the model, one for the optimiser."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.state.items():
            part, _, rest = name.partition(".")
            found.setdefault(part, {})[rest] = tensor
        return found

    def open(self) -> None:
        """What it can do before training starts."""

    def save(self, step: int) -> None:
        """Save; returns when the state may change."""
        raise NotImplementedError

    def done(self) -> bool:
        """Whether the last save is complete, by its own word."""
        return True

    def finish(self) -> None:
        """Raise what went wrong with a save that is done."""

    def updating(self) -> Any:
        """What a training loop puts around the updates of its state."""
        return contextlib.nullcontext()

    def place(self, step: int) -> Path:
        """The file or directory of a save."""
        return self.folder / f"step-{step}"

    def load(self, step: int) -> None:
        """Load a save into the state, in place."""
        raise NotImplementedError

    def others(self) -> dict[str, Callable[[int], None]]:
        """Other ways to load a save, by what they are called."""
        return {}

    def helper_pid(self) -> int | None:
        """The process that writes for it, where it has one that stays."""
        return None

    def close(self) -> None:
        """End everything that it has started."""

    def copy_from(self, found: dict[str, torch.Tensor]) -> None:
        """Copy loaded tensors into the state."""
        torch._foreach_copy_(list(self.state.values()), [found[name] for name in self.state])


class Floor(Peer):
    """
    The least that a save can cost: one warm copy by one thread into a kept image, written by a process without torch.

    It has no catalogue, no errors worth the name and no ranks: a measure of what is possible, not a product.
    """

    note = "one copy into a kept memory image; a process without torch writes it directly, digests and syncs it"
    syncs = True

    def __init__(self, state: dict[str, torch.Tensor], folder: Path, *, digest: bool = True) -> None:
        super().__init__(state, folder)
        self._digest = digest
        offsets: dict[str, int] = {}
        end = 0
        for name, tensor in state.items():
            offsets[name] = end
            end += -(-tensor.nbytes // 64) * 64
        header = json.dumps(offsets).encode()
        start = -(-len(header) // 4096) * 4096
        self._size = -(-(start + end) // 4096) * 4096
        self._offsets = [start + offset for offset in offsets.values()]
        self._header = header
        self._waiting = False
        self._answer = ""

    def open(self) -> None:
        descriptor = os.memfd_create("bench-image")
        os.posix_fallocate(descriptor, 0, self._size)
        memory = mmap.mmap(descriptor, self._size)
        memory.madvise(_POPULATE_WRITE)
        memory[: len(self._header)] = self._header
        self._views = [
            torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
            for tensor, offset in zip(self.state.values(), self._offsets, strict=True)
        ]
        self._sources = list(self.state.values())
        torch._foreach_copy_(self._views, self._sources)
        script = Path(__file__).with_name("floor_writer.py")
        self._helper = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _WITHOUT_SITE, str(script), str(descriptor), str(self._size),
             str(int(self._digest))],
            pass_fds=[descriptor], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        if self._read() != "ready":
            raise Unavailable("the floor's helper did not start")

    def save(self, step: int) -> None:
        torch._foreach_copy_(self._views, self._sources)
        assert self._helper.stdin is not None
        self._helper.stdin.write(f"{self.place(step)}\n")
        self._waiting = True
        self._reader = threading.Thread(target=self._hear)
        self._reader.start()

    def done(self) -> bool:
        return not self._waiting

    def finish(self) -> None:
        self._reader.join()
        if self._answer.startswith("error") or not self._answer:
            raise OSError(self._answer or "the floor's helper is gone")

    def load(self, step: int) -> None:
        descriptor = os.open(self.place(step) / "data", os.O_RDONLY)
        gap = bytearray(64)
        runs: list[tuple[int, list[Any]]] = []
        end, length = -1, 0
        for tensor, offset in zip(self.state.values(), self._offsets, strict=True):
            view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            if offset - end >= 64 or end < 0 or len(runs[-1][1]) > _IOV_MAX - 4 or length > 8 << 20:
                runs.append((offset, []))
                length = 0
            elif offset > end:
                runs[-1][1].append(memoryview(gap)[: offset - end])
            for start in range(0, len(view), 8 << 20):
                if start:
                    runs.append((offset + start, []))
                runs[-1][1].append(view[start : start + (8 << 20)])
            length += len(view)
            end = offset + len(view)

        def read(mine: list[tuple[int, list[Any]]]) -> None:
            for offset, buffers in mine:
                if os.preadv(descriptor, buffers, offset) != sum(map(len, buffers)):
                    raise OSError("a short read")

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(read, runs[n::2]) for n in range(2)]:
                future.result()
        os.close(descriptor)

    def helper_pid(self) -> int | None:
        return self._helper.pid

    def close(self) -> None:
        assert self._helper.stdin is not None
        self._helper.stdin.close()
        self._helper.wait(10)

    def _read(self) -> str:
        assert self._helper.stdout is not None
        return self._helper.stdout.readline().rstrip("\n")

    def _hear(self) -> None:
        self._answer = self._read()
        self._waiting = False


#: Starts the helper without `site`, which may import what it likes, but with this process's packages.
_WITHOUT_SITE = (
    "import runpy, sys; sys.path += " + repr([path for path in sys.path if path]) + "; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


class Ckptmgr(Peer):
    """ckptmgr itself; complete means COMMITTED."""

    note = "durable is COMMITTED"
    syncs = True
    deletes = True

    def __init__(
        self, state: dict[str, torch.Tensor], folder: Path, *, export: bool = False, dcp: bool = True,
        overlap: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(state, folder)
        self._export, self._dcp, self.overlap = export, dcp, overlap
        self._pending: list[Any] = []

    def open(self) -> None:
        from ckptmgr import DCP, CheckpointManager, HuggingFace, KeepLast, Series

        extra: dict[str, Any] = {}
        self._save_options: dict[str, Any] = {}
        if self.overlap:
            for call, options in ((CheckpointManager, extra), (CheckpointManager.save, self._save_options)):
                if "capture" in inspect.signature(call).parameters:
                    options["capture"] = "overlap"
                    break
            else:
                raise Unavailable('this version has no capture="overlap"')
        series = [Series("checkpoint", DCP(), keep=KeepLast(1))] if self._dcp else []
        if self._export:
            series.append(Series("hf", HuggingFace(), keep=KeepLast(1)))
        self._manager = CheckpointManager(self.folder / "run", series=series, **extra)
        self._series = [one.name for one in series]
        # An export that is saved together with a checkpoint needs no memory of its own.
        self._manager.warm_up(self._of(self._series[0]), series=self._series[0])

    def _of(self, series: str) -> dict[str, Any]:
        if series == "checkpoint":
            return dict(self.nested)
        return {name: tensor for name, tensor in self.state.items() if name.startswith("model.")}

    def save(self, step: int) -> None:
        if len(self._series) > 1:
            self._pending = list(
                self._manager.save_together(step, {name: self._of(name) for name in self._series}).values()
            )
        else:
            (name,) = self._series
            self._pending = [self._manager.save(step, self._of(name), series=name, **self._save_options)]

    def done(self) -> bool:
        return all(pending.done() for pending in self._pending)

    def finish(self) -> None:
        for pending in self._pending:
            pending.wait()

    def updating(self) -> Any:
        return self._manager.updating()

    def place(self, step: int) -> Path:
        if not self._dcp:
            return self.folder / "run" / "hf" / f"hf-{step}"
        return self.folder / "run" / "checkpoint" / f"step-{step}"

    def load(self, step: int) -> None:
        if not self._dcp:
            _load_safetensors(self, self.place(step))
        elif self._manager.resume(self.nested, step) is None:
            raise AssertionError(f"nothing to resume from at step {step}")

    def others(self) -> dict[str, Callable[[int], None]]:
        if not self._dcp:
            return {}
        return {
            "meanwhile": lambda step: self._manager.resume(self.nested, step, verify_digests="meanwhile"),
            "unverified": lambda step: self._manager.resume(self.nested, step, verify_digests=False),
            "stock": lambda step: _load_dcp(self, self.place(step)),
        }

    def helper_pid(self) -> int | None:
        return self._manager.writer_pid

    def close(self) -> None:
        self._manager.close()


class TorchSave(Peer):
    """`torch.save`, on the training thread."""

    note = "torch.save; files synced by the bench"
    asynchronous = False

    def save(self, step: int) -> None:
        torch.save(self.nested, self.place(step))

    def load(self, step: int) -> None:
        found = torch.load(self.place(step), weights_only=True)
        self.copy_from({f"{part}.{name}": t for part, below in found.items() for name, t in below.items()})


class SaveFile(Peer):
    """`safetensors.torch.save_file`, on the training thread."""

    note = "safetensors.save_file; files synced by the bench"
    asynchronous = False

    def place(self, step: int) -> Path:
        return self.folder / f"step-{step}.safetensors"

    def save(self, step: int) -> None:
        _save_file(self.state, self.place(step))

    def load(self, step: int) -> None:
        _load_safetensors(self, self.place(step))


class CloneAndThread(SaveFile):
    """The do-it-yourself way: clone every tensor, `save_file` in a thread."""

    note = "clone(), then save_file in a thread; files synced by the bench"
    asynchronous = True
    in_thread = True

    def save(self, step: int) -> None:
        copies = {name: tensor.clone() for name, tensor in self.state.items()}
        self._thread = threading.Thread(target=_save_file, args=(copies, self.place(step)))
        self._thread.start()

    def done(self) -> bool:
        return not self._thread.is_alive()


class Fork(SaveFile):
    """The technique of InternLM/xtuner, written anew: a kept copy, and a forked child that writes it."""

    note = "xtuner's technique: kept copy, fork, save_file in the child at nice 10, rename; files synced by the bench"
    asynchronous = True

    def open(self) -> None:
        self._copies = {name: torch.empty_like(tensor) for name, tensor in self.state.items()}
        self._child, self._status = 0, 0

    def save(self, step: int) -> None:
        torch._foreach_copy_(list(self._copies.values()), list(self.state.values()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads beside a fork: this is the technique
            self._child = os.fork()
        if self._child:
            return
        status = 1
        try:
            os.nice(10)
            scratch = self.folder / f"step-{step}.tmp"
            _save_file(self._copies, scratch)
            scratch.rename(self.place(step))
            status = 0
        finally:
            os._exit(status)

    def done(self) -> bool:
        if self._child:
            pid, self._status = os.waitpid(self._child, os.WNOHANG)
            self._child = 0 if pid else self._child
        return not self._child

    def finish(self) -> None:
        if self._status:
            raise OSError(f"the child ended with status {self._status}")


class DcpSave(Peer):
    """`torch.distributed.checkpoint.save`, on the training thread."""

    note = "dcp.save; syncs its files but .metadata, and no directory"
    asynchronous = False
    syncs = True
    family = "dcp"

    def open(self) -> None:
        _one_rank()

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.nested, checkpoint_id=self.place(step))

    def load(self, step: int) -> None:
        _load_dcp(self, self.place(step))


class DcpAsync(DcpSave):
    """`dcp.async_save`, with a thread or a process, as shipped or with a stager that is kept."""

    asynchronous = True

    def __init__(
        self, state: dict[str, torch.Tensor], folder: Path, *, process: bool = False, kept: bool = False
    ) -> None:
        super().__init__(state, folder)
        self._process, self._kept = process, kept
        self._stager: Any = None
        self.in_thread = not process
        kind = "process" if process else "thread"
        self.note = f"dcp.async_save, {kind}, {'a DefaultStager that is kept' if kept else 'as shipped'}"

    def open(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().open()
        if self._kept:
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=False, use_shared_memory=self._process, use_async_staging=False,
                    use_non_blocking_copy=False,
                )
            )  # fmt: skip

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        kind = AsyncCheckpointerType.PROCESS if self._process else AsyncCheckpointerType.THREAD
        self._future: Any = dcp.async_save(
            self.nested, checkpoint_id=self.place(step), async_checkpointer_type=kind, async_stager=self._stager
        )

    def done(self) -> bool:
        return bool(self._future.done())

    def finish(self) -> None:
        self._future.result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class DcpHuggingFace(DcpSave):
    """DCP's writer of safetensors files."""

    note = "dcp.save with HuggingFaceStorageWriter, one file"

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import HuggingFaceStorageWriter

        dcp.save(self.state, storage_writer=HuggingFaceStorageWriter(path=str(self.place(step))))

    def load(self, step: int) -> None:
        _load_safetensors(self, self.place(step))


class TorchCheckpointing(Peer):
    """torch_checkpointing: shared-memory staging in a thread, a process that writes."""

    note = "stages in a thread, whose end counts as stall; direct I/O off (fails on ext4); files synced by the bench"

    def __init__(self, state: dict[str, torch.Tensor], folder: Path, *, safetensors: bool = False) -> None:
        super().__init__(state, folder)
        self._safetensors = safetensors

    def open(self) -> None:
        from torch_checkpointing.checkpoint_layout import LayoutInfo, SafetensorsSerialization
        from torch_checkpointing.checkpoint_manager import CheckpointManager
        from torch_checkpointing.schema import ItemSpec
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        layout = LayoutInfo("model.safetensors", SafetensorsSerialization()) if self._safetensors else None
        spec = ItemSpec(requires_copy=True) if layout is None else ItemSpec(requires_copy=True, layout=layout)
        self._manager = CheckpointManager.Config(
            default=spec, storage_config=LocalFileSystemStorageConfig(use_direct_io=False)
        ).build()
        self._items = {"model": self.state} if self._safetensors else self.nested
        self._manager.prewarm_staging(self._items)

    def save(self, step: int) -> None:
        self._future: Any = self._manager.save(str(self.place(step)), self._items)
        staging = self._manager._staging_future
        if staging is not None:
            staging.result()

    def done(self) -> bool:
        return bool(self._future.done())

    def finish(self) -> None:
        self._future.result()

    def load(self, step: int) -> None:
        if self._safetensors:
            _load_safetensors(self, self.place(step))
        else:
            self._manager.load(str(self.place(step)), into=self._items)

    def close(self) -> None:
        self._manager.close()


class Orbax(Peer):
    """Orbax's asynchronous checkpointer over numpy views of the tensors."""

    note = "numpy views of the tensors; OCDBT with zstd, as shipped"
    syncs = True
    in_thread = True

    def open(self) -> None:
        import orbax.checkpoint as ocp

        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._views = {
            part: {name: tensor.numpy() for name, tensor in below.items()} for part, below in self.nested.items()
        }
        self._pool = concurrent.futures.ThreadPoolExecutor(1)

    def save(self, step: int) -> None:
        self._checkpointer.save(self.place(step), self._views)
        self._future = self._pool.submit(self._checkpointer.wait_until_finished)

    def done(self) -> bool:
        return self._future.done()

    def finish(self) -> None:
        self._future.result()

    def load(self, step: int) -> None:
        found = self._checkpointer.restore(self.place(step))
        self.copy_from(
            {f"{part}.{name}": torch.as_tensor(array) for part, below in found.items() for name, array in below.items()}
        )

    def close(self) -> None:
        self._checkpointer.close()
        self._pool.shutdown()


_ALL = ("train", "export", "moe")
_Make = Callable[[dict[str, torch.Tensor], Path], Peer]
#: Name → (how it is made, the workloads it takes part in, those in which `make bench-quick` has it).
PEERS: dict[str, tuple[_Make, tuple[str, ...], tuple[str, ...]]] = {
    FLOOR: (Floor, _ALL, _ALL),
    "floor undigested": (functools.partial(Floor, digest=False), ("train",), ()),
    OURS: (Ckptmgr, ("train", "moe"), _ALL),
    f"{OURS} export": (functools.partial(Ckptmgr, export=True, dcp=False), ("export",), _ALL),
    f"{OURS} overlap": (functools.partial(Ckptmgr, overlap=True), ("train",), _ALL),
    f"{OURS} both": (functools.partial(Ckptmgr, export=True), ("train",), ()),
    "torch.save": (TorchSave, ("train", "moe"), ("train",)),
    "safetensors": (SaveFile, ("export", "moe"), ("export",)),
    "clone + thread": (CloneAndThread, ("export",), ()),
    "xtuner fork": (Fork, _ALL, ("train", "export")),
    "dcp.save": (DcpSave, ("train", "moe"), _ALL),
    "dcp.async thread": (DcpAsync, ("train",), ()),
    "dcp.async thread kept": (functools.partial(DcpAsync, kept=True), ("train", "moe"), _ALL),
    "dcp.async process": (functools.partial(DcpAsync, process=True), ("train",), ()),
    "dcp.async process kept": (functools.partial(DcpAsync, process=True, kept=True), ("train", "moe"), ()),
    "dcp hf writer": (DcpHuggingFace, ("export",), _ALL),
    "torch_checkpointing": (TorchCheckpointing, ("train", "moe"), ("train",)),
    "torch_checkpointing st": (functools.partial(TorchCheckpointing, safetensors=True), ("export",), ()),
    "orbax": (Orbax, ("train",), ()),
}


def make(name: str, state: dict[str, torch.Tensor], folder: Path) -> Peer:
    """A peer by its name."""
    return PEERS[name][0](state, folder)


def sync_all(place: Path) -> None:
    """Sync a file, or every file and directory below a directory, and the directory that holds it."""
    found = [place, *place.rglob("*")] if place.is_dir() else [place]
    for path in [*reversed(found), place.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_all(place: Path) -> None:
    """Have every file of a save in the page cache, where what was written directly is not by itself."""
    buffer = bytearray(8 << 20)
    for path in [place, *place.rglob("*")]:
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def remove(place: Path) -> None:
    """Remove a save."""
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def size_of(place: Path) -> int:
    """Bytes of all files of a save."""
    return sum(path.stat().st_size for path in ([place, *place.rglob("*")]) if path.is_file())


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _load_safetensors(peer: Peer, place: Path) -> None:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]:
        found |= load_file(path)
    peer.copy_from(found)


def _load_dcp(peer: Peer, place: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(peer.nested, checkpoint_id=place)


def _one_rank() -> None:
    """The process group that asynchronous DCP asks for, of this process alone."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        port = finder.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
