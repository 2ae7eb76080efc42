"""
Several ranks with an FSDP2 model: every rank runs the same cases in interleaved rounds and rank 0 writes the figures.

    python -m bench.ranks ORDER          with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set

All cases share the ranks' processes, and so the state. A figure is that of the slowest rank, from a barrier on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from bench import peers
from ckptmgr import DCP, CheckpointManager, HuggingFace, KeepLast, Series

_POLL_S = 0.001
_LAYERS = 8
#: Cases by the workload they save.
CASES = {
    "fsdp": ("copy", "ckptmgr", "dcp.save", "dcp.async thread kept"),
    "fsdp export": ("copy", "ckptmgr export", "gather + save_file", "dcp hf writer"),
    "small tensors": ("copy", "ckptmgr", "dcp.async thread kept"),
    "one tensor": ("ckptmgr",),
}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def model_state(size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sharded model of about *size* bytes with its AdamW state, flat; and the weights alone."""
    width = max(16, round((size / 3 / 4 / _LAYERS) ** 0.5 / 16) * 16)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(_LAYERS)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, width)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    moments = {
        f"{number}.{name}": tensor
        for number, entry in optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
        if name != "step"
    }
    return {"model": weights, "optimizer": moments}, weights


def small_state(count: int) -> dict[str, Any]:
    """So many tensors of 4 KiB, each sharded over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = 64 // dist.get_world_size()
    made = {
        f"expert{n:05d}": DTensor.from_local(torch.rand(rows, 16), mesh, [Shard(0)], run_check=False)
        for n in range(count)
    }
    return {"model": made}


class Case:
    """One way of saving one state on all ranks; the methods are as of `peers.Peer`."""

    def __init__(self, name: str, state: dict[str, Any], folder: Path) -> None:
        self.name, self.state, self.folder = name, state, folder
        self._over: Callable[[], bool] = lambda: True
        self._finish: Callable[[], Any] = lambda: None
        self._close: list[Callable[[], Any]] = []
        if name.startswith("ckptmgr"):
            export = name.endswith("export")
            kind = Series("hf", HuggingFace(), keep=KeepLast(1)) if export else Series("c", DCP(), keep=KeepLast(1))
            self._series = kind.name
            self._manager = CheckpointManager(folder / "run", series=[kind])
            self._manager.warm_up(state, series=kind.name)
            self._close.append(self._manager.close)
        elif name == "dcp.async thread kept":
            self._stager = DefaultStager(StagingOptions(False, False, False, False))
            self._close.append(self._stager.close)
        elif name == "copy":
            flat = [
                tensor for part in state.values() for tensor in (part.values() if isinstance(part, dict) else [part])
            ]
            self._sources = [local(tensor).detach() for tensor in flat]
            self._copies = [torch.zeros_like(tensor) for tensor in self._sources]

    def save(self, step: int) -> None:
        """Save; returns when the state may change."""
        place = self.folder / f"step-{step}"
        if self.name == "copy":
            torch._foreach_copy_(self._copies, self._sources)
        elif self.name.startswith("ckptmgr"):
            pending: Any = self._manager.save(step, self.state, series=self._series)
            self._over, self._finish = pending.done, pending.wait
        elif self.name == "dcp.save":
            dcp.save(self.state, checkpoint_id=place)
        elif self.name == "dcp.async thread kept":
            future: Any = dcp.async_save(self.state, checkpoint_id=place, async_stager=self._stager)
            self._over, self._finish = future.done, future.result
        elif self.name == "dcp hf writer":
            writer = HuggingFaceStorageWriter(path=str(place), save_distributed=True, enable_consolidation=True)
            dcp.save(self.state, storage_writer=writer)
        else:
            whole = {name: tensor.full_tensor() for name, tensor in self.state.items()}
            if dist.get_rank() == 0:
                from safetensors.torch import save_file

                place.mkdir()
                save_file(whole, place / "model.safetensors", metadata={"format": "pt"})
                peers.sync_all(place)

    def measured(self, step: int) -> tuple[float, float]:
        """One save: seconds of stall, and until durable."""
        dist.barrier()
        began = time.perf_counter()
        self.save(step)
        stall = time.perf_counter() - began
        while not self._over():
            time.sleep(_POLL_S)
        durable = time.perf_counter() - began
        self._finish()
        box = torch.tensor([stall, durable], dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        if dist.get_rank() == 0 and not self.name.startswith("ckptmgr"):
            shutil.rmtree(self.folder / f"step-{step - 1}", ignore_errors=True)
        return box[0].item(), box[1].item()

    def close(self) -> None:
        """End what was started."""
        for close in self._close:
            close()


def main() -> None:
    """Run one world."""
    order = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    rows: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    whole, weights = model_state(order["size"])
    states = {
        "fsdp": whole, "fsdp export": weights, "small tensors": small_state(order["small"]),
        "one tensor": {"model": {"t": torch.zeros(1024)}},
    }  # fmt: skip
    for workload, names in CASES.items():
        if workload not in order["workloads"]:
            continue
        cases = {}
        for number, name in enumerate(names):
            folder = Path(order["folder"], f"{workload}-{number}")
            folder.mkdir(exist_ok=True)
            if problem := _on_all(lambda: cases.update({name: Case(name, states[workload], folder)})):  # noqa: B023
                problems[f"{workload}: {name}"] = problem
        chance = random.Random(order["seed"])
        for number in range(order["rounds"] + 1):
            for name in chance.sample(list(cases), len(cases)):
                found: list[tuple[float, float]] = []
                if problem := _on_all(lambda: found.append(cases[name].measured(number + 1))):  # noqa: B023
                    problems[f"{workload}: {name}"] = problem
                    del cases[name]
                    continue
                word = "" if number else "first_"
                for measure, value in zip(("stall_s", "durable_s"), found[0], strict=True):
                    rows.append({"case": name, "workload": workload, "measure": f"{word}{measure}", "round": number,
                                 "value": value})  # fmt: skip
        for case in cases.values():
            _on_all(case.close)
    if rank == 0:
        Path(order["into"]).write_text(json.dumps({"rows": rows, "problems": problems}))
    dist.barrier()
    os._exit(0)


def _on_all(do: Callable[[], Any]) -> str | None:
    """Do something on all ranks; what went wrong on any of them, the same on all."""
    mine: str | None = None
    try:
        do()
    except Exception as error:  # noqa: BLE001 - a case that fails is a row
        mine = f"{type(error).__name__}: {error}"[:300]
    all_of_them: list[str | None] = [None] * dist.get_world_size()
    with contextlib.suppress(RuntimeError):
        dist.all_gather_object(all_of_them, mine)
    return next((one for one in all_of_them if one is not None), None)


if __name__ == "__main__":
    main()
