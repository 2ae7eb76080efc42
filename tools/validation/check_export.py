#!/usr/bin/env python3
"""
Load a Hugging Face export with from_pretrained and compare what it answers with what it should.

    check_export.py EXPORT --reference MODEL_DIR       another model directory, say the one it was trained from
    check_export.py EXPORT --checkpoint RUN/checkpoint/step-500   the DCP checkpoint of the same step
    check_export.py EXPORT --logits FILE               what the trainer computed when it saved

The class comes from ``architectures`` in the export's config.json, so any transformers model with
logits can be checked; models for text and images are given text. FILE is what
``torch.save({"input_ids": …, "logits": …}, FILE)`` wrote in the trainer. Logits must be equal, bit for
bit, unless --atol or --rtol say otherwise: kernels and shapes differ between machines, dtypes between
a training and its export.

Exit status: 0 the same, 1 different, 2 wrong usage, 3 something could not be loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint

SAME, DIFFERENT, UNUSABLE = 0, 1, 3


class CheckFailed(Exception):
    """Something could not be loaded, so nothing can be compared."""


def model_class(directory: Path) -> type[transformers.PreTrainedModel]:
    """The class named first in ``architectures``."""
    try:
        names = json.loads((directory / "config.json").read_bytes())["architectures"]
        return getattr(transformers, names[0])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckFailed(f"{directory}/config.json names no architecture: {error!r}") from error
    except AttributeError as error:
        raise CheckFailed(f"transformers {transformers.__version__} has no class {names[0]}") from error


def load_pretrained(directory: Path, options: argparse.Namespace) -> transformers.PreTrainedModel:
    """The model of a directory; refuses one whose weights are not exactly those that the class expects."""
    try:
        model, told = model_class(directory).from_pretrained(
            directory, dtype=options.dtype or "auto", output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckFailed(f"{directory} cannot be loaded: {error}") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in told.items() if names}
    if wrong:
        raise CheckFailed(f"{directory} does not fit {type(model).__name__}: {wrong}")
    return model.to(options.device).eval()


def load_dcp(model: transformers.PreTrainedModel, directory: Path, key: str) -> None:
    """
    Replace all that *model* holds by what a DCP checkpoint holds, cast to the model's dtypes.

    Reads with plain ``torch.distributed.checkpoint``, without ckptmgr. Its keys are the path through
    the saved state, joined by dots.
    """
    weights = {f"{key}.{name}": tensor for name, tensor in model.state_dict().items()}
    for tensor in weights.values():
        # Whatever is not read must not go unnoticed.
        tensor.fill_(math.nan if tensor.is_floating_point() else 0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked for with no_dist
            load_checkpoint(weights, storage_reader=FileSystemReader(directory), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckFailed(f"{directory} cannot be loaded: {cause}") from error


def text_inputs(model: transformers.PreTrainedModel, options: argparse.Namespace) -> torch.Tensor:
    """The same token ids on every machine, none of them special."""
    config = model.config.get_text_config()
    special = {
        value for key, value in model.config.to_dict().items() if key.endswith("_token_id") and isinstance(value, int)
    }
    usable = torch.tensor([token for token in range(min(config.vocab_size, 4096)) if token not in special])
    chosen = torch.arange(options.batch * options.length) * 7919 % len(usable)
    return usable[chosen].view(options.batch, options.length)


@torch.no_grad()
def answer(model: transformers.PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The logits, on the CPU."""
    ids = input_ids.to(model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.cpu()


def compare(export: torch.Tensor, expected: torch.Tensor, options: argparse.Namespace) -> tuple[bool, str]:
    """Whether they are the same, and one line about it."""
    if export.shape != expected.shape or export.dtype != expected.dtype:
        return False, (
            f"DIFFERENT: logits are {export.dtype} {list(export.shape)}, "
            f"expected {expected.dtype} {list(expected.shape)}"
        )
    shape = " x ".join(map(str, export.shape))
    if not torch.isfinite(expected).all():
        return False, "DIFFERENT: the expected logits are not finite"
    if torch.equal(export, expected):
        return True, f"the same: {shape} logits, equal to the bit"
    off = (export.double() - expected.double()).abs().max().item()
    if (options.atol or options.rtol) and torch.allclose(export, expected, atol=options.atol, rtol=options.rtol):
        return True, f"close enough: {shape} logits, at most {off:.3g} apart"
    return False, f"DIFFERENT: {shape} logits, up to {off:.3g} apart"


def check(options: argparse.Namespace) -> tuple[bool, str]:
    """
    Load what is to be compared and compare it.

    Raises:
        CheckFailed: Something cannot be loaded.
    """
    model = load_pretrained(options.export, options)
    if options.logits is not None:
        input_ids, expected = load_logits(options.logits)
        return compare(answer(model, input_ids), expected, options)
    input_ids = text_inputs(model, options)
    got = answer(model, input_ids)
    if options.checkpoint is not None:
        load_dcp(model, options.checkpoint, options.key)
    else:
        del model  # two large models need not be in memory at the same time
        model = load_pretrained(options.reference, options)
    return compare(got, answer(model, input_ids), options)


def load_logits(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids and logits that a trainer stored."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        return stored["input_ids"], stored["logits"]
    except Exception as error:
        raise CheckFailed(f"{path} holds no input_ids and logits: {error!r}") from error


def dtype(text: str) -> torch.dtype:
    """The argparse type of a dtype."""
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise argparse.ArgumentTypeError(f"torch has no dtype {text!r}")
    return found


def main(arguments: Sequence[str]) -> int:
    """Check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="the directory of the export, like RUN/hf/hf-latest")
    against: Any = parser.add_mutually_exclusive_group(required=True)
    against.add_argument("--reference", type=Path, help="a model directory that must answer the same")
    against.add_argument("--checkpoint", type=Path, help="a DCP checkpoint that must answer the same")
    against.add_argument("--logits", type=Path, help="a file with input_ids and logits")
    parser.add_argument("--key", default="model", help="the model's name in the saved state (default: model)")
    parser.add_argument("--dtype", type=dtype, help="compute in this dtype instead of the export's")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=32, help="tokens per text")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; sums depend on it (default: 1)")
    parser.add_argument("--atol", type=float, default=0.0)
    parser.add_argument("--rtol", type=float, default=0.0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    try:
        same, text = check(options)
    except CheckFailed as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    print(text)
    return SAME if same else DIFFERENT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
