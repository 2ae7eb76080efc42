"""
For trainers that log: the numbers of each commit into the log that they have already.

Of no other library: whatever takes a name, a value and a step will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ckptmgr import durability

if TYPE_CHECKING:
    from ckptmgr.commit import Committed
    from ckptmgr.lifecycle import CheckpointRecord

__all__ = ["log_commits"]


def log_commits(log: Callable[[str, float, int], object], *, prefix: str = "ckptmgr") -> Callable[[Committed], None]:
    """
    A hook for ``on_commit=`` that logs how durable each commit was.

    Args:
        log: Called on rank 0, on the thread of the hooks, as ``log(name, value, step)``; TensorBoard's
            ``add_scalar`` is one.
        prefix: Names are ``prefix/series/number``, the number one of `durability.COMMIT_NUMBERS`.
    """
    newest: dict[str, CheckpointRecord] = {}

    def hook(committed: Committed) -> None:
        before = newest.get(committed.series)
        newest[committed.series] = committed.record
        for name, value in durability.of_commit(committed.record, before=before).items():
            log(f"{prefix}/{committed.series}/{name}", float(value), committed.step)

    return hook
