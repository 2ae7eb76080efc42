"""``.metadata``, ``mappings.json`` and what they lead to: an error of ours, and nothing allocated or opened before."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_bytes as b
import pytest
import torch
from hostile_ground import state
from hostile_kit import bounded, guarded, refuse, sparse
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from ckptmgr.errors import CheckpointError, CorruptCheckpoint, StateMismatch
from ckptmgr.manifest import MANIFEST_NAME
from ckptmgr.writers import index, loading

SIZE = torch.Size
MODEL = "model.0.weight"
Spoil = Callable[[Metadata], Any]


@pytest.fixture
def step(pristine: Path, tmp_path: Path) -> Path:
    """A committed checkpoint directory, to spoil."""
    return Path(shutil.copytree(pristine / "checkpoint" / "step-2", tmp_path / "step-2"))


def files(directory: Path) -> dict[str, int]:
    """Its files as a manifest would list them now."""
    return {path.name: path.lstat().st_size for path in directory.iterdir() if path.name != MANIFEST_NAME}


def load(directory: Path, listed: dict[str, int] | None = None, **changes: Any) -> Any:
    asked = {**state(seed=1), **changes}
    return loading.read(directory, asked, 0, files=listed or files(directory), same_world=True)


def tensor_of(metadata: Metadata) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata[MODEL]
    assert isinstance(found, TensorStorageMetadata)
    return found


def place_of(metadata: Metadata, fqn: str = MODEL) -> Any:
    return next(place for at, place in metadata.storage_data.items() if at.fqn == fqn)


def put(metadata: Metadata, fqn: str, about: Any, *, path: Any = None, at: Any = None) -> None:
    metadata.state_dict_metadata[fqn] = about
    metadata.planner_data[fqn] = path or tuple(fqn.split("."))
    metadata.storage_data[MetadataIndex(fqn, at)] = copy.copy(place_of(metadata))


def huge(metadata: Metadata) -> None:
    """A tensor that the state does not have, so that memory for it would be allocated."""
    about = copy.deepcopy(tensor_of(metadata))
    about.size, about.chunks = SIZE([1 << 40]), [ChunkStorageMetadata(SIZE([0]), SIZE([1 << 40]))]
    put(metadata, "scheduler.huge", about, at=SIZE([0]))


def set_chunk(metadata: Metadata, offsets: Any, sizes: Any) -> None:
    tensor_of(metadata).chunks[0] = ChunkStorageMetadata(offsets, sizes)


SPOILED: dict[str, Spoil] = {
    # Shapes
    "a tensor that is not there": huge,
    "a whole that is larger": lambda m: setattr(tensor_of(m), "size", SIZE([1 << 40, 4])),
    "a whole that is smaller": lambda m: setattr(tensor_of(m), "size", SIZE([2, 4])),
    "a piece outside": lambda m: set_chunk(m, SIZE([1, 0]), SIZE([3, 4])),
    "a piece far outside": lambda m: set_chunk(m, SIZE([1 << 62, 0]), SIZE([3, 4])),
    "a piece of another number of dimensions": lambda m: set_chunk(m, SIZE([0]), SIZE([12])),
    "a negative piece": lambda m: set_chunk(m, SIZE([0, 0]), SIZE([-3, -4])),
    "a negative offset": lambda m: set_chunk(m, SIZE([-1, 0]), SIZE([3, 4])),
    "no pieces": lambda m: tensor_of(m).chunks.clear(),
    "a piece twice": lambda m: tensor_of(m).chunks.append(tensor_of(m).chunks[0]),
    "a piece ten thousand times": lambda m: tensor_of(m).chunks.extend(tensor_of(m).chunks * 10_000),
    "a piece that is none": lambda m: tensor_of(m).chunks.append(None),
    "a shape of text": lambda m: setattr(tensor_of(m), "size", "34"),
    "a shape that is a tuple": lambda m: setattr(tensor_of(m), "size", (3, 4)),
    "another dtype": lambda m: setattr(tensor_of(m).properties, "dtype", torch.float64),
    "another dtype of the same size": lambda m: setattr(tensor_of(m).properties, "dtype", torch.int32),
    # Places
    "behind the end": lambda m: setattr(place_of(m), "offset", 1 << 40),
    "longer than the file": lambda m: setattr(place_of(m), "length", 1 << 40),
    "a negative place": lambda m: setattr(place_of(m), "offset", -1),
    "a negative length": lambda m: setattr(place_of(m), "length", -1),
    "a place that is a fraction": lambda m: setattr(place_of(m), "offset", 0.0),
    "somebody else's place": lambda m: setattr(place_of(m), "offset", place_of(m, "model.0.bias").offset),
    "outside": lambda m: setattr(place_of(m), "relative_path", "../step-1/__0_0.distcp"),
    "absolute": lambda m: setattr(place_of(m), "relative_path", "/etc/passwd"),
    "the manifest": lambda m: setattr(place_of(m), "relative_path", MANIFEST_NAME),
    "a name that is a number": lambda m: setattr(place_of(m), "relative_path", 1),
    "a name with an end": lambda m: setattr(place_of(m), "relative_path", "__0_0.distcp\0"),
    "another file": lambda m: setattr(place_of(m), "relative_path", "__0_1.distcp"),
    "unpacked by zstd": lambda m: setattr(place_of(m), "transform_descriptors", ["zstd"]),
    "nowhere": lambda m: m.storage_data.clear(),
    "no places": lambda m: setattr(m, "storage_data", None),
    "a list of places": lambda m: setattr(m, "storage_data", [1]),
    "a place that is none": lambda m: m.storage_data.update({MetadataIndex(MODEL, [0, 0]): "x"}),
    "a place of nothing": lambda m: m.storage_data.update({MetadataIndex("x"): place_of(m)}),
    "more places than bytes": lambda m: [put(m, f"x.{n}", BytesStorageMetadata()) for n in range(1000)],
    # Names
    "no entries": lambda m: setattr(m, "state_dict_metadata", None),
    "a list of entries": lambda m: setattr(m, "state_dict_metadata", [MODEL]),
    "an entry that is none": lambda m: m.state_dict_metadata.update({MODEL: 1}),
    "a long list": lambda m: put(m, "scheduler.x", BytesStorageMetadata(), path=("scheduler", "x", 1 << 40)),
    "a list with a text for a place": lambda m: m.planner_data.update({"scheduler.base_lrs": ("scheduler", "x", "y")}),
    "a path into a value": lambda m: put(
        m, "plain.two.x", BytesStorageMetadata(), path=("plain", "tuple", "deeper", "still")
    ),
    "a negative place in a list": lambda m: m.planner_data.update({MODEL: ("model", -1)}),
    "a path of nothing": lambda m: m.planner_data.update({MODEL: ()}),
    "a path that is a number": lambda m: m.planner_data.update({MODEL: 5}),
    "a path of an entry that is none": lambda m: m.planner_data.update({"x": ("x",)}),
    "paths that are a list": lambda m: setattr(m, "planner_data", [1]),
    "a path without end": lambda m: put(m, "scheduler.x", BytesStorageMetadata(), path=("scheduler", *["x"] * 50_000)),
}


@pytest.mark.parametrize("what", SPOILED)
def test_an_index_that_does_not_fit_its_files_is_refused(step, what):
    path = step / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    SPOILED[what](metadata)
    path.write_bytes(pickle.dumps(metadata))
    with bounded(), guarded(step):
        error = refuse(CheckpointError, load, step)

    assert isinstance(error, CorruptCheckpoint | StateMismatch)
    assert str(step) in error.message or isinstance(error, StateMismatch)


def entry(key: bytes) -> bytes:
    """An index whose entries have a strange key."""
    made = b.name("torch.distributed.checkpoint.metadata", "Metadata") + b.EMPTY_TUPLE + b"\x81"
    return made + b"}" + b.text("state_dict_metadata") + b"}" + key + b.NONE + b"ss" + b.BUILD


INDEX = b.name("torch.distributed.checkpoint.metadata", "MetadataIndex") + b.EMPTY_TUPLE + b"\x81"


def part_of(holder: str, module: str = "torch.distributed.checkpoint.metadata", **fields: bytes) -> bytes:
    """An object of PyTorch's metadata, with any fields."""
    return b.name(module, holder) + b.EMPTY_TUPLE + b"\x81" + with_fields(**fields)


def with_fields(**fields: bytes) -> bytes:
    """A state for what is on the stack."""
    return b.EMPTY_DICT + b"".join(b.text(name) + value + b"s" for name, value in fields.items()) + b.BUILD


def placed(about: bytes = b"", planner_data: bytes = b.NONE, **changes: bytes) -> bytes:
    """An index with one entry that stands in one place, and what else there is about them."""
    usual = {"relative_path": b.text("__0_0.distcp"), "offset": b.number(0), "length": b.number(1)}
    place = part_of("_StorageInfo", "torch.distributed.checkpoint.filesystem", **{**usual, **changes})
    key = b.name("torch.distributed.checkpoint.metadata", "MetadataIndex") + b.EMPTY_TUPLE + b"\x81q\x05"
    key += with_fields(fqn=b.text("a"), offset=b.NONE)
    about = about or part_of("BytesStorageMetadata")
    return part_of(
        "Metadata", storage_data=b.EMPTY_DICT + key + place + b"s",
        state_dict_metadata=b.EMPTY_DICT + b.text("a") + about + b"s", planner_data=planner_data,
    )  # fmt: skip


PICKLES: dict[str, bytes] = {
    "a key that takes for ever later": placed(about=b"h\x05" + with_fields(fqn=b.bomb(40))),
    "an offset of a key that takes for ever later": placed(about=b"h\x05" + with_fields(offset=b.bomb(40))),
    "a path that is long": placed(
        planner_data=b.EMPTY_DICT + b.text("a") + b.text("x") + b"q\x06" + b.tuple_of(*[b"h\x06"] * 1001) + b"s"
    ),
    "a file that takes for ever to spell out": placed(relative_path=b.bomb(40)),
    "a place that takes for ever to spell out": placed(offset=b.bomb(40)),
    "a memo of a size": b.NONE + b"r" + struct.pack("<I", 1 << 27),
    "a key that takes for ever": entry(b.bomb(31)),
    "an index that takes for ever": entry(INDEX + b"}" + b.text("fqn") + b.bomb(31) + b"s" + b.BUILD),
    "an index without a name": entry(INDEX),
    "an attribute of an attribute": b.call(
        b.name("builtins", "getattr"),
        b.call(b.name("builtins", "getattr"), b.name("torch", "Size"), b.text("__class__")),
        b.text("mro"),
    ),
    "a member that is none": b.call(
        b.name("builtins", "getattr"),
        b.name("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        b.text("__class__"),
    ),
    "an attribute that is none": b.name("torch.distributed.checkpoint.metadata", "Metadata")
    + b"\x81}" + b.text("__class__") + b.NONE + b"s" + b.BUILD,
    "a state for a class": b.name("torch.distributed.checkpoint.metadata", "Metadata")
    + b"}" + b.text("x") + b.NONE + b"s" + b.BUILD,
    "properties of nothing": b.name("torch.distributed.checkpoint.metadata", "TensorProperties")
    + b")\x81" + b.tuple_of(b.bomb(31), b.NONE, b.NONE, b.NONE, b.NONE) + b.BUILD,
    "an extension": b"\x82\x01",
    "an instance": b"(iposix\nsystem\n",
    "text of a number": b"I" + b"9" * 100_000 + b"\n",
    "a long number": b"\x8b" + struct.pack("<i", 1 << 30),
    "a negative length": b"\x8b" + struct.pack("<i", -1),
    "a persistent id": b.NONE + b"Q",
    "lists in lists": b"]" * 100_000 + b"a" * 99_999,
    "a name without end": b"c" + b"x" * 1_000_000,
    "a size of text": b.call(b.name("torch", "Size"), b.tuple_of(b.text("x"))),
    "a size of sizes": b.call(b.name("torch", "Size"), b.number(1 << 40)),
    "a layout of everything": b.call(b.name("torch.serialization", "_get_layout"), b.text("torch.load")),
}  # fmt: skip


@pytest.mark.parametrize("what", PICKLES)
def test_a_hostile_pickle_for_an_index_is_refused_and_costs_next_to_nothing(step, what):
    (step / ".metadata").write_bytes(b.PROTO + PICKLES[what] + b.STOP)
    with bounded(), guarded(step):
        refuse(CorruptCheckpoint, load, step)


def test_an_index_put_together_by_hand_is_read(step):
    """Or what is refused above would be refused for another reason."""
    (step / ".metadata").write_bytes(b.PROTO + placed() + b.STOP)

    assert list(index.read_index(step, files(step)).state_dict_metadata) == ["a"]


def test_an_index_that_claims_to_be_large_is_not_read(step):
    sparse(step / ".metadata", 1 << 40, (step / ".metadata").read_bytes()[:100])
    with bounded():
        refuse(CorruptCheckpoint, load, step)


def test_an_index_of_many_thousand_tensors_is_read_in_good_time(step):
    path = step / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    listed = files(step)
    for n in range(5000):
        about = copy.deepcopy(tensor_of(metadata))
        metadata.state_dict_metadata[f"other.{n}"] = about
        metadata.planner_data[f"other.{n}"] = ("other", str(n))
        place = copy.copy(place_of(metadata))
        place.relative_path = f"{n}.distcp"
        listed[place.relative_path] = place.offset + place.length
        metadata.storage_data[MetadataIndex(f"other.{n}", about.chunks[0].offsets)] = place
    path.write_bytes(pickle.dumps(metadata))
    listed[".metadata"] = path.stat().st_size
    with bounded(mib=300):
        index.read_index(step, listed)


MAPPINGS = [
    "", "[", "[]", "{}", '{"integer_keys": 1, "empty": []}', '{"integer_keys": [1], "empty": []}',
    '{"integer_keys": ["abc"], "empty": []}', '{"integer_keys": [[]], "empty": []}',
    '{"integer_keys": [[1]], "empty": []}', '{"integer_keys": [["a", -1]], "empty": []}',
    '{"integer_keys": [["a", 1.5]], "empty": []}', '{"integer_keys": [["a", null]], "empty": []}',
    '{"integer_keys": [["a", {}]], "empty": []}', '{"integer_keys": [["a", true]], "empty": []}',
    '{"integer_keys": [], "empty": [["scheduler", "x", 1099511627776]]}',
    '{"integer_keys": [], "empty": [["scheduler", "last_epoch", "x"]]}',
    '{"integer_keys": [], "empty": [["plain", "two", "x"]]}',
    json.dumps({"integer_keys": [], "empty": [["scheduler", *["x"] * 200_000]]}), "[" * 100_000, "1" * 10_000, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MAPPINGS)))
def test_mappings_that_are_none_are_refused(step, number):
    (step / "mappings.json").write_bytes(MAPPINGS[number].encode(errors="surrogatepass"))
    with bounded(), guarded(step):
        refuse(CorruptCheckpoint, load, step)


def test_mappings_that_claim_to_be_large_are_not_read(step):
    sparse(step / "mappings.json", 1 << 40, b"[")
    with bounded():
        refuse(CorruptCheckpoint, load, step)


NAMES = ("__0_0.distcp", "__0_1.distcp", ".metadata", "per-rank-0.pt", "mappings.json")


@pytest.mark.parametrize(
    "kind", ["link", "link to nothing", "pipe", "directory", "device", "socket", "longer", "shorter"]
)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_through_a_link_or_from_what_is_no_file(step, tmp_path, name, kind):
    """As the checkpoint was committed, so it must be when it is read, whatever happened since it was looked at."""
    listed = files(step)
    path = step / name
    elsewhere = tmp_path / "elsewhere"
    shutil.copy(path, elsewhere)
    if kind in ("longer", "shorter"):
        os.truncate(path, listed[name] + (4096 if kind == "longer" else -1))
    else:
        path.unlink()
        make(kind, path, elsewhere)
    with bounded(), guarded(step):
        error = refuse(CheckpointError, load, step, listed)

    assert isinstance(error, CorruptCheckpoint | StateMismatch)


def make(kind: str, path: Path, target: Path) -> None:
    """Put something at *path* that is no file."""
    if kind == "link":
        path.symlink_to(target)
    elif kind == "link to nothing":
        path.symlink_to(target.with_name("nothing"))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("only root makes devices")


def test_a_checkpoint_directory_that_has_become_a_link_is_not_read(step, tmp_path):
    listed = files(step)
    step.rename(tmp_path / "moved")
    step.symlink_to("moved")
    with guarded(step):
        refuse(CorruptCheckpoint, load, step, listed)


@pytest.mark.parametrize("name", ["__0_1.distcp", "mappings.json", "per-rank-0.pt"])
def test_files_that_were_not_committed_are_not_opened(step, name):
    listed = files(step)
    del listed[name]
    if name == "mappings.json":
        load(step, listed)
    else:
        refuse(CheckpointError, load, step, listed)


def test_a_tensor_where_the_checkpoint_has_a_value_is_a_mismatch(step):
    refuse(StateMismatch, load, step, plain={"two": torch.zeros(2)})


@pytest.mark.parametrize("stored", [[1], torch.zeros(2), "x", None, 5])
def test_per_rank_state_that_is_no_mapping_is_refused(step, stored):
    torch.save(stored, step / "per-rank-0.pt")
    refuse(CorruptCheckpoint, load, step)
