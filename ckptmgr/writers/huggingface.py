"""
Hugging Face exports: safetensors files, index, and all the small files that ``from_pretrained`` wants.

No collective over tensor data. Every rank says what it holds, rank 0 decides once which file and which
offset each piece goes to and who writes it, and every rank then writes its own slices at their final
offsets. Formats: safetensors (huggingface/safetensors, README "Format"); shard names, the index and the
greedy split of shards as ``save_pretrained`` makes them (huggingface_hub, serialization/_base.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

from ckptmgr.durable import DIRECT_BLOCK
from ckptmgr.errors import InvalidArgument
from ckptmgr.lifecycle import Format
from ckptmgr.options import parse_size
from ckptmgr.writers.arena import Copy, Layout, aligned, runs_of_slice
from ckptmgr.writers.assets import asset_files, own_config
from ckptmgr.writers.jobs import FileJob, Segment, SharedFile
from ckptmgr.writers.modelnames import Box, View, hub_views
from ckptmgr.writers.state import State, split

Adapter = Callable[[str, torch.Tensor], "str | Iterable[tuple[str, torch.Tensor]] | None"]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_HEADER_METADATA = "__metadata__"

#: safetensors' names of dtypes (safetensors 0.8, bindings/python, torch.py).
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.complex64: "C64",
    torch.float4_e2m1fn_x2: "F4",
}  # fmt: skip
#: How many elements safetensors counts where PyTorch counts one.
_PACKED = {torch.float4_e2m1fn_x2: 2}
#: What `dtype` casts. Integers, booleans and quantised 8-bit floats mean what they are.
_CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """
    Exports for use elsewhere, loadable with ``from_pretrained``.

    Args:
        assets: A local model directory whose non-weight files are copied, or an object with
            ``save_pretrained`` (config, tokenizer, processor), or several; of a model its config and
            generation config. For a single model its own are added where the assets have none.
        dtype: What float64, float32, float16 and bfloat16 tensors are cast to; None keeps each as it is.
        max_shard_size: Bytes of tensors in one file, or text like ``"5GB"`` (powers of ten) or ``"5GiB"``.
        adapter: Maps a named tensor to Hugging Face names. Called with name and tensor; returns the new
            name, None to leave the tensor out, or pairs of names and views of the tensor. Without one, a
            transformers model gets the names that ``save_pretrained`` would use.
    """

    assets: Any = None
    dtype: torch.dtype | None = None
    max_shard_size: int | str = "5GB"
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size)
        # Saves come later, and the working directory may be another one by then.
        given = self.assets if isinstance(self.assets, list | tuple) else [self.assets]
        fixed = [Path(one).resolve() if isinstance(one, str | os.PathLike) else one for one in given if one is not None]
        object.__setattr__(self, "assets", fixed or None)
        if self.dtype is not None and self.dtype not in _CASTABLE:
            raise InvalidArgument(f"dtype is {self.dtype}; exports are cast to {', '.join(map(str, _CASTABLE))}")
        for source in self.sources():
            if isinstance(source, Path) and not source.is_dir():
                raise InvalidArgument(f"assets: {source} is not a directory", hint="give a local model directory")

    @property
    def kind(self) -> Format:
        """The format's word in journal and manifest."""
        return Format.HUGGINGFACE

    def writer(self) -> HuggingFaceWriter:
        """The trainer-side half of the writing, one per series and rank."""
        return HuggingFaceWriter(self)

    def sources(self) -> list[Any]:
        """The assets one by one: directories as paths, and objects with ``save_pretrained``."""
        found = list(self.assets or ())
        for one in found:
            if not isinstance(one, Path) and not hasattr(one, "save_pretrained"):
                raise InvalidArgument(f"assets: {type(one).__name__} is neither a path nor has it save_pretrained")
        return found


@dataclasses.dataclass(frozen=True)
class Piece:
    """
    What one rank holds of one tensor: a box of it, or all of it.

    *alias* tells tied tensors; tensors with the same *block* go into the same file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    alias: tuple[Any, ...] | None
    block: str

    @property
    def box(self) -> Box:
        """Where the piece lies in the tensor."""
        return self.offsets, self.sizes


@dataclasses.dataclass
class Taken:
    """One rank's named pieces at one save. No tensor is copied yet."""

    order: list[str]
    pieces: list[Piece]
    tensors: dict[object, torch.Tensor]
    originals: list[tuple[str, torch.Tensor]]
    modules: list[torch.nn.Module]
    signature: bytes
    per_rank_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece that a rank writes, and where its tensor begins in the file (bytes)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int

    @property
    def key(self) -> object:
        """What the copy of the piece is known by."""
        return self.name, self.offsets

    @property
    def runs(self) -> list[tuple[int, int, int, int]]:
        """The bytes of the file that the piece fills, as `runs_of_slice` tells them."""
        runs = runs_of_slice(self.shape, self.offsets, self.sizes, self.dtype.itemsize)
        return [(self.begin + offset, length, count, stride) for offset, length, count, stride in runs]

    @property
    def at(self) -> int:
        """Where the piece begins in the file."""
        return self.runs[0][0] if self.runs else self.begin

    @property
    def is_one_run(self) -> bool:
        """Whether those bytes are next to each other, so that the piece lies in the file as it lies in memory."""
        return len(self.runs) <= 1 and all(count == 1 for _, _, count, _ in self.runs)


@dataclasses.dataclass(frozen=True)
class RankPlan:
    """What one rank writes: whole files with their headers, and parts of files that others write too."""

    own: tuple[tuple[SharedFile, tuple[Part, ...]], ...]
    shared: tuple[tuple[SharedFile, tuple[Part, ...]], ...]


class HuggingFaceWriter:
    """Plans and lays out the exports of one series on one rank; the plan is exchanged once and then reused."""

    kind = Format.HUGGINGFACE

    def __init__(self, options: HuggingFace) -> None:
        self._options = options
        self._mine: RankPlan | None = None
        self._shared: list[SharedFile] = []
        self._files = 0
        self._index: bytes | None = None
        self._modules: list[torch.nn.Module] = []
        self._configs: list[Any] = []
        self._own: list[Any] = []
        #: By model; gone with it, where each export is of a fresh copy.
        self._views: weakref.WeakKeyDictionary[torch.nn.Module, tuple[list[Any], dict[str, list[View]]]]
        self._views = weakref.WeakKeyDictionary()

    def take(self, state: State, rank: int) -> Taken:
        """
        Look at the tensors to export, without copying one.

        Raises:
            InvalidArgument: Something in *state* is neither a module nor a tensor nor a mapping of tensors,
                or cannot stand in a safetensors file.
        """
        del rank
        shared, per_rank = split(state)
        if per_rank:
            raise InvalidArgument(f"an export has no per-rank state, but {sorted(per_rank)} is")
        shared = {key: _unwrapped(value) for key, value in shared.items()}
        named: dict[str, _Named] = {}
        for key, value in shared.items():
            for one in _named(key, value, prefix=f"{key}." if len(shared) > 1 else ""):
                if one.name in named:
                    raise InvalidArgument(f"two tensors are named {one.name!r}")
                named[one.name] = one
        order: list[str] = []
        pieces: list[Piece] = []
        tensors: dict[object, torch.Tensor] = {}
        aliases: dict[Any, int] = {}
        digest = hashlib.blake2b(digest_size=16)
        for name, block, shape, may_be_tied, boxes in self._published(named.values()):
            order.append(name)
            for (offsets, sizes), tensor in boxes:
                dtype = tensor.dtype
                if self._options.dtype is not None and dtype in _CASTABLE:
                    dtype = self._options.dtype
                if dtype not in _DTYPES or (dtype in _PACKED and not shape):
                    raise InvalidArgument(f"{name!r} is {dtype} {list(shape)}, which safetensors does not know")
                alias = _alias(tensor) if may_be_tied else None
                pieces.append(Piece(name, dtype, shape, offsets, sizes, alias, block))
                tensors[name, offsets] = tensor
                # Where memory lies may change from save to save; who shares it is what the plan depends on.
                group = aliases.setdefault(alias, len(aliases)) if alias else -1
                digest.update(repr((name, dtype, shape, offsets, sizes, group, block)).encode())
        if _HEADER_METADATA in order:
            raise InvalidArgument(f"{_HEADER_METADATA!r} cannot name a tensor; the safetensors header has it already")
        if len(set(order)) != len(order):
            raise InvalidArgument(f"two tensors are named {max(order, key=order.count)!r}")
        digest.update(repr(order).encode())
        modules = [value for value in shared.values() if isinstance(value, torch.nn.Module)]
        originals = [(one.name, one.tensor) for one in named.values()]
        return Taken(order, pieces, tensors, originals, modules, digest.digest())

    def _published(self, named: Iterable[_Named]) -> Iterator[_Held]:
        """(published name, block, whole shape, may be tied, this rank's boxes) of every tensor to export."""
        known = _Boxes()
        for module, group in itertools.groupby(named, key=lambda one: one.module):
            views = self._hub_views(module) if module is not None and self._options.adapter is None else {}
            held: list[tuple[int, _Held]] = []
            joined: dict[int, tuple[str, View, list[tuple[Box, torch.Tensor]]]] = {}
            for one in group:
                if self._options.adapter is not None:
                    for name, tensor in _adapt(self._options.adapter, one):
                        held.append((0, (name, name, tuple(tensor.shape), module is not None, known.of(name, tensor))))
                    continue
                boxes = known.of(one.name, one.tensor)
                if not views:
                    held.append((0, (one.name, one.name, tuple(one.tensor.shape), module is not None, boxes)))
                for view in views.get(one.name.removeprefix(one.prefix), ()):
                    cuts = [cut for box, local in boxes if (cut := view.cut(box, local)) is not None]
                    if view.whole != view.shape:
                        joined.setdefault(view.position, (one.prefix, view, []))[2].extend(cuts)
                        continue
                    name, block = one.prefix + view.name, one.prefix + view.block
                    held.append((view.position, (name, block, view.shape, True, cuts)))
            for position, (prefix, view, cuts) in joined.items():
                held.append((position, (prefix + view.name, prefix + view.block, view.whole, False, cuts)))
            yield from (entry for _, entry in sorted(held, key=operator.itemgetter(0)))

    def _hub_views(self, module: torch.nn.Module) -> dict[str, list[View]]:
        shapes = [(name, tuple(tensor.shape)) for name, tensor in module.named_parameters()]
        known = self._views.get(module)
        if known is None or known[0] != shapes:
            known = self._views[module] = (shapes, hub_views(module))
        return known[1]

    def local_plan(self, taken: Taken) -> tuple[list[str], list[Piece]]:
        """What rank 0 must know of this rank to plan: all names in order, and what this rank holds of them."""
        self._modules = taken.modules
        return taken.order, taken.pieces

    def plan_globally(self, plans: Sequence[tuple[list[str], list[Piece]]]) -> list[RankPlan]:
        """
        Rank 0 only: decide the files, their headers, and who writes which piece where.

        Raises:
            InvalidArgument: Ranks disagree about a tensor, or its pieces do not make it up exactly.
        """
        holders = _holders(plans)
        dropped = _ties([pieces for _, pieces in plans], _tied_targets(self._modules))
        kept = {name: about for name, about in holders.items() if name not in dropped}
        if not kept:
            raise InvalidArgument("there is no tensor to export")
        files = _split(kept, parse_size(self._options.max_shard_size))
        weight_map: dict[str, str] = {}
        own: list[list[Any]] = [[] for _ in plans]
        parts: list[list[Any]] = [[] for _ in plans]
        load = [0] * len(plans)
        self._shared = []
        self._files = len(files)
        for number, names in enumerate(files, start=1):
            path = WEIGHTS_NAME if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            weight_map |= dict.fromkeys(names, path)
            ties = {gone: kept_as for gone, kept_as in dropped.items() if kept_as in names}
            header, begins, size = _header({name: kept[name] for name in names}, ties)
            file = SharedFile(path, size, header)
            of_rank = _assign({name: kept[name] for name in names}, begins, load)
            if len(of_rank) == 1 and all(part.is_one_run for mine in of_rank.values() for part in mine):
                ((rank, mine),) = of_rank.items()
                own[rank].append((file, tuple(mine)))
            else:
                self._shared.append(file)
                for rank, mine in of_rank.items():
                    parts[rank].append((file, tuple(mine)))
        self._index = None
        if len(files) > 1:
            total = sum(tensor.nbytes for tensor in kept.values())
            about = {"total_size": total}
            count = getattr(self._modules[0], "num_parameters", None) if len(self._modules) == 1 else None
            if callable(count):
                about["total_parameters"] = int(count())
            index = {"metadata": about, "weight_map": weight_map}
            self._index = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        return [RankPlan(tuple(mine), tuple(some)) for mine, some in zip(own, parts, strict=True)]

    def lay_out(self, mine: RankPlan, rank: int) -> tuple[Layout, Any]:
        """Place this rank's files and pieces in its arena; whole files lie there as they will stand on disk."""
        del rank
        self._mine = mine
        return self.lay_out_beside({}, None), None

    def lay_out_beside(self, lent: Mapping[object, int], lender: int | None) -> Layout:
        """The same without the pieces in *lent*, by the keys of copies, which lie there in the arena *lender*."""
        assert self._mine is not None
        mine = self._mine
        constants: list[tuple[int, bytes]] = []
        copies: list[Copy] = []
        files: list[FileJob] = []
        end = 0
        for file, parts in mine.own:
            # Aligned as in the file, so that it can be written past the page cache.
            start = aligned(end, DIRECT_BLOCK)
            constants.append((start, file.header))
            segments = [Segment(0, start, file.size)]
            end = start + file.size
            if any(part.key in lent for part in parts):
                segments = [Segment(0, start, len(file.header))]
                end = start + len(file.header)
            for at, part in sorted(((part.at, part) for part in parts), key=operator.itemgetter(0)):
                copy = Copy(part.key, start + at, part.dtype, part.sizes)
                if part.key in lent:
                    segments.append(Segment(at, lent[part.key], copy.nbytes, arena=lender))
                    continue
                if len(segments) > 1 or segments[0].length < file.size:
                    copy = dataclasses.replace(copy, offset=aligned(end))
                    segments.append(Segment(at, copy.offset, copy.nbytes))
                    end = copy.offset + copy.nbytes
                copies.append(copy)
            files.append(FileJob(file.path, file.size, own=True, segments=tuple(segments)))
        for file, parts in mine.shared:
            segments = []
            for part in parts:
                start = lent.get(part.key, aligned(end))
                if part.key not in lent:
                    copies.append(copy := Copy(part.key, start, part.dtype, part.sizes))
                    end = start + copy.nbytes
                for offset, length, count, stride in part.runs:
                    arena = lender if part.key in lent else None
                    segments.append(Segment(offset, start, length, count, stride, arena))
                    start += length * count
            files.append(FileJob(file.path, file.size, own=False, segments=tuple(segments)))
        self._files = max(self._files, len(files))
        return Layout(end, tuple(constants), tuple(copies), tuple(files))

    def accept_layouts(self, places: Sequence[Any]) -> None:
        """Rank 0 only: nothing to remember, the plan fixes every offset."""

    def report_bytes(self, taken: Taken) -> int:
        """How many bytes this rank's report on a save takes beyond a plain answer: an entry per file."""
        del taken
        return 256 * self._files

    def sources(self, taken: Taken) -> Mapping[object, torch.Tensor]:
        """The tensors to capture, by the keys of the layout's copies."""
        return taken.tensors

    def watched(self, taken: Taken) -> list[tuple[str, torch.Tensor]]:
        """The state's own tensors, by name: an update of a DTensor leaves the version of its local part alone."""
        return taken.originals

    def small_files(self, taken: Taken, rank: int) -> tuple[list[FileJob], Any]:
        """An export has no values besides tensors; rank 0 copies the configs that belong to them."""
        self._modules = []  # planned with; a model that the caller lets go must not live on here
        if rank == 0:
            dtype = self._options.dtype
            sources = [source for source in self._options.sources() if isinstance(source, torch.nn.Module)]
            self._configs = [config for source in sources for config in own_config(source, dtype)]
            # The parts of a composed model have configs of their own, but none is the whole's.
            self._own = own_config(taken.modules[0], dtype) if len(taken.modules) == 1 else []
        return [], None

    def prewrite(self, scratch: Path) -> Iterator[tuple[str, bytes]]:
        """
        Rank 0 only: config, generation config, tokenizer, processor, templates, code files, and the index.

        Raises:
            InvalidArgument: Two assets have a file of the same name with different bytes.
        """
        found: dict[str, bytes] = {}
        others = [source for source in self._options.sources() if not isinstance(source, torch.nn.Module)]
        for source in (*others, *self._configs):
            for name, data in asset_files(source, scratch):
                if found.setdefault(name, data) != data:
                    raise InvalidArgument(f"two assets bring a different {name!r}")
        for config in self._own if "config.json" not in found else ():
            for name, data in asset_files(config, scratch):
                found.setdefault(name, data)
        if self._index is not None:
            found[INDEX_NAME] = self._index
        yield from sorted(found.items())

    def shared_files(self) -> list[SharedFile]:
        """Rank 0 only: the weight files that several ranks fill in."""
        return self._shared

    def conclude(self, reports: Sequence[Any]) -> Iterator[tuple[str, bytes]]:
        """Rank 0 only: nothing is left to write; headers and index stood before."""
        del reports
        return iter(())


# -- what a rank holds ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Named:
    """A tensor of the state under its own name, and the module it belongs to, if any."""

    name: str
    tensor: torch.Tensor
    module: torch.nn.Module | None = None
    prefix: str = ""


_Held = tuple[str, str, tuple[int, ...], bool, list[tuple[Box, torch.Tensor]]]


def _unwrapped(value: Any) -> Any:
    """The module inside ``torch.compile`` and ``DistributedDataParallel``, which prefix every name with their own."""
    while isinstance(value, torch.nn.Module):
        # The class of a compiled module is not asked for: importing torch.compile's machinery takes long.
        if isinstance(value, DistributedDataParallel):
            value = value.module
        elif "_orig_mod" in value._modules:
            value = value._orig_mod
        else:
            break
    return value


def _named(key: str, value: Any, prefix: str) -> Iterator[_Named]:
    if isinstance(value, torch.Tensor):
        yield _Named(key, value)
    elif isinstance(value, torch.nn.Module):
        for name, tensor in value.state_dict().items():
            # A module's extra state is not a tensor and has no place in a safetensors file.
            if isinstance(tensor, torch.Tensor):
                yield _Named(prefix + name, tensor, value, prefix)
    elif isinstance(value, Mapping) and all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        yield from (_Named(prefix + str(name), tensor) for name, tensor in value.items())
    else:
        raise InvalidArgument(f"an export takes modules and named tensors, but {key!r} is a {type(value).__name__}")


def _adapt(adapter: Adapter, one: _Named) -> Iterator[tuple[str, torch.Tensor]]:
    answer = adapter(one.name, one.tensor)
    try:
        pairs = [(answer, one.tensor)] if isinstance(answer, str) else [(name, view) for name, view in answer or ()]
    except (TypeError, ValueError):
        pairs = [("", one.tensor)]
    for name, view in pairs:
        if not isinstance(name, str) or not name or not isinstance(view, torch.Tensor):
            raise InvalidArgument(
                f"the adapter's answer for {one.name!r} is neither a name, None, nor (name, tensor) pairs"
            )
        yield name, view


class _Boxes:
    """Which boxes of tensors this rank holds. Of one call, in which many tensors are sharded alike."""

    def __init__(self) -> None:
        self._known: dict[Any, list[Box]] = {}

    def of(self, name: str, tensor: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
        """
        The boxes of *tensor* that this rank holds, each with its local tensor.

        Raises:
            InvalidArgument: It cannot be exported.
        """
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise InvalidArgument(f"{name!r} is not a dense tensor with data")
        if type(tensor) in (torch.Tensor, torch.nn.Parameter):
            return [(((0,) * tensor.dim(), tuple(tensor.shape)), tensor)]
        if not isinstance(tensor, DTensor):
            return _planned(name, tensor)
        if any(isinstance(place, Partial) for place in tensor.placements):
            raise InvalidArgument(f"{name!r} is a partial sum; redistribute it before saving")
        kind = (type(tensor), tensor.device_mesh, tensor.placements, tensor.shape)
        if (boxes := self._known.get(kind)) is not None:
            return [(box, tensor.to_local()) for box in boxes]
        found = _planned(name, tensor)
        if len(found) <= 1 and type(tensor.to_local()) is torch.Tensor:
            self._known[kind] = [box for box, _ in found]
        return found


def _planned(name: str, tensor: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
    """The boxes as PyTorch's planner has them, which knows tensors of any kind, and takes its time."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({name: tensor})
    return [
        (
            (tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes)),
            planner.lookup_object(item.index),
        )
        for item in planner.create_local_plan().items
        if item.tensor_data is not None
    ]


def _alias(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    if tensor.numel() == 0 or not tensor.data_ptr():  # a subclass that keeps its values elsewhere has no address
        return None
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.device), str(tensor.dtype))


# -- the plan ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Tensor:
    """A whole tensor of the export, and which ranks hold which boxes of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    block: str
    boxes: dict[Box, list[int]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _holders(plans: Sequence[tuple[list[str], list[Piece]]]) -> dict[str, _Tensor]:
    """Every tensor, in the order in which the ranks name them, rank 0 first."""
    order = dict.fromkeys(name for names, _ in plans for name in names)
    found: dict[str, _Tensor] = {}
    for rank, (_, pieces) in enumerate(plans):
        for piece in pieces:
            about = found.setdefault(piece.name, _Tensor(piece.dtype, piece.shape, piece.block, {}))
            if (about.dtype, about.shape) != (piece.dtype, piece.shape):
                raise InvalidArgument(
                    f"{piece.name!r} is {about.dtype} {list(about.shape)} on one rank and "
                    f"{piece.dtype} {list(piece.shape)} on rank {rank}",
                    hint="tensors that differ by rank need different names; use an adapter",
                )
            if 0 not in piece.sizes or 0 in piece.shape:
                about.boxes.setdefault(piece.box, []).append(rank)
    for name, about in found.items():
        covered = sum(math.prod(sizes) for _, sizes in about.boxes)
        if covered != math.prod(about.shape) or _overlapping(list(about.boxes)):
            raise InvalidArgument(
                f"the ranks' pieces of {name!r} cover {covered} of {math.prod(about.shape)} elements, or overlap",
                hint="every rank that holds a piece must pass it to save",
            )
    if nowhere := [name for name in order if name not in found]:
        raise InvalidArgument(f"no rank holds a piece of {nowhere[0]!r}")
    return {name: found[name] for name in order}


def _overlapping(boxes: list[Box]) -> bool:
    """Whether two boxes share an element; boxes are few per tensor, sorted by their first dimension."""
    boxes = sorted(box for box in boxes if 0 not in box[1])
    for position, (offsets, sizes) in enumerate(boxes):
        for others, extents in boxes[position + 1 :]:
            if offsets and others[0] >= offsets[0] + sizes[0]:
                break
            dims = zip(offsets, sizes, others, extents, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in dims):
                return True
    return False


def _tied_targets(modules: Iterable[torch.nn.Module]) -> set[str]:
    """Names that transformers would rather leave out of two tied ones."""
    names: set[str] = set()
    for module in modules:
        names |= set(getattr(module, "all_tied_weights_keys", None) or ())
    return names


def _ties(plans: Sequence[list[Piece]], targets: set[str]) -> dict[str, str]:
    """Names to leave out because their tensor is another's, with that other's name."""
    aliases: list[dict[str, Any]] = [
        {piece.name: (piece.alias, piece.box) for piece in pieces if piece.alias is not None} for pieces in plans
    ]
    dropped: dict[str, str] = {}
    for of_rank in aliases:
        groups: dict[Any, list[str]] = {}
        for name, alias in of_rank.items():
            groups.setdefault(alias, []).append(name)
        for names in groups.values():
            keep = next((name for name in names if not _ends_with_any(name, targets)), names[0])
            for name in names:
                tied_everywhere = all(
                    other.get(name) == other.get(keep) for other in aliases if name in other or keep in other
                )
                if name != keep and keep not in dropped and tied_everywhere:
                    dropped[name] = keep
    return dropped


def _ends_with_any(name: str, targets: set[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def _split(tensors: Mapping[str, _Tensor], max_bytes: int) -> list[list[str]]:
    """The names of each file: blocks of tensors, filled greedily in order; a block above the limit stands alone."""
    blocks: dict[str, list[str]] = {}
    for name, about in tensors.items():
        blocks.setdefault(about.block, []).append(name)
    files: list[list[str]] = []
    current: list[str] = []
    size = 0
    for names in blocks.values():
        nbytes = sum(tensors[name].nbytes for name in names)
        if nbytes > max_bytes:
            files.append(names)
            continue
        if current and size + nbytes > max_bytes:
            files.append(current)
            current, size = [], 0
        current += names
        size += nbytes
    return [*files, current] if current else files


def _header(tensors: Mapping[str, _Tensor], ties: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The file's header, where each tensor begins in the file, and the file's size; in bytes."""
    # Tied names are told as safetensors.torch.save_model does, so that load_model finds them.
    rows: dict[str, Any] = {_HEADER_METADATA: {**ties, "format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    # Larger elements first, so that every tensor is aligned to its own.
    for name, about in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        begins[name] = end
        rows[name] = {
            "dtype": _DTYPES[about.dtype],
            "shape": [*about.shape[:-1], *(size * _PACKED.get(about.dtype, 1) for size in about.shape[-1:])],
            "data_offsets": [end, end + about.nbytes],
        }
        end += about.nbytes
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (aligned(8 + len(text)) - 8 - len(text))
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end


def _assign(tensors: Mapping[str, _Tensor], begins: Mapping[str, int], load: list[int]) -> dict[int, list[Part]]:
    """Who writes which piece of one file: one rank all of it if one can, else the least loaded holder of each."""
    holders = [set(ranks) for about in tensors.values() for ranks in about.boxes.values()]
    whole = set.intersection(*holders) if holders else {0}
    chosen: dict[int, list[Part]] = {}
    everything = min(whole, key=lambda rank: (load[rank], rank)) if whole else None
    for name, about in tensors.items():
        for (offsets, sizes), ranks in about.boxes.items():
            rank = min(ranks, key=lambda r: (load[r], r)) if everything is None else everything
            load[rank] += math.prod(sizes) * about.dtype.itemsize
            part = Part(name, about.dtype, about.shape, offsets, sizes, begins[name])
            chosen.setdefault(rank, []).append(part)
    return chosen or {0: []}
