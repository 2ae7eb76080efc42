"""
The small files of an export: config, generation config, tokenizer, processor, templates, code, but no weights.
"""

from __future__ import annotations

import copy
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ckptmgr import reach
from ckptmgr.errors import CorruptCheckpoint, InvalidArgument
from ckptmgr.manifest import MANIFEST_NAME, is_plain_relative

#: Of one source, held in memory for a moment: everything but the weights.
MAX_ASSETS_BYTES = 1 << 30

#: What holds weights, or an index of them, in a model directory.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".tflite",
    ".safetensors.index.json", ".bin.index.json",
)  # fmt: skip


def asset_files(source: Any, scratch: Path) -> Iterator[tuple[str, bytes]]:
    """
    The files that *source* brings, with their bytes.

    Args:
        source: A local model directory, or an object with ``save_pretrained``.
        scratch: A directory of the run in which such an object may save itself for a moment.
    """
    if isinstance(source, Path):
        yield from _files_below(source)
        return
    with tempfile.TemporaryDirectory(prefix=".assets-", dir=scratch) as directory:
        source.save_pretrained(directory)
        yield from _files_below(Path(directory))


def _files_below(directory: Path) -> Iterator[tuple[str, bytes]]:
    """
    Every file but weights, hidden ones and our own manifest, with its bytes.

    Raises:
        OSError: A directory cannot be read: an export without what should be in it would pass for whole.
        InvalidArgument: A link leads elsewhere (an export is handed on, and a downloaded directory must not
            make it carry a file of this machine along), something is no regular file, or it is too much.
    """

    def refuse(error: OSError) -> None:
        raise error

    left = MAX_ASSETS_BYTES
    for root, directories, names in os.walk(directory, onerror=refuse):
        directories[:] = sorted(name for name in directories if not name.startswith((".", "__pycache__")))
        for name in sorted(names):
            path = Path(root, name)
            relative = path.relative_to(directory).as_posix()
            hidden = name.startswith(".") or name == MANIFEST_NAME
            if not hidden and not name.lower().endswith(_WEIGHT_SUFFIXES) and is_plain_relative(relative):
                data = _read(path, directory, left)
                left -= len(data)
                yield relative, data


def _read(path: Path, directory: Path, limit: int) -> bytes:
    # In the cache of the Hub a snapshot is made of links to blobs beside it.
    homes = [directory, *([directory.parents[1] / "blobs"] if directory.parent.name == "snapshots" else [])]
    try:
        real = path.resolve(strict=True)
        if not any(real.is_relative_to(home.resolve()) for home in homes):
            raise InvalidArgument(f"assets: {path} is a link to {real}", hint="put a copy of the file there")
        return reach.read(real, limit)
    except CorruptCheckpoint as error:
        raise InvalidArgument(
            f"assets: {directory} has more than {MAX_ASSETS_BYTES} bytes besides weights, with {path.name}",
            hint="give a directory with config, tokenizer and the like alone",
        ) from error
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL, errno.ENOENT, errno.ELOOP):
            raise
        raise InvalidArgument(f"assets: {path} is no file, or a link to none") from error


def own_config(module: torch.nn.Module, dtype: torch.dtype | None) -> list[Any]:
    """
    Copies of the config and the generation config of a transformers model, as ``save_pretrained`` would write them.

    Taken together with the weights, on the training thread: the model may be changed right after.
    """
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return []
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__.removeprefix("FSDP")]
    config.dtype = str(dtype or module.dtype).removeprefix("torch.")
    if not module.can_generate() or module.generation_config is None:
        return [config]
    return [config, copy.deepcopy(module.generation_config)]
