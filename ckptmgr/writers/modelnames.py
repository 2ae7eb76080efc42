"""
The names under which the world knows a transformers model's weights, without touching the weights.

In transformers 5 a model may hold its weights in another shape than its published checkpoints, for
instance all experts of a layer in one tensor; ``save_pretrained`` converts back with real tensor
operations, which would gather sharded tensors. Here the same conversion runs over tensors without
memory (device "meta"). As long as it only selects, cuts and turns, each result is a view whose offset
and strides tell which part of which parameter it is, and any rank can cut its own shard accordingly.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class View:
    """
    A published tensor as a view of a parameter.

    ``position`` is its place in the order in which tensors are published. ``dims[j]`` is the
    parameter's dimension that dimension *j* of the view runs along, or None for a dimension of size 1
    that the view added; ``starts[d]`` is where the view begins in dimension *d* of the parameter.
    Views with the same ``block`` are one piece of memory when ``save_pretrained`` splits shards.
    """

    name: str
    block: str
    position: int
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
        return (tuple(low for low, _ in where), tuple(size for _, size in where)), part


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
    with _ViewsOnly():
        converted = revert_weight_conversion(module, dict(empty))
    owner = {_memory(tensor): name for name, tensor in empty.items()}
    first_in: dict[int, str] = {}
    blocks = {
        name: first_in.setdefault(_memory(tensor), name)
        for name, tensor in revert_weight_conversion(module, dict(empty)).items()
    }
    views: dict[str, list[View]] = {}
    for position, (name, result) in enumerate(converted.items()):
        source = owner.get(_memory(result))
        view = _as_view(name, blocks[name], position, result, empty[source]) if source is not None else None
        if source is None or view is None:
            log.warning("%s: %s is not a part of one parameter; exporting the model's own names", type(module), name)
            return {}
        views.setdefault(source, []).append(view)
    return views if set(views) == set(empty) else {}


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _as_view(name: str, block: str, position: int, result: torch.Tensor, source: torch.Tensor) -> View | None:
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
    return View(name, block, position, tuple(result.shape), tuple(dims), tuple(starts))


class _ViewsOnly(TorchFunctionMode):
    """Leaves out copies that change layout only, which would hide where a tensor came from."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func in (torch.Tensor.contiguous, torch.Tensor.clone, torch.clone):
            return args[0]
        return func(*args, **(kwargs or {}))
