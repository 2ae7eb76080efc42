"""
The names under which the world knows a transformers model's weights, without touching the weights.

In transformers 5 a model may hold its weights in another shape than its published checkpoints, for
instance all experts of a layer in one tensor; ``save_pretrained`` converts back with real tensor
operations, which would gather sharded tensors. Here the same conversion runs over tensors without
memory (device "meta"). As long as it only selects, cuts, turns and joins, each result is made of views
whose offsets and strides tell which part of which parameter they are, and any rank can cut its own
shard accordingly.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class View:
    """
    A published tensor, or the part of one that begins at ``at``, as a view of a parameter.

    ``position`` is its place in the order in which tensors are published, ``whole`` the shape of the
    published tensor. ``dims[j]`` is the parameter's dimension that dimension *j* of the view runs
    along, or None for a dimension of size 1 that the view added; ``starts[d]`` is where the view begins
    in dimension *d* of the parameter. Published tensors with the same ``block`` are one piece of memory
    when ``save_pretrained`` splits shards.
    """

    name: str
    block: str
    position: int
    whole: tuple[int, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]
    dims: tuple[int | None, ...]
    starts: tuple[int, ...]

    def cut(self, box: Box, local: torch.Tensor) -> tuple[Box, torch.Tensor] | None:
        """
        This rank's part of the view, given the box of the parameter that it holds.

        Returns:
            The box within the published tensor and the part of *local* that fills it; None if they do not meet.
        """
        offsets, sizes = box
        index: list[Any] = []
        ranges: dict[int, tuple[int, int]] = {}
        for dim, (offset, size, start) in enumerate(zip(offsets, sizes, self.starts, strict=True)):
            extent = self.shape[self.dims.index(dim)] if dim in self.dims else 1
            low, high = max(start, offset), min(start + extent, offset + size)
            if low >= high and extent > 0:
                return None
            if dim in self.dims:
                ranges[dim] = (low - start, high - low)
                index.append(slice(low - offset, high - offset))
            else:
                index.append(low - offset)
        part = local[tuple(index)]
        left = [dim for dim in range(len(offsets)) if dim in self.dims]
        where: list[tuple[int, int]] = []
        part = part.permute([left.index(dim) for dim in self.dims if dim is not None])
        for position, along in enumerate(self.dims):
            if along is None:
                part = part.unsqueeze(position)
            where.append((0, 1) if along is None else ranges[along])
        begins = tuple(begin + low for begin, (low, _) in zip(self.at, where, strict=True))
        return (begins, tuple(size for _, size in where)), part


def hub_views(module: torch.nn.Module) -> dict[str, list[View]]:
    """
    How ``save_pretrained`` would name and cut the tensors of *module*.

    Returns:
        For each name of the module's state dict its published tensors; empty if *module* is no
        transformers model, or one that converts its weights in a way that is not a view.
    """
    if "transformers" not in sys.modules:
        return {}
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 publishes weights as the model holds them
        return {}
    left_out = set(module._keys_to_ignore_on_save or ())
    empty = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor) and name not in left_out
    }
    with _ViewsAndJoins() as joined:
        converted = revert_weight_conversion(module, dict(empty))
    owner = {_memory(tensor): name for name, tensor in empty.items()}
    first_in: dict[int, str] = {}
    blocks = {
        name: first_in.setdefault(_memory(tensor), name)
        for name, tensor in revert_weight_conversion(module, dict(empty)).items()
    }
    views: dict[str, list[View]] = {}
    for position, (name, result) in enumerate(converted.items()):
        for at, part in joined.parts(result):
            source = owner.get(_memory(part))
            found = _as_view(part, empty[source]) if source is not None else None
            if source is None or found is None:
                log.warning("%s: %s is not made of parts; exporting the model's own names", type(module), name)
                return {}
            view = View(name, blocks[name], position, tuple(result.shape), at, tuple(part.shape), *found)
            views.setdefault(source, []).append(view)
    return views if set(views) == set(empty) else {}


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _as_view(result: torch.Tensor, source: torch.Tensor) -> tuple[tuple[int | None, ...], tuple[int, ...]] | None:
    """The dimensions of *source* that those of its view *result* run along, and where in *source* it begins."""
    starts = []
    rest = result.storage_offset()
    for stride in source.stride():
        starts.append(rest // stride if stride else 0)
        rest %= stride or 1
    dims: list[int | None] = []
    for size, stride in zip(result.shape, result.stride(), strict=True):
        if size == 1:
            dims.append(None)
            continue
        fitting = [
            dim
            for dim in range(source.ndim)
            if source.stride(dim) == stride and starts[dim] + size <= source.shape[dim] and dim not in dims
        ]
        if not fitting:
            return None
        dims.append(fitting[0])
    return tuple(dims), tuple(starts)


class _ViewsAndJoins(TorchFunctionMode):
    """Leaves out copies that change layout only, which would hide where a tensor came from, and remembers joins."""

    def __init__(self) -> None:
        super().__init__()
        self._joined: dict[int, tuple[torch.Tensor, list[torch.Tensor], int]] = {}

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in (torch.Tensor.contiguous, torch.Tensor.clone, torch.clone):
            return args[0]
        result = func(*args, **kwargs)
        if func in (torch.cat, torch.concat, torch.stack):
            pieces = args[0] if args else kwargs["tensors"]
            dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.ndim
            if func is torch.stack:
                pieces = [piece.unsqueeze(dim) for piece in pieces]
            self._joined[_memory(result)] = (result, list(pieces), dim)
        return result

    def parts(self, tensor: torch.Tensor) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """What *tensor* was joined from, and where each piece begins in it; itself if it was not joined."""
        whole, pieces, dim = self._joined.get(_memory(tensor), (None, [], 0))
        if whole is None or (whole.shape, whole.stride()) != (tensor.shape, tensor.stride()):
            # Not joined, or cut or turned after it was.
            yield (0,) * tensor.ndim, tensor
            return
        begin = 0
        for piece in pieces:
            for at, part in self.parts(piece):
                yield tuple(where + begin * (d == dim) for d, where in enumerate(at)), part
            begin += piece.shape[dim]
