"""
Directories as other libraries leave them, with two checkpoints each.

Made by the libraries where the tests have them: torch (archives, `torch.distributed.checkpoint`), transformers and
safetensors (models). The rest is put together by hand, with real archives, from what their sources say; each layout
in `ckptmgr.foreign` names its source.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from ckptmgr.lifecycle import Format
from ckptmgr.manifest import MANIFEST_NAME, Digest, FileEntry, Manifest

Weights = Mapping[str, torch.Tensor]
WEIGHTS = {"layer.weight": torch.arange(12.0).reshape(3, 4), "layer.bias": torch.ones(3)}


def torch_save(path: Path, value: Any = None) -> None:
    """A real archive, in a directory that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state": torch.arange(50.0), "more": "x" * 300} if value is None else value, path)


def text(path: Path, content: Any) -> None:
    """A text file, or JSON of what is no text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))


def dcp_save(path: Path) -> None:
    """A real DCP directory."""
    state = {
        "model": dict(WEIGHTS),
        "optimizer": {"step": torch.tensor(3.0), "groups": [1, 2]},
        "train_state": {"n": 1},
    }
    with warnings.catch_warnings(action="ignore"):
        dcp.save(state, checkpoint_id=path, no_dist=True)


def shards(path: Path, *, index: bool = True) -> None:
    """A model in two shards, as `save_pretrained` names them; real safetensors."""
    path.mkdir(parents=True, exist_ok=True)
    places = {name: f"model-{number:05}-of-00002.safetensors" for number, name in enumerate(WEIGHTS, 1)}
    for name, file in places.items():
        save_file({name: WEIGHTS[name]}, path / file, metadata={"format": "pt"})
    text(path / "config.json", {"model_type": "llama"})
    text(path / "tokenizer.json", {"model": {"vocab": {"a": 1}}})
    if index:
        text(path / "model.safetensors.index.json", {"metadata": {"total_size": 60}, "weight_map": places})


def xtuner(at: Path) -> None:
    for step in (5, 10):
        checkpoint = at / "20260801120000" / "checkpoints" / f"ckpt-step-{step}"
        dcp_save(checkpoint / "weights")
        torch_save(checkpoint / "dataloader")
        torch_save(checkpoint / "lr_scheduler")
        text(checkpoint / "train_state.json", {"cur_step": step, "cur_epoch": 0})
        text(checkpoint / "trainer_config.json", {"lr": 1e-4})
        (checkpoint / "trainer_config.bin").write_bytes(pickle.dumps({"lr": 1e-4, "why": "x" * 50}))
    text(
        at / ".xtuner",
        {
            "exps": [
                {
                    "exp_dir": "/somewhere/else/20260801120000",
                    "checkpoint_list": [f"/somewhere/else/20260801120000/checkpoints/ckpt-step-{n}" for n in (5, 10)],
                    "snap_checkpoint_list": [],
                    "hf_checkpoint_list": [],
                }
            ]
        },
    )


def torchtitan(at: Path) -> None:
    for step in (5, 10):
        dcp_save(at / "checkpoint" / f"step-{step}")


def torch_checkpointing(at: Path) -> None:
    for step in (5, 10):
        checkpoint = at / f"step_{step}"
        for item in ("model", "optim", "step"):
            for rank in range(2):
                torch_save(checkpoint / f"{item}_{rank}.pt")
        described = {"nested_path_to_metadata": {}, "rank_to_layout_info": {0: None, 1: None}}
        body = {"metadata": {"model": described}, "world_size": 2, "version": "2.0"}
        (checkpoint / "metadata.pkl").write_bytes(pickle.dumps(body))


def hf_trainer(at: Path) -> None:
    for step in (5, 10):
        checkpoint = at / f"checkpoint-{step}"
        shards(checkpoint)
        for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth", "rng_state_1.pth"):
            torch_save(checkpoint / name)
        text(checkpoint / "trainer_state.json", {"global_step": step, "log_history": [{"loss": float("nan")}]})


def lightning(at: Path) -> None:
    for step in (5, 10):
        torch_save(at / "lightning_logs" / "version_0" / "checkpoints" / f"epoch=0-step={step}.ckpt")


def deepspeed(at: Path) -> None:
    for step in (5, 10):
        checkpoint = at / f"global_step{step}"
        torch_save(checkpoint / "mp_rank_00_model_states.pt")
        for rank in range(2):
            torch_save(checkpoint / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    text(at / "latest", "global_step10")
    text(at / "zero_to_fp32.py", "#!/usr/bin/env python")


def megatron(at: Path) -> None:
    for step in (5, 10):
        checkpoint = at / f"iter_{step:07}"
        dcp_save(checkpoint)
        torch_save(checkpoint / "common.pt")
        text(checkpoint / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    text(at / "latest_checkpointed_iteration.txt", "10")


def megatron_ranks(at: Path) -> None:
    for step in (5, 10):
        for tensor in range(2):
            for pipeline in range(2):
                rank = at / f"iter_{step:07}" / f"mp_rank_{tensor:02}_{pipeline:03}"
                torch_save(rank / "model_optim_rng.pt")
                torch_save(rank / "distrib_optim.pt")
    text(at / "latest_checkpointed_iteration.txt", "10")


def ocdbt_description(magic: int, body: bytes) -> bytes:
    """A description of OCDBT, uncompressed: its header, what it says, and its checksum."""
    data = struct.pack(">I", magic) + struct.pack("<Q", 18 + len(body)) + b"\0\0" + body
    return data + struct.pack("<I", crc32c(data))


def crc32c(data: bytes) -> int:
    """CRC-32C, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def ocdbt_files(names: list[tuple[str, str]]) -> bytes:
    """The table of data files; each in the directory that what it names is relative to."""
    paths = [(base + name).encode() for base, name in names]
    bases = bytes(len(base) for base, _ in names)
    return bytes([len(paths), *[0] * (len(paths) - 1), *map(len, paths)]) + bases + b"".join(paths)


def ocdbt_database(item: Path, values: Mapping[str, int]) -> None:
    """A manifest, an inner node, a leaf that needs the last bytes of *values*, and one value that stands in it."""
    number = len(values)
    leaf = bytes([0]) + ocdbt_files([("", name) for name in values])
    leaf += bytes([number + 1, *[0] * number, *[1] * (number + 1)]) + b"abcdefgh"[: number + 1]
    leaf += bytes([*[10] * number, 3, *[1] * number, 0, *range(number)])
    leaf += b"".join(bytes([(end - 10) & 127 | 128, end - 10 >> 7]) for end in values.values()) + b"abc"
    below = ocdbt_description(0x0CDB20DE, leaf)
    inner = bytes([1]) + ocdbt_files([("", "d/0e4e22eb")]) + bytes([1, 1, 0]) + b"a"
    inner += bytes([0, 7, len(below) & 127 | 128, len(below) >> 7, 1, 0, 0])
    root = ocdbt_description(0x0CDB20DE, inner)
    (item / "d").mkdir(parents=True, exist_ok=True)
    (item / "d" / "0e4e22eb").write_bytes(b"x" * 7 + below + root)
    at = 7 + len(below)
    versions = bytes(16) + bytes([0, 0, 0, 4, 0]) + ocdbt_files([("", "d/0e4e22eb")])
    versions += bytes([1, 1, 1, 0, at & 127 | 128, at >> 7, len(root), 1, 0, 0]) + bytes(8) + b"\0"
    (item / "manifest.ocdbt").write_bytes(ocdbt_description(0x0CDB3A2A, versions))


def ocdbt_manifest(path: Path) -> None:
    """A manifest's magic number and length, and something behind them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = b"x" * 60
    path.write_bytes(struct.pack(">I", 0x0CDB3A2A) + struct.pack("<Q", 12 + len(body)) + body)


def orbax(at: Path) -> None:
    for step in (5, 10):
        checkpoint = at / str(step)
        item = checkpoint / "default"
        ocdbt_database(item, {f"ocdbt.process_{process}/d/d2129b27": 100 for process in range(2)})
        for process in range(2):
            ocdbt_manifest(item / f"ocdbt.process_{process}" / "manifest.ocdbt")
            text(item / f"ocdbt.process_{process}" / "d" / "d2129b27", "x" * 100)
            text(item / "array_metadatas" / f"process_{process}", {"array_metadatas": []})
        text(item / "_METADATA", {"tree_metadata": {}, "use_ocdbt": True})
        text(item / "_sharding", {})
        about = {"item_handlers": {"default": "x.StandardCheckpointHandler"}, "init_timestamp_nsecs": 1}
        text(checkpoint / "_CHECKPOINT_METADATA", {**about, "commit_timestamp_nsecs": 1795783573596926463})


def models(at: Path) -> None:
    for step in (5, 10):
        shards(at / f"export-{step}")


def copied(at: Path) -> None:
    for step in (5, 10):
        files = {"model.bin": b"weights" * 100, "per-rank-0.pt": b"loader" * 20, "optim/rank-0.bin": b"moments" * 50}
        checkpoint = at / f"step-{step}"
        for name, data in files.items():
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).write_bytes(data)
        entries = tuple(FileEntry(name, len(data), Digest(data).text, 0) for name, data in files.items())
        manifest = Manifest(
            run_id="0" * 32, series="checkpoint", step=step, attempt=step, epoch=1, format=Format.DCP, world_size=2,
            created_at=1.0, files=entries, per_rank=("loader",),
        )  # fmt: skip
        text(checkpoint / MANIFEST_NAME, manifest.to_json())


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to make one, what it is called, and where its two checkpoints are."""

    make: Callable[[Path], None]
    name: str
    newest: str
    older: str
    #: Files of which nothing tells that they are cut short, or empty, or gone, by the beginning of their paths.
    unseen: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    series: str = "checkpoint"


_EXPERIMENT = "20260801120000/checkpoints/ckpt-step"
_VERSION = "lightning_logs/version_0/checkpoints/epoch=0-step"
_STEP = ("step-10", "step-5")
LAYOUTS = {
    "xtuner": Layout(
        xtuner, "xtuner", f"{_EXPERIMENT}-10", f"{_EXPERIMENT}-5",
        {"gone": ("dataloader", "lr_scheduler", "trainer_config")},
    ),
    "torchtitan": Layout(torchtitan, "DCP", "checkpoint/step-10", "checkpoint/step-5"),
    "torch_checkpointing": Layout(
        torch_checkpointing, "torch_checkpointing", "step_10", "step_5", {"gone": ("metadata.pkl",)}
    ),
    "hf_trainer": Layout(
        hf_trainer, "Hugging Face Trainer", "checkpoint-10", "checkpoint-5",
        {"gone": ("training_args.bin", "rng_state_1.pth", "config.json", "tokenizer.json")},
    ),
    "lightning": Layout(lightning, "Lightning", f"{_VERSION}=10.ckpt", f"{_VERSION}=5.ckpt", {"gone": ("",)}),
    "deepspeed": Layout(
        deepspeed, "DeepSpeed", "global_step10", "global_step5",
        {"gone": ("bf16_zero_pp_rank_1",)},
    ),
    "megatron": Layout(megatron, "Megatron", "iter_0000010", "iter_0000005"),
    "megatron_ranks": Layout(megatron_ranks, "Megatron", "iter_0000010", "iter_0000005"),
    "orbax": Layout(
        orbax, "Orbax", "10", "5",
        {
            "gone": ("default/_sharding", "default/array_metadatas/"),
        },
    ),
    "models": Layout(
        models, "Hugging Face model", "export-10", "export-5", {"gone": ("tokenizer.json",)}, series="hf"
    ),
    "copied": Layout(copied, "ckptmgr without a journal", *_STEP),
}  # fmt: skip
