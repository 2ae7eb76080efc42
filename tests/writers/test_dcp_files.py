"""DCP checkpoints: bytes laid out here, judged by the stock library that others read them with."""

from __future__ import annotations

import gc
import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from one_rank import OneRank, dtypes, random_bits, read, same_bits
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from ckptmgr.errors import CorruptCheckpoint, InvalidArgument, StateMismatch
from ckptmgr.options import WriterOptions
from ckptmgr.writers import archives
from ckptmgr.writers.dcp import DCP, arena_bytes
from ckptmgr.writers.process import WriterProcess
from ckptmgr.writers.state import PerRank

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHAPES = [(), (1,), (3,), (0,), (2, 0, 3), (2, 3), (1, 5, 1, 2)]


@pytest.fixture
def rank():
    rank = OneRank(DCP())
    yield rank
    rank.close()


@pytest.fixture(scope="module")
def process():
    process = WriterProcess(WriterOptions(nice=0))
    yield process
    process.stop(0)


def stock_save(state: dict[str, Any], directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.save(state, checkpoint_id=str(directory), no_dist=True)


def stock_load(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.load(state, checkpoint_id=directory, no_dist=True)
    return state


BITS = (torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_a_dtype_that_pytorch_cannot_plan_is_refused(rank, tmp_path, dtype):
    with pytest.raises(InvalidArgument):
        rank.save({"a": random_bits(dtype, (3,))}, tmp_path)


@pytest.mark.parametrize("dtype", list(dtypes(without=BITS)), ids=str)
def test_every_dtype_and_shape_is_read_back_bit_for_bit(rank, tmp_path, dtype):
    state = {f"{shape}": random_bits(dtype, shape, seed=len(shape)) for shape in SHAPES}
    rank.save(state, tmp_path)
    # By the stock library, by torch.load of the piece alone, and by ours.
    there = stock_load({name: torch.empty_like(tensor) for name, tensor in state.items()}, tmp_path)
    ours: dict[str, Any] = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    read(tmp_path, ours)
    metadata = FileSystemReader(tmp_path).read_metadata()
    data = (tmp_path / "__0_0.distcp").read_bytes()
    for index, info in metadata.storage_data.items():
        piece = io.BytesIO(data[info.offset : info.offset + info.length])
        alone = torch.load(piece, weights_only=True)
        assert same_bits(alone, state[index.fqn])

    assert len(metadata.storage_data) == len(SHAPES)
    assert all(same_bits(there[name], tensor) for name, tensor in state.items())
    assert all(same_bits(ours[name], tensor) for name, tensor in state.items())


def test_archives_are_whole_zip_files_with_their_checksums(rank, tmp_path):
    rank.save({"a": torch.arange(100.0)}, tmp_path)
    metadata = FileSystemReader(tmp_path).read_metadata()
    ((_, info),) = metadata.storage_data.items()
    data = (tmp_path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
        tensor = next(name for name in archive.namelist() if name.endswith("/data/0"))
        where = archive.getinfo(tensor)

    assert {"data.pkl", "0", "version"} <= names
    assert where.compress_type == zipfile.ZIP_STORED
    assert where.file_size == 400


def a_training_state(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2).bfloat16())
    optimizer = torch.optim.AdamW(list(model[0].parameters()), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    for _ in range(2):
        model[1](model[0](torch.randn(3, 4))).sum().backward()
        optimizer.step()
        scheduler.step()
    return {
        "model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 7, "names": ["a", ["b", {"c": 1.5}]],
        "tensor": torch.arange(3), "nested": {"deep": {"tensor": torch.ones(2, 2), 3: "three"}}, "empty": b"",
    }  # fmt: skip


def test_our_metadata_says_what_the_stock_librarys_says_of_the_same_state(rank, tmp_path):
    state = a_training_state()
    rank.save(state, tmp_path / "ours")
    flat = {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in state.items()}
    stock_save(flat, tmp_path / "stock")
    ours = FileSystemReader(tmp_path / "ours").read_metadata()
    theirs = FileSystemReader(tmp_path / "stock").read_metadata()

    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, about in theirs.state_dict_metadata.items():
        mine = ours.state_dict_metadata[name]
        assert type(mine) is type(about)
        if isinstance(about, TensorStorageMetadata):
            assert (mine.size, mine.properties, mine.chunks) == (about.size, about.properties, about.chunks)
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert ours.version == theirs.version


def test_the_stock_library_loads_a_whole_training_state(process, tmp_path):
    rank = OneRank(DCP(), process)
    try:
        state = a_training_state()
        rank.save(state, tmp_path)
    finally:
        rank.close()
    fresh = a_training_state(seed=1)
    target = {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in fresh.items()}
    stock_load(target, tmp_path)

    assert all(same_bits(tensor, target["model"][name]) for name, tensor in state["model"].state_dict().items())
    for number, entry in state["optimizer"].state_dict()["state"].items():
        assert all(same_bits(value, target["optimizer"]["state"][number][key]) for key, value in entry.items())
    assert target["step"] == 7
    assert target["names"] == state["names"]
    assert target["scheduler"] == state["scheduler"].state_dict()


def test_ours_loads_a_whole_training_state_in_place(rank, tmp_path):
    state = a_training_state() | {"loader": PerRank({"at": 3}), "none": None}
    rank.save(state, tmp_path)
    fresh: dict[str, Any] = a_training_state(seed=1) | {"loader": PerRank(None), "none": 1}
    parameters = list(fresh["model"].parameters())
    plain = read(tmp_path, fresh)

    assert all(mine is other for mine, other in zip(parameters, fresh["model"].parameters(), strict=True))
    assert all(same_bits(t, fresh["model"].state_dict()[name]) for name, t in state["model"].state_dict().items())
    assert repr(fresh["optimizer"].state_dict()) == repr(state["optimizer"].state_dict())
    assert fresh["scheduler"].state_dict() == state["scheduler"].state_dict()
    assert fresh["loader"].value == {"at": 3}
    assert plain["step"] == 7
    assert plain["names"] == ["a", ["b", {"c": 1.5}]]
    assert plain["nested"]["deep"][3] == "three"
    assert plain["empty"] == b""
    assert plain["none"] is None
    assert same_bits(plain["tensor"], torch.arange(3))


def test_saving_again_moves_tensor_bytes_and_changed_values(rank, tmp_path):
    weights = torch.zeros(5)
    for step in range(3):
        weights.fill_(step)
        rank.save({"w": weights, "text": "x" * step, "step": step}, tmp_path / str(step))
    for step in range(3):
        target = stock_load({"w": torch.empty(5), "text": "", "step": -1}, tmp_path / str(step))
        assert (target["w"].tolist(), target["text"], target["step"]) == ([float(step)] * 5, "x" * step, step)


def test_a_state_whose_shapes_change_is_laid_out_anew(rank, tmp_path):
    for size in (100, 3, 40):
        rank.save(
            {"w": torch.full((size,), float(size)), "v": torch.ones(size, 2, dtype=torch.int8)}, tmp_path / str(size)
        )
    for size in (100, 3, 40):
        target = stock_load({"w": torch.empty(size), "v": torch.empty(size, 2, dtype=torch.int8)}, tmp_path / str(size))
        assert torch.equal(target["w"], torch.full((size,), float(size)))
        assert torch.equal(target["v"], torch.ones(size, 2, dtype=torch.int8))


def index_of(writers: list[Any], states: list[dict[str, Any]], *, plan: bool) -> bytes:
    """The bytes of ``.metadata``, the states of several ranks being saved."""
    taken = [writer.take(state, rank) for rank, (writer, state) in enumerate(zip(writers, states, strict=True))]
    if plan:
        plans = writers[0].plan_globally([one.local_plan(its) for one, its in zip(writers, taken, strict=True)])
        laid = [one.lay_out(mine, rank) for rank, (one, mine) in enumerate(zip(writers, plans, strict=True))]
        writers[0].accept_layouts([places for _, places in laid])
    reports = [one.small_files(its, rank)[1] for rank, (one, its) in enumerate(zip(writers, taken, strict=True))]
    ((name, data),) = writers[0].conclude(reports)
    assert name == ".metadata"
    return bytes(data)


def test_the_index_changes_with_the_length_of_a_value_of_any_rank_and_with_the_plan():
    def states(text: str, other: str, size: int) -> list[dict[str, Any]]:
        return [{"w": torch.zeros(size), "text": text}, {"v": torch.zeros(1), "other": other, "last": 1}]

    writers = [DCP().writer() for _ in range(2)]
    planned = index_of(writers, states("a", "b", 3), plan=True)
    for text, other, size, plan in [
        ("b", "c", 3, False),
        ("b" * 500, "c", 3, False),
        ("b" * 500, "c" * 500, 3, False),
        ("b", "c" * 500, 3, False),
        ("a", "b", 3, False),
        ("a", "b", 4, True),
    ]:
        found = index_of(writers, states(text, other, size), plan=plan)
        # As whoever has saved nothing before writes it.
        alone = index_of([DCP().writer() for _ in range(2)], states(text, other, size), plan=True)

        assert found == alone
        assert (found == planned) == (len(text) + len(other) + size == 5)


def test_an_index_whose_lengths_are_known_is_not_pickled_anew(rank, tmp_path, monkeypatch):
    rank.save({"w": torch.zeros(2), "text": "a"}, tmp_path / "1")
    monkeypatch.setattr(rank.writer, "_pickled_index", lambda _: pytest.fail("pickled anew"))
    rank.save({"w": torch.ones(2), "text": "b"}, tmp_path / "2")
    target = stock_load({"w": torch.empty(2), "text": ""}, tmp_path / "2")

    assert (target["w"].tolist(), target["text"]) == ([1.0, 1.0], "b")
    assert (tmp_path / "1" / ".metadata").read_bytes() == (tmp_path / "2" / ".metadata").read_bytes()


def test_a_state_without_a_tensor_can_be_saved(rank, tmp_path):
    rank.save({"step": 3}, tmp_path)
    plain = read(tmp_path, {"step": 0})

    assert plain == {"step": 3}
    assert not (tmp_path / "__0_0.distcp").exists()


def test_per_rank_state_alone_can_be_saved(rank, tmp_path):
    rank.save({"loader": PerRank({"at": 1})}, tmp_path)
    holder = PerRank(None)
    read(tmp_path, {"loader": holder})

    assert holder.value == {"at": 1}


def test_what_the_state_asks_for_and_the_checkpoint_lacks_is_named(rank, tmp_path):
    rank.save({"a": torch.zeros(2)}, tmp_path)
    with pytest.raises(StateMismatch, match="b"):
        read(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(StateMismatch, match="loader"):
        read(tmp_path, {"a": torch.zeros(2), "loader": PerRank(1)})


def test_another_shape_is_a_mismatch(rank, tmp_path):
    rank.save({"a": torch.zeros(2, 3)}, tmp_path)
    with pytest.raises(StateMismatch):
        read(tmp_path, {"a": torch.zeros(3, 3)})


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"x": value}
    return value


def test_state_is_nested_as_deep_as_it_can_be_read_back(rank, tmp_path):
    rank.save({"deep": nested(499)}, tmp_path)
    for levels in (500, 5000):
        with pytest.raises(InvalidArgument, match="less nested"):
            rank.save({"deep": nested(levels)}, tmp_path)

    state = {"deep": nested(499)}
    read(tmp_path, state)
    assert state["deep"] == nested(499)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 2).to_sparse(),
        torch.empty(2, device="meta"),
        torch._empty_affine_quantized([2], dtype=torch.qint8),
    ],
    ids=["sparse", "meta", "quantized"],
)
def test_a_tensor_without_dense_data_is_refused(rank, tensor):
    with pytest.raises(InvalidArgument, match="not a dense tensor"):
        rank.writer.take({"a": tensor}, 0)


class Evil:
    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Evil, "ran", True))


@pytest.mark.parametrize(
    "payload",
    [
        lambda: pickle.dumps(Evil()),
        lambda: pickle.dumps({"state_dict_metadata": Evil()}),
        lambda: b"cos\nsystem\n(S'touch evil'\ntR.",
        lambda: b"cbuiltins\neval\n(S'1'\ntR.",
        lambda: b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nS'os'\ntR.",
        lambda: b"ctorch.distributed.checkpoint.filesystem\nos\n.",
        lambda: b"ctorch.distributed.checkpoint.metadata\ndataclass\n.",
        lambda: b"ctorch\nload\n(S'x'\ntR.",
        lambda: b"\x80\x04\x8c\x10torch.serialization\x8c\x04load\x93.",
        lambda: b"\x80\x04\x8c\x2btorch.distributed.checkpoint.filesystem\x8c\x09os.system\x93.",
        lambda: pickle.dumps([1, 2]),
        lambda: b"",
        lambda: b"\x80",
        lambda: os.urandom(64),
    ],
)
def test_a_metadata_file_with_code_in_it_is_refused_and_not_run(rank, tmp_path, payload):
    rank.save({"a": torch.zeros(2)}, tmp_path)
    (tmp_path / ".metadata").write_bytes(payload())
    with pytest.raises(CorruptCheckpoint, match=r"\.metadata"):
        read(tmp_path, {"a": torch.zeros(2)})
    assert not Evil.ran


@pytest.mark.parametrize("name", ["../outside.distcp", "sub/dir.distcp", "/etc/passwd"])
def test_a_metadata_file_that_points_outside_is_refused(rank, tmp_path, name):
    rank.save({"a": torch.zeros(2)}, tmp_path / "step")
    (tmp_path / "outside.distcp").write_bytes((tmp_path / "step" / "__0_0.distcp").read_bytes())
    path = tmp_path / "step" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptCheckpoint, match="names the file"):
        read(tmp_path / "step", {"a": torch.zeros(2)})


@pytest.mark.parametrize("damage", ["truncated", "gone", "nonsense"])
@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_1.distcp", "per-rank-0.pt", ".metadata"])
def test_a_damaged_file_is_a_corrupt_checkpoint(rank, tmp_path, name, damage):
    rank.save({"a": torch.arange(50.0), "step": 1, "loader": PerRank(1)}, tmp_path)
    path = tmp_path / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\x00" * path.stat().st_size)
    expected = (CorruptCheckpoint, StateMismatch) if (name, damage) == ("per-rank-0.pt", "gone") else CorruptCheckpoint
    with pytest.raises(expected):
        read(tmp_path, {"a": torch.zeros(50), "step": 0, "loader": PerRank(0)})


class Flags(dict[str, Any]):
    """A mapping of another type."""


def _states_that_follow_each_other() -> list[dict[str, Any]]:
    parameter = torch.nn.Parameter(torch.zeros(3))
    return [
        {"a": torch.zeros(2), "b": {"c": [torch.zeros(1), 1], 3: "three"}, "loss": [1.0]},
        {"a": torch.ones(2), "b": {"c": [torch.ones(1), 2], 3: "drei"}, "loss": [1.0, 2.0]},
        {"a": torch.ones(2), "b": {"c": [torch.ones(1), 2], "3": "drei"}, "loss": []},
        {"a": torch.ones(2), "b": {"c": [torch.ones(1), [2]], 3: "drei"}, "loss": None},
        {"a": torch.ones(2), "b": Flags(c=[torch.ones(1), {}]), "loss": None},
        {"a": torch.ones(2, dtype=torch.int64), "b": {"c": [1, torch.ones(1)]}, "loss": (torch.ones(1),)},
        {"a": torch.ones(2, 1), "b": {}, "loss": 1},
        {"a": torch.ones(2, 1, dtype=torch.bfloat16), "b": {}, "loss": 1},
        {"b": {}, "a": torch.ones(2, 1), "loss": 2, "rank": PerRank(1)},
        {"a": parameter, "m": torch.nn.Linear(2, 2)},
        {"a": parameter.data, "m": torch.nn.Linear(2, 2).state_dict()},
        {"a": "a", "m": torch.nn.Linear(2, 2)},
        {"n": {"x": torch.zeros(2), "y": torch.ones(2)}, "z": 1},
        {"n": {"y": torch.zeros(2), "x": torch.ones(2)}, "z": 1},
        {"n": {"x": torch.zeros(2), "y": 1}, "z": torch.ones(2)},
        {"n": {"x": torch.zeros(2), "y": torch.ones(2)}, "m": {"x": torch.zeros(2), "y": torch.ones(2)}},
        {"n": {"x": torch.ones(2), "y": torch.zeros(2, 1)}, "m": {"x": torch.zeros(2), "y": torch.ones(2)}},
        {"n": {"x": {"x": torch.zeros(2), "y": torch.ones(2)}, "y": 1}, "m": 2},
        {"n": {"x": torch.zeros(2), "y": torch.ones(2)}, "m": {"x": 1, "y": 2}},
    ]


@pytest.mark.parametrize("first", range(19))
def test_what_is_known_of_one_state_is_never_said_of_another(first):
    """Whatever was saved before, a state is taken as if it were the first."""
    states = _states_that_follow_each_other()
    for second in states:
        writer = DCP().writer()
        writer.take(states[first], 0)
        again, alone = writer.take(second, 0), DCP().writer().take(second, 0)

        assert again.signature == alone.signature
        assert [item.index for item in again.plan.items] == [item.index for item in alone.plan.items]
        assert (again.objects, again.per_rank, again.mappings) == (alone.objects, alone.per_rank, alone.mappings)
        assert again.tensors.keys() == alone.tensors.keys()
        assert all(same_bits(again.tensors[key], tensor) for key, tensor in alone.tensors.items())
        expected = [(name, tensor.data_ptr()) for name, tensor in writer.watched(alone)]
        assert [(name, tensor.data_ptr()) for name, tensor in writer.watched(again)] == expected


def test_looking_at_many_tensors_again_makes_no_objects_for_the_garbage_collector():
    writer = DCP().writer()
    state = {"model": {f"{n}": torch.zeros(2) for n in range(500)}}
    writer.take(state, 0)
    gc.collect()
    gc.disable()
    try:
        before = gc.get_count()[0]
        taken = writer.take(state, 0)
        made = gc.get_count()[0] - before
    finally:
        gc.enable()

    assert len(taken.tensors) == 500
    assert made < 100


def test_a_state_of_the_same_shape_is_not_planned_anew(monkeypatch):
    writer = DCP().writer()
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "step": 1, "losses": [1.0]}
    writer.take(state, 0)
    monkeypatch.setattr(DefaultSavePlanner, "create_local_plan", lambda _: pytest.fail("planned anew"))
    optimizer.step()
    taken = writer.take(state | {"step": 2, "losses": [1.0, 2.0]}, 0)

    assert archives.load(archives.Source(taken.objects[MetadataIndex("step")]), "step") == 2
    assert taken.tensors["model.weight"].data_ptr() == model.weight.data_ptr()


def test_the_next_save_takes_what_this_rank_saved_or_an_even_share_after_resharding():
    files = {"__0_0.distcp": 1000, "__1_0.distcp": 500, "__0_1.distcp": 7, ".metadata": 9}

    assert [arena_bytes(files, rank, world_size=2, same_world=True) for rank in (0, 1)] == [1000, 500]
    assert [arena_bytes(files, rank, world_size=3, same_world=False) for rank in range(3)] == [500, 500, 500]
