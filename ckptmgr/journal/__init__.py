"""
The journal: a SQLite file that decides what may be resumed, deleted and listed.

The one door for SQLAlchemy, Alembic and sqlite3: frozen records go out, `CheckpointError`s come
out, and nothing of those libraries does. Importing this package loads none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptmgr.journal.questions import Decision, Pin, Questions, Verification
    from ckptmgr.journal.store import Journal

#: The newest migration. Ids are four digits in one line, so a larger one is a newer one.
REVISION = "0002"

__all__ = ["REVISION", "Decision", "Journal", "Pin", "Questions", "Verification"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Journal":
        from ckptmgr.journal import store

        return store.Journal
    from ckptmgr.journal import questions

    return getattr(questions, name)
