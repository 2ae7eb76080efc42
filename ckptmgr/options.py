"""
What can be tuned, in one place: timeouts in seconds, how writers treat the machine, and who may read what is written.

Every field can be given in code or, where the call site cannot be changed, by the environment
variable named ``CKPTMGR_<FIELD>`` in upper case; code wins over the environment. The table in
docs/reference/options.md is held to this file by a test.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import re
from collections.abc import Mapping
from typing import Any, Self

from ckptmgr.errors import InvalidArgument

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _FromEnvironment:
    """Fields left at None take the environment's value, else the default named in the field."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is None:
                text = os.environ.get(variable(field.name))
                value = field.metadata["parse"](field.name, text) if text else field.metadata["default"]
            else:
                value = field.metadata["parse"](field.name, value)
            object.__setattr__(self, field.name, value)

    def replace(self, **changes: Any) -> Self:
        """The same options with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def variable(field_name: str) -> str:
    """The environment variable that sets an option."""
    return f"CKPTMGR_{field_name.upper()}"


def parse_size(size: int | str) -> int:
    """
    Bytes, from a number or from text like ``"5GB"`` or ``"512MiB"``.

    Raises:
        InvalidArgument: Neither, or not above 0.
    """
    try:
        text = str(size)
    except ValueError:  # of a number with thousands of digits
        text = ""
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]{0,3})\s*", text)
    if isinstance(size, bool) or match is None or match[2].upper() not in _UNITS:
        raise InvalidArgument(f"{text[:80]!r} is not a size; give bytes or text like '5GB'")
    count = float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= count < 1 << 63:
        raise InvalidArgument(f"{size!r} is not a size from 1 byte to 8 EiB")
    return int(count)


def _seconds(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number < 1e9:
        raise InvalidArgument(f"{name} is {value!r}; it must be a number of seconds above 0")
    return number


def _whole(low: int, high: int) -> Any:
    def parse(name: str, value: Any) -> int:
        try:
            number = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise InvalidArgument(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
        return number

    return parse


def _io_class(name: str, value: Any) -> str:
    if value not in ("none", "best-effort", "idle"):
        raise InvalidArgument(f"{name} is {value!r}; it must be 'none', 'best-effort' or 'idle'")
    return str(value)


def _mode(allowed: int, required: int) -> Any:
    def parse(name: str, value: Any) -> int:
        try:
            number = int(value, 8) if isinstance(value, str) else operator.index(value)
        except (TypeError, ValueError):
            number = 0
        if isinstance(value, bool) or number & ~allowed or number & required != required:
            shown = oct(value) if isinstance(value, int) else repr(value)
            raise InvalidArgument(
                f"{name} is {shown}; it must be a mode with all bits of 0o{required:o} and none beyond 0o{allowed:o}",
                hint="write it in octal: 0o640 in code, 0640 in the environment",
            )
        return number

    return parse


def _option(default: Any, parse: Any) -> Any:
    return dataclasses.field(default=None, metadata={"default": default, "parse": parse})


@dataclasses.dataclass(frozen=True)
class Timeouts(_FromEnvironment):
    """How long anything may wait, in seconds. Nothing waits without a limit."""

    setup_s: float = _option(300.0, _seconds)
    """For every rank to be ready in the constructor, writer process included."""
    write_s: float = _option(1800.0, _seconds)
    """
    For one rank to read the state (with ``capture="overlap"``), write and sync one save; then its writer is
    killed and the save has failed.
    """
    gather_s: float = _option(60.0, _seconds)
    """Beyond write_s, for the slowest rank's status to reach rank 0; then that rank is silent."""
    collective_s: float = _option(600.0, _seconds)
    """For all ranks to arrive at the same ``save``, ``resume`` or ``warm_up``, or in the constructor."""
    close_s: float = _option(3600.0, _seconds)
    """For what is in flight when the manager is closed; then it is failed and the writer killed."""
    close_on_error_s: float = _option(60.0, _seconds)
    """The same when the with-block is left on an exception."""


@dataclasses.dataclass(frozen=True)
class WriterOptions(_FromEnvironment):
    """How the writer process of each rank treats the machine it shares with the training."""

    write_slots: int = _option(2, _whole(0, 1024))
    """How many ranks of one host write at the same time; 0 means no limit."""
    nice: int = _option(10, _whole(0, 19))
    """CPU niceness of the writer process."""
    io_class: str = _option("none", _io_class)
    """I/O scheduling class of the writer: none (derived from nice), best-effort or idle."""
    max_bytes_per_second: int = _option(0, _whole(0, 1 << 50))
    """How fast the writer of each rank writes at most; 0 means no limit."""


@dataclasses.dataclass(frozen=True)
class Permissions(_FromEnvironment):
    """
    The modes of everything that is created: files and directories of the run, journal, lock, backups.

    With a mode the umask does not count; without one it decides, as for any other program. In the
    environment modes are octal digits, like ``0640``.
    """

    file_mode: int | None = _option(None, _mode(0o666, 0o600))
    """Mode of every file; None leaves it to the umask (0o666 without its bits)."""
    directory_mode: int | None = _option(None, _mode(0o2777, 0o700))
    """Mode of every directory; None leaves it to the umask (0o777 without its bits)."""


def defaults() -> Mapping[str, Any]:
    """Every option's default by field name, as the documentation states them."""
    fields = (*dataclasses.fields(Timeouts), *dataclasses.fields(WriterOptions), *dataclasses.fields(Permissions))
    return {field.name: field.metadata["default"] for field in fields}
