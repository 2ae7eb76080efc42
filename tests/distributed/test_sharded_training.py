"""A model under FSDP2 is saved on some ranks, resumed on others, loaded with plain PyTorch, and exported."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_processes import Here, on_ranks, run_on_ranks
from safetensors import safe_open
from saving_ranks import manager_on, rows
from tiny_models import mixture_of_experts, same, sharded, train_step, whole, whole_state

from ckptmgr import DCP, CheckpointState, HuggingFace, PerRank, RandomState, Series, UnsafeResume
from ckptmgr.errors import RanksDisagree
from ckptmgr.journal import Journal

SHARD_BYTES = 6_000


def _series() -> list[Series]:
    return [
        Series("checkpoint", DCP()),
        Series("hf", HuggingFace()),
        Series("small", HuggingFace(max_shard_size=SHARD_BYTES)),
        Series("half", HuggingFace(max_shard_size="10KB", dtype=torch.bfloat16)),
    ]


def _model(here: Here, seed: int) -> Any:
    model = mixture_of_experts(seed)
    return sharded(model) if here.world_size > 1 else model


def _trainer(here: Here, seed: int) -> dict[str, Any]:
    model = _model(here, seed)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01), "step": 0}


def _train_and_save(here: Here) -> list[float]:
    state = _trainer(here, 0)
    for step in range(3):
        train_step(state["model"], state["optimizer"], step)
    state["step"] = 2
    reference = {"model": whole_state(state["model"]), "optimizer": whole_state(state["optimizer"])}
    with manager_on(here, series=_series()) as manager:
        torch.manual_seed(100 + here.rank)
        own = {
            "rng": PerRank(RandomState(), when_resized="skip"),
            "loader": PerRank(1000 + here.rank, when_resized="skip"),
        }
        pendings = [manager.save(2, {**state, **own})]
        drawn = torch.rand(3).tolist()
        pendings += [manager.save(2, {"model": state["model"]}, name) for name in ("hf", "small", "half")]
        # Training goes on while the writers write; nothing of it may get into the files.
        going_on = [train_step(state["model"], state["optimizer"], step) for step in (3, 4)]
        for pending in pendings:
            assert pending is not None
            pending.wait()
            assert pending.state is CheckpointState.COMMITTED
    if here.is_leader:
        torch.save(reference, here.tmp_path / "reference.pt")
    return [*going_on, *drawn]


def _reference(here: Here) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = torch.load(here.tmp_path / "reference.pt")
    return found


def _resume_and_train(here: Here) -> list[float]:
    state = _trainer(here, 1 + here.world_size)
    own = {"rng": PerRank(RandomState(), when_resized="skip"), "loader": PerRank(None, when_resized="skip")}
    with manager_on(here, series=_series()) as manager:
        target = {**state, **own}
        resumed = manager.resume(target)
        assert resumed is not None
        assert (resumed.step, resumed.world_size, target["step"]) == (2, 2, 2)
    reference = _reference(here)
    assert same(reference["model"], whole_state(state["model"]))
    assert same(reference["optimizer"], whole_state(state["optimizer"]))
    assert own["loader"].value == (1000 + here.rank if here.world_size == 2 else None)
    drawn = torch.rand(3).tolist()
    return [*(train_step(state["model"], state["optimizer"], step) for step in (3, 4)), *drawn]


def _load_with_plain_pytorch(here: Here) -> None:
    directory = here.run_dir / "checkpoint" / "step-2"
    reference = _reference(here)
    # By hand, into tensors of the whole shapes …
    plain: dict[str, Any] = {f"model.{name}": torch.zeros_like(t) for name, t in reference["model"].items()}
    dcp.load(plain, checkpoint_id=directory, no_dist=here.world_size == 1)
    assert same({name.removeprefix("model."): tensor for name, tensor in plain.items()}, reference["model"])
    # … and into a model that is sharded over this world.
    model = _model(here, 7)
    target = {"model": model.state_dict()}
    dcp.load(target, checkpoint_id=directory, no_dist=here.world_size == 1)
    model.load_state_dict(target["model"])
    assert same(whole_state(model), reference["model"])


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        found: dict[str, Any] = json.loads(stream.read(length))
        end = max(entry["data_offsets"][1] for name, entry in found.items() if name != "__metadata__")
        assert stream.seek(0, 2) == 8 + length + end, "bytes that belong to no tensor"
    return found


def _exported(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an export; checks all that from_pretrained and others rely on."""
    files = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    found: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        assert _header(file)["__metadata__"]["format"] == "pt"
        if len(files) > 1:
            assert file.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                assert name not in found
                found[name] = opened.get_tensor(name)
                places[name] = file.name
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        assert not index.exists()
    else:
        body = json.loads(index.read_text())
        assert body["weight_map"] == places
        assert body["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    return found


def _check_exports(tmp_path: Path) -> None:
    from transformers import Qwen3MoeForCausalLM

    run = tmp_path / "run"
    reference = torch.load(tmp_path / "reference.pt")["model"]
    model = mixture_of_experts(0)
    model.load_state_dict(reference)
    model.save_pretrained(tmp_path / "theirs")
    theirs = _exported(tmp_path / "theirs")
    assert same(_exported(run / "hf" / "hf-2"), theirs)
    assert same(_exported(run / "small" / "hf-2"), theirs)
    assert same(_exported(run / "half" / "hf-2"), {name: tensor.bfloat16() for name, tensor in theirs.items()})
    small = list((run / "small" / "hf-2").glob("model-*.safetensors"))
    assert len(small) > 4
    assert len(list((run / "half" / "hf-2").glob("model-*.safetensors"))) > 1
    for name in ("hf", "small"):
        loaded = Qwen3MoeForCausalLM.from_pretrained(run / name / "hf-latest")
        assert same(whole_state(loaded), reference)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    config = json.loads((run / "half" / "hf-2" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]


@pytest.mark.slow
def test_two_ranks_save_and_one_two_and_four_resume_and_plain_pytorch_loads_and_exports_conform(tmp_path: Path) -> None:
    saved = run_on_ranks(2, _train_and_save, tmp_path)
    _check_exports(tmp_path)
    again = run_on_ranks(2, _resume_and_train, tmp_path)
    assert again == saved, "training on the same ranks does not go on bit for bit, per-rank generators included"
    for world_size in (1, 4):
        went_on = run_on_ranks(world_size, _resume_and_train, tmp_path)
        assert went_on[0][:2] == pytest.approx(saved[0][:2], rel=1e-4)
        run_on_ranks(world_size, _load_with_plain_pytorch, tmp_path)
    with Journal.open_read_only(tmp_path / "run.journal.db") as journal:
        entries = {entry.path: entry for entry in journal.files(journal.find("checkpoint", 2).id)}
    assert {entry.rank for entry in entries.values()} == {0, 1}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "per-rank-0.pt", "per-rank-1.pt"} <= entries.keys()


def _save_refusing(here: Here) -> None:
    with manager_on(here) as manager:
        state = {"t": torch.zeros(4), "loader": PerRank({"at": here.rank}), "none": PerRank(here.rank)}
        pending = manager.save(1, state)
        assert pending is not None
        pending.wait()


def _resume_refused(here: Here) -> str:
    with manager_on(here) as manager:
        with pytest.raises(UnsafeResume) as caught:
            manager.resume({"t": torch.ones(4), "loader": PerRank(None), "none": PerRank(None, when_resized="skip")}, 1)
        # What does not fit may be skipped, or not asked for; the rest is fine.
        state = {"t": torch.ones(4), "loader": PerRank("untouched", when_resized="skip")}
        assert manager.resume(state, 1) is not None
        assert (state["loader"].value, state["t"].sum().item()) == ("untouched", 0)
        assert manager.resume({"t": torch.ones(4)}, 1) is not None
        pending = manager.save(10 + here.world_size, {"t": torch.ones(4), "loader": PerRank({"at": here.rank})})
        assert pending is not None
        pending.wait()
    assert [finding.id for finding in caught.value.report.all_findings if finding.level == "error"] == ["R006"]
    return str(caught.value)


def _resume_own(here: Here) -> None:
    with manager_on(here) as manager:
        state = {"loader": PerRank(None), "none": PerRank(None)}
        assert manager.resume(state, step=1) is not None
        assert (state["loader"].value, state["none"].value) == ({"at": here.rank}, here.rank)


def test_per_rank_state_goes_back_to_its_rank_or_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_on_ranks(2, _save_refusing, tmp_path)
    run_on_ranks(2, _resume_own, tmp_path)
    for world_size in (3, 1):
        texts = run_on_ranks(world_size, _resume_refused, tmp_path)
        assert len(set(texts)) == 1, "every rank must be told the same"


def _exchanged_bytes() -> int:
    """What has gone over this process's TCP connections: bytes_acked and bytes_received of tcp_info."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += sum(struct.unpack_from("<QQ", info, 120))
        except OSError:
            continue
    return total


def _save_big(here: Here) -> list[int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (here.world_size,))
    before = _exchanged_bytes()
    big = {
        "rows": distribute_tensor(torch.ones(1024, 2048), mesh, [Shard(0)]),
        "columns": distribute_tensor(torch.ones(1024, 2048), mesh, [Shard(1)]),
        "plain": torch.ones(1 << 20),
    }
    control = _exchanged_bytes() - before
    with manager_on(here) as manager:
        before = _exchanged_bytes()
        for name in ("checkpoint", "hf"):
            pending = manager.save(1, big, name)
            assert pending is not None
            pending.wait()
        used = _exchanged_bytes() - before
    return [control, used]


def test_saving_moves_no_tensor_bytes_between_ranks(tmp_path: Path) -> None:
    for control, used in run_on_ranks(2, _save_big, tmp_path):
        assert control > 4 << 20, "the measurement sees nothing"
        assert used < 100_000


def _save_alike(here: Here) -> None:
    """Every kind of save that ranks do at once, several steps and series, with the gathered state as the judge."""
    state = _trainer(here, 0)
    with manager_on(here, series=_series(), when_busy="wait") as manager:
        manager.warm_up(state)
        for step in range(4):
            train_step(state["model"], state["optimizer"], step)
            state["step"] = step
            manager.save(step, state)
            if step % 2:
                manager.save(step, {"model": state["model"]}, "hf")
            manager.poll()
    if here.is_leader:
        assert {step: record.state for step, record in rows(here).items() if step < 4} == dict.fromkeys(
            range(4), CheckpointState.COMMITTED
        )
    weights = {name: whole(tensor) for name, tensor in state["model"].state_dict().items()}
    dist.barrier()
    if here.is_leader:
        exported = _exported(here.run_dir / "hf" / "hf-3")
        assert torch.equal(exported["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_checkpoints_and_exports_of_one_run_do_not_mix(tmp_path: Path) -> None:
    run_on_ranks(2, _save_alike, tmp_path)


def _warmed_by_resuming(here: Here, step: int) -> list[int]:
    """The arena of this rank before the first save of a start that resumes, if it can, and after it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (here.world_size,))
    state = {"t": distribute_tensor(torch.ones(5 << 10, 8), mesh, [Shard(0)]), "same": torch.ones(7 << 10), "n": step}
    with manager_on(here) as manager:
        manager.resume(state)
        arena = manager._captures["checkpoint"].arena
        before = arena.size
        pending = manager.save(step, state)
        assert pending is not None
        pending.wait()
        return [before, arena.size, arena.generation]


def test_every_rank_makes_memory_for_its_own_part_after_resuming(tmp_path: Path) -> None:
    """As much as it took where the number of ranks is the same, else its share."""
    first = run_on_ranks(2, _warmed_by_resuming, tmp_path, step=1)
    assert [before for before, _, _ in first] == [0, 0]
    sizes = [after for _, after, _ in first]
    assert sizes[0] != sizes[1]
    again = run_on_ranks(2, _warmed_by_resuming, tmp_path, step=2)
    assert again == [[size, size, 1] for size in sizes]
    ((alone, _, _),) = run_on_ranks(1, _warmed_by_resuming, tmp_path, distributed=True, step=3)
    assert alone == sum(sizes)


def _together(here: Here) -> None:
    """Shards of every kind, a tensor that both have, and one that only a rank has; saved twice, in files of 8 MB."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (here.world_size,))
    series = [Series("checkpoint", DCP()), Series("hf", HuggingFace(max_shard_size=8_000_000))]
    with manager_on(here, series=series) as manager:
        for step in (1, 2):
            full = torch.arange(2_400_000.0).view(1000, 2400) * step
            state = {
                "rows": distribute_tensor(full, mesh, [Shard(0)]),
                "columns": distribute_tensor(full, mesh, [Shard(1)]),
                "same": torch.arange(1_500_000.0) * step,
                f"expert{here.rank}": torch.arange(5000.0) * (here.rank + step),
            }
            for pending in manager.save_together(step, {"checkpoint": state, "hf": dict(state)}).values():
                assert pending is not None
                pending.wait()
            if here.is_leader:
                found = _exported(here.run_dir / "hf" / f"hf-{step}")
                assert torch.equal(found["rows"], full)
                assert torch.equal(found["columns"], full)
                assert torch.equal(found["same"], torch.arange(1_500_000.0) * step)
                for rank in range(here.world_size):
                    assert torch.equal(found[f"expert{rank}"], torch.arange(5000.0) * (rank + step))
        # What only one of them writes for both of them may be another's for the other series.
        assert manager._captures["hf"].arena.size < 4 * 1_500_000 + 65_536
        manager.resume(state, 1)
        assert torch.equal(state["same"], torch.arange(1_500_000.0))
        order = ["checkpoint", "hf"] if here.is_leader else ["hf"]
        with pytest.raises(RanksDisagree):
            manager.save_together(3, dict.fromkeys(order, state))


def test_every_rank_exports_from_what_its_checkpoint_captured(tmp_path: Path) -> None:
    run_on_ranks(2, _together, tmp_path)


@on_ranks(1, distributed=True)
def test_a_process_group_of_one_rank_is_one_rank(here: Here) -> None:
    model, other = sharded(mixture_of_experts(0)), sharded(mixture_of_experts(1))
    with manager_on(here) as manager:
        for name in ("checkpoint", "hf"):
            pending = manager.save(
                1, {"model": model, "own": PerRank(5)} if name == "checkpoint" else {"model": model}, name
            )
            assert pending is not None
            pending.wait()
        state = {"model": other, "own": PerRank(0)}
        assert manager.resume(state) is not None
        assert state["own"].value == 5
    assert same(whole_state(model), whole_state(other))
    assert "model.embed_tokens.weight" in _exported(here.run_dir / "hf" / "hf-1")
