"""Series: the lines of checkpoints that a manager keeps, as its user names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from ckptmgr.errors import InvalidArgument
from ckptmgr.retention import KeepAll, KeepRule
from ckptmgr.rundir import check_series_name
from ckptmgr.writers.dcp import DCP
from ckptmgr.writers.huggingface import HuggingFace


@dataclasses.dataclass(frozen=True)
class Series:
    """
    A line of checkpoints of one kind, kept by one rule.

    Args:
        name: Its directory in the run directory: letters, digits, ``_`` and ``-``.
        format: `DCP` or `HuggingFace`.
        keep: Which checkpoints stay when a new one has committed; everything unless told otherwise.
    """

    name: str
    format: DCP | HuggingFace
    keep: KeepRule = dataclasses.field(default_factory=KeepAll)

    def __post_init__(self) -> None:
        check_series_name(self.name)
        if not isinstance(self.format, DCP | HuggingFace):
            raise InvalidArgument(f"series {self.name!r}: format must be DCP() or HuggingFace(...)")
        if not isinstance(self.keep, KeepRule):
            raise InvalidArgument(f"series {self.name!r}: keep must be a keep rule, like KeepLast(3)")


def by_name(series: Sequence[Series] | None) -> dict[str, Series]:
    """
    The series of a manager by their names; one called "checkpoint" where none are given.

    Raises:
        InvalidArgument: There is none, one is no `Series`, or two have the same name.
    """
    given: list[Series] = [Series("checkpoint", DCP())] if series is None else []
    if isinstance(series, Iterable):
        given += series
    if not given or not all(isinstance(one, Series) for one in given):
        raise InvalidArgument("series must be a non-empty list of Series")
    named = {one.name: one for one in given}
    if len({name.casefold() for name in named}) != len(given):
        raise InvalidArgument(f"two series have the same name: {', '.join(one.name for one in given)}")
    return named
