#!/usr/bin/env python3
"""
A small but real training job that saves with ckptmgr; `demo.py` starts, kills and compares it.

A mixture-of-experts language model of Qwen3's shape learns the source code of Python's standard
library, byte by byte. Each rank is one process; several shard the model with FSDP2 over Gloo:

    RANK=0 WORLD_SIZE=2 tools/demo/train.py runs/mine --rendezvous /tmp/mine --report mine.jsonl &
    RANK=1 WORLD_SIZE=2 tools/demo/train.py runs/mine --rendezvous /tmp/mine --report mine.jsonl

`train` is the part to read: everything about checkpoints is in it. The rest is model, data, and
writing down what `demo.py` compares: losses, and hashes of the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import json
import logging
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from ckptmgr import DCP, CheckpointManager, HuggingFace, KeepLast, PerRank, RandomState, Series

SEED = 20


def train(options: argparse.Namespace, report: Report) -> None:
    """Train until step ``options.steps``, from the newest committed checkpoint if there is one."""
    model = sharded_model(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.steps)
    loader = ByteLoader(standard_library(), options.batch, options.length, seed=SEED + rank())
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "data": PerRank(loader, when_resized="skip"),
        "random": PerRank(RandomState(), when_resized="skip"),
    }
    with CheckpointManager(
        options.run,
        series=[
            Series("checkpoint", DCP(), keep=KeepLast(2)),
            Series("hf", HuggingFace(max_shard_size="20MB"), keep=KeepLast(2)),
        ],
    ) as manager:
        resumed = manager.resume(state)
        manager.warm_up(state)
        manager.warm_up({"model": model}, series="hf")
        # Or Python's garbage collector visits all of torch now and then, which takes longer than any capture.
        gc.freeze()
        report.write("start", step=resumed.step if resumed else 0, **facts(model), **hashes(model, optimizer))
        for step in range(resumed.step + 1 if resumed else 1, options.steps + 1):
            loss = model(**loader.batch()).loss
            loss.backward()
            with manager.updating():
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            report.write("step", step=step, loss=mean(loss).hex())
            if step % options.save_every == 0:
                report.write("hash", step=step, **hashes(model, optimizer))
                with report.timed("save", step=step, series="checkpoint"):
                    manager.save(step, state)
            if step % options.export_every == 0:
                with report.timed("save", step=step, series="hf"):
                    manager.save(step, {"model": model}, series="hf")
                remember_logits(model, options.logits / f"logits-{step}.pt")
            manager.poll()
    # Leaving the block has waited for what was in flight, and has raised if any of it failed.
    report.write("end", step=options.steps, **hashes(model, optimizer))


def sharded_model(options: argparse.Namespace) -> Qwen3MoeForCausalLM:
    """The same random weights on every rank, then each rank's share of them."""
    torch.manual_seed(SEED)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=options.hidden,
            intermediate_size=2 * options.hidden,
            moe_intermediate_size=options.expert_width,
            num_hidden_layers=options.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=options.hidden // 4,
            num_experts=options.experts,
            num_experts_per_tok=2,
            max_position_embeddings=options.length,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    if world_size() > 1:
        mesh = init_device_mesh("cpu", (world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


class ByteLoader:
    """
    Random windows of a text, as bytes. Its state is where its random generator is.

    Args:
        text: The text.
        batch: Windows per batch.
        length: Bytes per window.
        seed: Different on every rank, so that no two read the same windows.
    """

    def __init__(self, text: torch.Tensor, batch: int, length: int, *, seed: int) -> None:
        self._text = text
        self._batch = batch
        self._length = length
        self._random = torch.Generator().manual_seed(seed)

    def batch(self) -> dict[str, torch.Tensor]:
        """The next batch, as keyword arguments of the model."""
        starts = torch.randint(len(self._text) - self._length, (self._batch,), generator=self._random)
        windows = torch.stack([self._text[start : start + self._length] for start in starts.tolist()]).long()
        return {"input_ids": windows, "labels": windows}

    def state_dict(self) -> dict[str, Any]:
        """What must be stored to go on with the next batch."""
        return {"random": self._random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where *state* was taken."""
        self._random.set_state(state["random"])


@functools.cache
def standard_library() -> torch.Tensor:
    """The bytes of the standard library's top-level modules, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    return torch.frombuffer(
        bytearray(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))), dtype=torch.uint8
    )


# -- what demo.py compares --------------------------------------------------------------------------


def hashes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """SHA-256 of all weights, and of all that AdamW remembers, whole as on one rank. All ranks must call."""
    weights = model.state_dict()
    moments = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in sorted(optimizer.state[parameter].items())
    }
    return {"weights": digest(weights), "optimizer": digest(moments)}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        sha.update(f"{name} {whole.dtype} {list(whole.shape)}".encode())
        sha.update(whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def facts(model: torch.nn.Module) -> dict[str, int]:
    """How big the model is: parameters, and bytes of weights."""
    sizes = [parameter.numel() * parameter.itemsize for parameter in model.parameters()]
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "weight_bytes": sum(sizes)}


def mean(loss: torch.Tensor) -> float:
    """The mean over all ranks. All ranks must call."""
    total = loss.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total.item() / world_size()


def remember_logits(model: Qwen3MoeForCausalLM, path: Path) -> None:
    """Keep what the model answers to a fixed text now, for a comparison with its export. All ranks must call."""
    tokens = standard_library()[:64].long().unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    if rank() == 0:
        torch.save({"input_ids": tokens, "logits": logits}, path)


class Report:
    """What happened, one JSON object per line. Rank 0 writes it; on other ranks nothing happens."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1) if rank() == 0 else None

    def write(self, event: str, **about: Any) -> None:
        """Add one line."""
        if self._file is not None:
            self._file.write(json.dumps({"event": event, **about}) + "\n")

    @contextlib.contextmanager
    def timed(self, event: str, **about: Any) -> Iterator[None]:
        """Add one line that says for how long the block held up the training thread."""
        started = time.perf_counter()
        yield
        self.write(event, **about, stall_s=time.perf_counter() - started)


def rank() -> int:
    """This process's rank."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--report", type=Path, required=True, help="where rank 0 writes down what happened")
    parser.add_argument("--logits", type=Path, default=Path(), help="the directory for logits to compare exports with")
    parser.add_argument("--rendezvous", type=Path, help="a file that all ranks of one start share; needed for several")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--export-every", type=int, default=20, help="steps between exports")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--expert-width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2, help="windows per rank and step")
    parser.add_argument("--length", type=int, default=128, help="bytes per window")
    options = parser.parse_args()
    logging.basicConfig(level="WARNING", format="%(message)s")
    # One thread each: fast enough, and sums are always taken in the same order.
    torch.set_num_threads(1)
    if world_size() > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{options.rendezvous.resolve()}", rank=rank(), world_size=world_size()
        )
    train(options, Report(options.report))
    if world_size() > 1:
        dist.destroy_process_group()
        # Everything is closed. Gloo's threads may still be giving tensors back, and one that meets an interpreter
        # that is being taken down aborts the process (pytorch/pytorch issue 190489).
        os._exit(0)


if __name__ == "__main__":
    main()
