"""
What a trainer hands over: PyTorch's ``Stateful`` protocol, per-rank state, and safe serialisation.

Small values are stored with ``torch.save`` and only ever read back by `archives`, so a checkpoint cannot
run code. A value that could not be read back that way is refused when it is saved.
"""

from __future__ import annotations

import functools
import io
import random
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import numpy
import torch
from torch.distributed.checkpoint.state_dict import _init_optim_state  # no public way to do this
from torch.distributed.checkpoint.stateful import Stateful

from ckptmgr.errors import CorruptCheckpoint, InvalidArgument
from ckptmgr.manifest import is_text
from ckptmgr.pickles import is_simple_key
from ckptmgr.writers import archives

State = Mapping[str, Any]

#: Longer integers get a pickle opcode that is not read back.
_LONG_BITS = 2000
#: Characters of a text whose bytes are remembered, as those of numbers are; a longer one is as quickly dumped anew.
_SHORT = 200
#: A state of Python's generator has 625 numbers, and there may be one for each of many GPUs.
_MAX_RANDOM_PARTS = 10_000
_PLAIN = (bool, float, complex, str, bytes, type(None), torch.Size, torch.dtype)


class PerRank:
    """
    State that differs by rank: a data loader, random number generators.

    It is stored once per rank and given back to the same rank. Resuming with another number of ranks
    cannot do that, which is a finding of the resume checker and an `UnsafeResume` from ``resume``,
    unless *when_resized* is ``"skip"``: then the object is left as it is.

    Args:
        value: An object with ``state_dict`` and ``load_state_dict``, or a plain value, which is found
            in ``value`` after resuming.
        when_resized: ``"refuse"`` or ``"skip"``.
    """

    def __init__(self, value: Any, *, when_resized: Literal["refuse", "skip"] = "refuse") -> None:
        if when_resized not in ("refuse", "skip"):
            raise InvalidArgument(f"when_resized is {when_resized!r}; it must be 'refuse' or 'skip'")
        self.value = value
        self.when_resized = when_resized

    def take(self) -> Any:
        """The state to store."""
        return self.value.state_dict() if isinstance(self.value, Stateful) else self.value

    def give_back(self, state: Any) -> None:
        """Hand stored state back."""
        if isinstance(self.value, Stateful):
            self.value.load_state_dict(state)
        else:
            self.value = state


class RandomState:
    """The random number generators of this process (Python, NumPy, PyTorch on CPU and GPUs), for `PerRank`."""

    def state_dict(self) -> dict[str, Any]:
        """The generators' states."""
        state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Put the generators back where they were.

        Raises:
            CorruptCheckpoint: That is no state of theirs.
        """
        try:
            archives.check_parts(state, _MAX_RANDOM_PARTS)
            random.setstate(_python_state(state["python"]))
            _check_numpy(state["numpy"])
            numpy.random.set_state(state["numpy"])
            torch.set_rng_state(state["torch"])
            if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
                torch.cuda.set_rng_state_all(state["cuda"])
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise CorruptCheckpoint(
                f"the state of the random number generators is none: {error}", directory="", mismatches=(str(error),)
            ) from error


def _python_state(state: Any) -> tuple[Any, ...]:
    """Older versions' states, which Python takes too, have remainders taken of them: of text, that is a format."""
    version, internal, gauss = state
    if type(version) is not int or version != random.getstate()[0] or type(gauss) not in (float, type(None)):
        raise ValueError("the state of Python's generator is none")
    return version, tuple(internal), gauss


def _check_numpy(state: Any) -> None:
    """
    Refuse a state with a position outside of what it is one in: NumPy takes any, and reads there.

    It has two forms, of which the tuple is MT19937's alone, and a mapping may be of any generator.
    """
    if type(state) is tuple:
        name, key, position, *_ = state
        least, most = 0, 624
    elif type(state) is dict:
        name, inner = state["bit_generator"], state["state"]
        key, position, least, most = None, 0, 0, 0
        if name == "MT19937":
            key, position, most = inner["key"], inner["pos"], 624
        elif name == "Philox":
            position, most = state["buffer_pos"], 4
    else:
        raise TypeError("the state of NumPy's generator is none")
    if type(name) is not str or type(position) is not int or not least <= position <= most:
        raise ValueError("the state of NumPy's generator is none")
    if name == "MT19937" and numpy.shape(key) != (624,):
        raise ValueError("the state of NumPy's generator is none")


def split(state: State) -> tuple[dict[str, Any], dict[str, PerRank]]:
    """
    Tell shared state from per-rank state.

    Raises:
        InvalidArgument: *state* is not a mapping from non-empty names.
    """
    if not isinstance(state, Mapping) or not state:
        raise InvalidArgument(f"state must be a non-empty mapping from names to objects, not {type(state).__name__}")
    for name in state:
        if not is_text(name) or not name:
            raise InvalidArgument(f"state has the name {name!r}; names must be non-empty text")
    per_rank = {name: value for name, value in state.items() if isinstance(value, PerRank)}
    shared = {name: value for name, value in state.items() if name not in per_rank}
    return shared, per_rank


def take(shared: Mapping[str, Any]) -> dict[str, Any]:
    """The state dicts of *shared*, as ``torch.distributed.checkpoint`` would take them; tensors are not copied."""
    return {name: value.state_dict() if isinstance(value, Stateful) else value for name, value in shared.items()}


def ready_optimizers(shared: Mapping[str, Any]) -> None:
    """Give fresh optimizers their state tensors, so that there is something to load into."""
    for value in shared.values():
        if isinstance(value, torch.optim.Optimizer):
            _init_optim_state(value)


def dump(value: Any, what: str) -> bytes:
    """
    *value* as bytes that `load` reads back.

    Raises:
        InvalidArgument: It holds something that could only be read back by running code.
    """
    short = len(value) <= _SHORT if type(value) is str else type(value) in (bool, int, float, type(None))
    if short and _is_plain(value):
        return _dump_scalar(type(value).__name__, repr(value), value)
    try:
        data = _serialise(value)
        archives.check_parts(value, archives.most_parts(len(data)))
        if not _is_plain(value):
            load(data, what)
    except Exception as error:
        raise InvalidArgument(
            f"{what} cannot be stored safely: {getattr(error, 'message', error)}",
            hint="let state_dict() return tensors, arrays, numbers, text and containers of them",
        ) from error
    return data


@functools.lru_cache(maxsize=512)
def _dump_scalar(kind: str, text: str, value: Any) -> bytes:
    """Optimizers and schedulers have hundreds of numbers that hardly change; kind and text keep 1, 1.0, True apart."""
    del kind, text
    return _serialise(value)


def _serialise(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load(data: bytes, what: str) -> Any:
    """
    Read back what `dump` wrote, on the CPU, without running code.

    Raises:
        CorruptCheckpoint: The bytes are something else.
    """
    return archives.load(archives.Source(data), what)


def _is_plain(value: Any) -> bool:
    if type(value) is int:
        return value.bit_length() < _LONG_BITS
    if type(value) in _PLAIN:
        return True
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    if type(value) in (dict, OrderedDict):
        return all(is_simple_key(key) and _is_plain(item) for key, item in value.items())
    return False
