"""What the ranks bring to a call of the manager: arguments that make sense, and that are the same on every rank."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from ckptmgr.errors import InvalidArgument, RanksDisagree
from ckptmgr.manifest import is_text
from ckptmgr.ranks import Ranks

MAX_STEP = 10**15
#: The calls that all ranks make together, and which arguments they must agree on besides series and step.
_CALLS: dict[str, tuple[str, ...]] = {
    "CheckpointManager": (),
    "save": ("overwrite",),
    "warm_up": (),
    "resume": ("allow_older", "verify_digests"),
}
#: Values of options, by the numbers with which ranks compare them.
_OPTIONS = (False, True, "meanwhile")
#: Integers that each rank brings to a call; the same for all calls, so that different ones can be told apart.
_ROW = 9


class Calls:
    """
    The calls that all ranks make together.

    Args:
        ranks: This rank among the others.
        series: The names of all series, in the order in which every rank was given them.
    """

    def __init__(self, ranks: Ranks, series: Sequence[str] = ()) -> None:
        self._ranks = ranks
        self._series = list(series)

    def arguments(self, series: object, step: object = None, *options: object) -> list[int]:
        """As the ranks compare them; 0 stands for one that is missing, or wrong on this rank."""
        number = self._series.index(series) + 1 if isinstance(series, str) and series in self._series else 0
        at = step + 1 if isinstance(step, int) and 0 <= step < MAX_STEP else 0
        return [number, at, *map(_number_of, options)]

    def meet(
        self, call: str, arguments: Sequence[int], error: Exception | None, *, extra: Sequence[int] = ()
    ) -> list[int]:
        """
        Begin a call together: all ranks make the same one, with the same arguments, or all raise. All ranks must call.

        Returns:
            The highest of every rank's *extra* integers.

        Raises:
            RanksDisagree: The ranks called different things.
            CheckpointError: A rank has an *error*; as in `Ranks.all_or_none`.
        """
        calls = list(_CALLS)
        mine = [calls.index(call), error is not None, len(extra), *extra, *arguments]
        row = [int(value) for value in (*mine, *[0] * (_ROW - len(mine)))]
        lowest, highest = self._ranks.agree(row)
        if lowest[0] != highest[0]:
            made = tuple(calls[one[0]] for one in self._ranks.rows(row))
            raise RanksDisagree(f"the ranks make different calls: {', '.join(made)}", what="call", values=made)
        if highest[1]:
            self._ranks.all_or_none(error, call)
        given = 3 + len(extra)
        if lowest[given:] != highest[given:]:
            values = tuple(self._spelled(call, *one[given:]) for one in self._ranks.rows(row))
            raise RanksDisagree(f"the ranks call {call} with different arguments", what=call, values=values)
        return highest[3:given]

    def _spelled(self, call: str, first: int, step: int = 0, *options: int) -> str:
        """What `arguments` made, in words; of a manager only a fingerprint passes between ranks."""
        if call == "CheckpointManager":
            return f"series, on_failure, when_busy, capture, timeouts and permissions #{first:x}"
        words = [str(step - 1)] if step else []
        words += [f"series={self._series[first - 1]!r}"]
        words += [f"{name}={_OPTIONS[value]!r}" for name, value in zip(_CALLS[call], options, strict=False)]
        return f"{call}({', '.join(words)})"


def fingerprint(*values: object) -> int:
    """A number that is the same on every rank for the same *values*."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=7).digest(), "big")


def instance(name: str, value: Any, kind: Any) -> Any:
    """
    The argument *value*, which must be of that *kind*.

    Raises:
        InvalidArgument: It is not.
    """
    if not isinstance(value, kind):
        raise InvalidArgument(f"{name} is {value!r}, a {type(value).__name__}", hint="see `help(CheckpointManager)`")
    return value


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    """
    The argument *value*, which must be one of the words.

    Raises:
        InvalidArgument: It is not.
    """
    if value not in allowed:
        raise InvalidArgument(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def step_of(step: Any) -> int:
    """
    A step as an int.

    Raises:
        InvalidArgument: It is none.
    """
    try:
        number = operator.index(step)
    except Exception:  # noqa: BLE001 - as for metrics
        number = -1
    if isinstance(step, bool) or not 0 <= number < MAX_STEP:
        raise InvalidArgument(f"step is {step!r}; it must be a whole number from 0 to {MAX_STEP - 1}")
    return number


def metrics_of(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """
    Names and finite floats.

    Raises:
        InvalidArgument: They are not.
    """
    if metrics is not None and not isinstance(metrics, Mapping):
        raise InvalidArgument(f"metrics is {metrics!r}; it must be a mapping of names to numbers")
    numbers: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        try:
            number = float(value)
        except Exception:  # noqa: BLE001 - a tensor refuses as it likes, and the other ranks wait to hear of it
            number = math.nan
        if not is_text(name) or not math.isfinite(number):
            raise InvalidArgument(f"metric {name!r} is {value!r}; metrics are names with finite numbers")
        numbers[name] = number
    return numbers


def _number_of(option: object) -> int:
    return _OPTIONS.index(option) if isinstance(option, str) and option in _OPTIONS else int(bool(option))
