"""
Checkpoints a training run can trust.

The names below are loaded on first use, so that the command line tools start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptmgr.answers import PendingSave as PendingSave
    from ckptmgr.answers import Resumed as Resumed
    from ckptmgr.commit import Committed as Committed
    from ckptmgr.errors import CheckpointError as CheckpointError
    from ckptmgr.errors import CheckpointNotFound as CheckpointNotFound
    from ckptmgr.errors import CorruptCheckpoint as CorruptCheckpoint
    from ckptmgr.errors import ForeignJournal as ForeignJournal
    from ckptmgr.errors import IllegalTransition as IllegalTransition
    from ckptmgr.errors import InvalidArgument as InvalidArgument
    from ckptmgr.errors import JournalCorrupt as JournalCorrupt
    from ckptmgr.errors import JournalError as JournalError
    from ckptmgr.errors import JournalNotFound as JournalNotFound
    from ckptmgr.errors import JournalSchemaMismatch as JournalSchemaMismatch
    from ckptmgr.errors import LockUnsupported as LockUnsupported
    from ckptmgr.errors import ManagerClosed as ManagerClosed
    from ckptmgr.errors import MissingLibrary as MissingLibrary
    from ckptmgr.errors import RankFailure as RankFailure
    from ckptmgr.errors import RanksDisagree as RanksDisagree
    from ckptmgr.errors import RunLocked as RunLocked
    from ckptmgr.errors import SaveFailed as SaveFailed
    from ckptmgr.errors import SaveInFlight as SaveInFlight
    from ckptmgr.errors import SetupFailed as SetupFailed
    from ckptmgr.errors import StaleWriter as StaleWriter
    from ckptmgr.errors import StateChanged as StateChanged
    from ckptmgr.errors import StateMismatch as StateMismatch
    from ckptmgr.errors import StepAlreadySaved as StepAlreadySaved
    from ckptmgr.errors import UnsafePath as UnsafePath
    from ckptmgr.errors import UnsafeResume as UnsafeResume
    from ckptmgr.errors import WaitTimeout as WaitTimeout
    from ckptmgr.lifecycle import CheckpointRecord as CheckpointRecord
    from ckptmgr.lifecycle import CheckpointState as CheckpointState
    from ckptmgr.manager import CheckpointManager as CheckpointManager
    from ckptmgr.options import Permissions as Permissions
    from ckptmgr.options import Timeouts as Timeouts
    from ckptmgr.options import WriterOptions as WriterOptions
    from ckptmgr.resume import Finding as Finding
    from ckptmgr.resume import ResumeReport as ResumeReport
    from ckptmgr.retention import KeepAll as KeepAll
    from ckptmgr.retention import KeepBest as KeepBest
    from ckptmgr.retention import KeepEvery as KeepEvery
    from ckptmgr.retention import KeepFor as KeepFor
    from ckptmgr.retention import KeepLast as KeepLast
    from ckptmgr.series import Series as Series
    from ckptmgr.writers.dcp import DCP as DCP
    from ckptmgr.writers.huggingface import HuggingFace as HuggingFace
    from ckptmgr.writers.state import PerRank as PerRank
    from ckptmgr.writers.state import RandomState as RandomState

_HOMES = {
    "errors": (
        "CheckpointError",
        "CheckpointNotFound",
        "CorruptCheckpoint",
        "ForeignJournal",
        "IllegalTransition",
        "InvalidArgument",
        "JournalCorrupt",
        "JournalError",
        "JournalNotFound",
        "JournalSchemaMismatch",
        "LockUnsupported",
        "ManagerClosed",
        "MissingLibrary",
        "RankFailure",
        "RanksDisagree",
        "RunLocked",
        "SaveFailed",
        "SaveInFlight",
        "SetupFailed",
        "StaleWriter",
        "StateChanged",
        "StateMismatch",
        "StepAlreadySaved",
        "UnsafePath",
        "UnsafeResume",
        "WaitTimeout",
    ),
    "answers": ("PendingSave", "Resumed"),
    "commit": ("Committed",),
    "lifecycle": ("CheckpointRecord", "CheckpointState"),
    "manager": ("CheckpointManager",),
    "options": ("Permissions", "Timeouts", "WriterOptions"),
    "resume": ("Finding", "ResumeReport"),
    "retention": ("KeepAll", "KeepBest", "KeepEvery", "KeepFor", "KeepLast"),
    "series": ("Series",),
    "writers.dcp": ("DCP",),
    "writers.huggingface": ("HuggingFace",),
    "writers.state": ("PerRank", "RandomState"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - the table is the list


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("ckptmgr")
    if name not in _HOME_OF:
        # `ckptmgr.errors` and the other modules, without an import statement of their own.
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
