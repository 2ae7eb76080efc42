#!/usr/bin/env python3
"""
Measure the memory of asynchronous saves over time: of the trainer, of its writer process, and what they share.

    export_memory.py INTO --model MODEL_DIR
    torchrun --nproc-per-node 8 tools/validation/export_memory.py INTO --model MODEL_DIR

Builds the model of MODEL_DIR/config.json with random weights, shards it with FSDP2 if there are
several ranks, gives AdamW its state, and saves: checkpoints only (dcp), exports only (hf), and both at
the same time. Samples of every rank go to INTO/memory.csv. The table states each format's peak, in
bytes and relative to the state, which is what one rank captures at a save: its shards of weights and
optimizer for a checkpoint, of weights for an export, the sum for both.

RSS counts a page in every process that maps it; PSS divides it among them, so it changes as other
processes come and go. The total, of which the peak is stated, is what the rank takes and cannot give
back: the anonymous memory of trainer and writer, and their shared memory once. Files are in it neither
as libraries nor as page cache: they give way when memory is needed.

Exit status: 0 measured, 1 a peak is above --limit, 2 wrong usage, 3 not possible here.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ckptmgr import DCP, CheckpointError, CheckpointManager, HuggingFace, KeepLast, Series

MEASURED, ABOVE_LIMIT, IMPOSSIBLE = 0, 1, 3
FORMATS = {"dcp": ("checkpoint",), "hf": ("hf",), "both": ("checkpoint", "hf")}


class MeasurementFailed(Exception):
    """The measurement cannot be made here."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """
    One look at one rank. Bytes; *at_s* counts seconds from the start of the measurement.

    ``shared`` is the shared memory that trainer or writer have mapped, the arenas above all; ``total`` is
    what the rank takes in host memory; ``device`` is what torch has allocated on the accelerator.
    """

    at_s: float
    host: str
    rank: int
    format: str
    phase: str
    trainer_rss: int
    trainer_pss: int
    writer_rss: int
    writer_pss: int
    shared: int
    total: int
    device: int


class Sampler:
    """
    Looks at this process and its writer in the background, every *interval_s* seconds.

    Args:
        rank: Whose samples they are.
        interval_s: Between looks; one takes some milliseconds per GB mapped.
    """

    def __init__(self, rank: int, interval_s: float) -> None:
        self.samples: list[Sample] = []
        self._rank = rank
        self._interval_s = interval_s
        self._host = socket.gethostname()
        self._now = ("", "")
        self._writer: int | None = None
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._looking = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def phase(self, form: str, name: str, writer: int | None = None) -> Iterator[None]:
        """What happens in the block; there is a sample at its beginning and one at its end."""
        self._now, self._writer = (form, name), writer
        self.look()
        yield
        self.look()

    def look(self) -> None:
        """Take one sample now."""
        with self._looking:
            mine, writers = memory_of(os.getpid()), memory_of(self._writer)
            # Of shared pages the PSS moves from the trainer to its writer while that maps them: not to be summed.
            shared = max(mine["RssShmem"], writers["RssShmem"])
            self.samples.append(
                Sample(
                    at_s=time.monotonic() - self._started,
                    host=self._host,
                    rank=self._rank,
                    format=self._now[0],
                    phase=self._now[1],
                    trainer_rss=mine["Rss"],
                    trainer_pss=mine["Pss"],
                    writer_rss=writers["Rss"],
                    writer_pss=writers["Pss"],
                    shared=shared,
                    total=mine["Pss_Anon"] + writers["Pss_Anon"] + shared,
                    device=torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
                )
            )

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.look()


def memory_of(pid: int | None) -> dict[str, int]:
    """RSS and PSS of a process, the shared memory in one and the anonymous in the other; zeros if there is none."""
    found = dict.fromkeys(("Rss", "RssShmem", "Pss", "Pss_Anon"), 0)
    if pid is None:
        return found
    try:
        # RSS by kind is in one file, PSS in the other.
        text = Path(f"/proc/{pid}/status").read_text() + Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return found
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = 1024 * int(value.split()[0])
    return found


# -- what is measured -------------------------------------------------------------------------------


def build(options: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with random weights, sharded, and an optimizer with its state."""
    config_path = options.model / "config.json"
    try:
        names = json.loads(config_path.read_bytes())["architectures"]
        kind = getattr(transformers, names[0])
        config = kind.config_class.from_pretrained(options.model, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise MeasurementFailed(f"{config_path} describes no model that transformers has: {error!r}") from error
    with torch.device("meta"):
        model = kind._from_config(config, dtype=options.dtype)
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for module in list(model.modules()):
            if type(module).__name__ in (model._no_split_modules or ()):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        local(parameter.data).normal_(std=0.02)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def state_bytes(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace
) -> dict[str, int]:
    """What this rank captures at one save of each format, in bytes."""
    weights = [local(parameter) for parameter in model.parameters()]
    moments = [local(value) for state in optimizer.state.values() for value in state.values()]
    full = sum(tensor.numel() * tensor.element_size() for tensor in (*weights, *moments))
    width = options.export_dtype.itemsize if options.export_dtype is not None else None
    export = sum(tensor.numel() * (width or tensor.element_size()) for tensor in weights)
    return {"dcp": full, "hf": export, "both": full + export}


def measure(
    form: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    sampler: Sampler,
    options: argparse.Namespace,
) -> None:
    """Save some times in one format or in both, and train a little meanwhile."""
    run = options.into / form
    export = HuggingFace(assets=options.model, dtype=options.export_dtype)
    with sampler.phase(form, "before"):
        time.sleep(2 * options.interval)
    with CheckpointManager(
        run,
        series=[Series("checkpoint", DCP(), keep=KeepLast(1)), Series("hf", export, keep=KeepLast(1))],
    ) as manager:
        state = {"checkpoint": {"model": model, "optimizer": optimizer}, "hf": {"model": model}}
        with sampler.phase(form, "warm up", manager.writer_pid):
            for series in FORMATS[form]:
                manager.warm_up(state[series], series=series)
        with sampler.phase(form, "save", manager.writer_pid):
            for step in range(1, options.saves + 1):
                pending = [manager.save(step, state[series], series=series) for series in FORMATS[form]]
                while not all(save is None or save.done() for save in pending):
                    time.sleep(options.interval / 4)
                manager.poll()
    with sampler.phase(form, "after"):
        time.sleep(2 * options.interval)


# -- what is reported -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most that one rank took while it saved in one format, and what its state is, in bytes."""

    format: str
    rank: int
    state: int
    before: int
    trainer_rss: int
    trainer_pss: int
    writer_pss: int
    shared: int
    total: int
    device: int
    after: int

    @property
    def relative(self) -> float:
        """How much was added at the peak, as a multiple of the state."""
        return (self.total - self.before) / self.state


def peaks(samples: Sequence[Sample], states: Mapping[int, Mapping[str, int]]) -> list[Peak]:
    """One for each rank and format."""
    found = []
    for form in dict.fromkeys(sample.format for sample in samples):
        for rank, state in states.items():
            mine = [sample for sample in samples if (sample.format, sample.rank) == (form, rank)]
            before = [sample for sample in mine if sample.phase == "before"]
            busy = [sample for sample in mine if sample.phase in ("warm up", "save")]
            after = [sample for sample in mine if sample.phase == "after"]
            found.append(
                Peak(
                    format=form,
                    rank=rank,
                    state=state[form],
                    before=before[-1].total,
                    trainer_rss=max(sample.trainer_rss for sample in busy),
                    trainer_pss=max(sample.trainer_pss for sample in busy),
                    writer_pss=max(sample.writer_pss for sample in busy),
                    shared=max(sample.shared for sample in busy),
                    total=max(sample.total for sample in busy),
                    device=max(sample.device for sample in busy) - before[-1].device,
                    after=after[-1].total,
                )
            )
    return found


def table(found: Sequence[Peak]) -> str:
    """The peaks, the rank that takes most for each format, in MB."""
    columns = ("before", "trainer_rss", "trainer_pss", "writer_pss", "shared", "total", "device", "after")
    rows = [("format", "rank", "state", *(name.replace("_", " ") for name in columns), "added at the peak")]
    for form in dict.fromkeys(peak.format for peak in found):
        worst = max((peak for peak in found if peak.format == form), key=lambda peak: peak.relative)
        amounts = (f"{getattr(worst, name) / 1e6:.1f}" for name in ("state", *columns))
        added = f"{(worst.total - worst.before) / 1e6:.1f} = {worst.relative:.2f} x state"
        rows.append((form, str(worst.rank), *amounts, added))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    """Every sample, in the order of time."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Sample)])
        writer.writerows(dataclasses.astuple(sample) for sample in sorted(samples, key=lambda sample: sample.at_s))


def run(options: argparse.Namespace) -> int:
    """Measure on every rank, report on rank 0; returns the exit status, the same on every rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    model, optimizer = build(options, device)
    states = state_bytes(model, optimizer, options)
    with Sampler(rank, options.interval) as sampler:
        for form in options.formats:
            measure(form, model, optimizer, sampler, options)
    gathered: list[Any] = [(rank, states, sampler.samples)]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (rank, states, sampler.samples))
    found = peaks([s for _, _, samples in gathered for s in samples], {one: about for one, about, _ in gathered})
    if rank == 0:
        write_csv(options.into / "memory.csv", [sample for _, _, samples in gathered for sample in samples])
        print(f"MB; of {len(gathered)} ranks the one that takes most; samples are in {options.into / 'memory.csv'}")
        print(table(found))
        for form in options.formats if not options.keep else ():
            shutil.rmtree(options.into / form)
            for left in options.into.glob(f"{form}.journal.*"):
                left.unlink()
    above = [peak for peak in found if options.limit is not None and peak.relative > options.limit]
    if above and rank == 0:
        print(f"above {options.limit:g} x state: {', '.join(sorted({peak.format for peak in above}))}")
    return ABOVE_LIMIT if above else MEASURED


def dtype(text: str) -> torch.dtype:
    """The argparse type of a dtype."""
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise argparse.ArgumentTypeError(f"torch has no dtype {text!r}")
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("into", type=Path, help="a new or empty directory that all ranks share")
    parser.add_argument("--model", type=Path, required=True, help="a model directory; weights need not be there")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--saves", type=int, default=3, help="saves per format (default: 3)")
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between samples (default: 0.1)")
    parser.add_argument("--dtype", type=dtype, default=torch.float32, help="of the weights in training")
    parser.add_argument("--export-dtype", type=dtype, help="of the exports; as in training if not given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, help="exit with 1 if a format's peak is above so many times the state")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints that were written")
    options = parser.parse_args(arguments)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")
    try:
        options.into.mkdir(parents=True, exist_ok=True)
        if not Path("/proc/self/smaps_rollup").exists():
            raise MeasurementFailed("this system has no /proc/PID/smaps_rollup")
        return run(options)
    except (MeasurementFailed, CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return IMPOSSIBLE
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: Gloo's threads may abort an interpreter that is being taken down (pytorch/pytorch issue 190489).
    os._exit(status)
