"""
The seal: what the rows of a journal add up to, so that a bit that flips in one does not pass for a fact.

SQLite has no checksums. A flipped bit in a row is another step, another digest or a checkpoint that is
gone, and reads like any other row. So each transaction also records, part by part, how many rows there
are and the sum of their digests modulo 2^128; whoever reads a part compares. It is a sum because a sum can
follow a change without reading the rest. A part is a table; of the tables that grow with every save, the
rows of one checkpoint, so that reading one checkpoint costs no more than it has.

One part more is the outline of the attempts: of each row only what questions choose by. It takes a fifth of the
time to add up, so that a reader which finds it right compares whole rows only of the attempts that it reads. It
decides nothing: where it is not right, or not there, everything is compared.

The sums follow by triggers that exist only on our writing connection: what anybody else changes is not
sealed, and is found like damage. They never launder: a change subtracts what was there when it was made,
so a row that was damaged before makes the sum wrong for ever.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from ckptmgr.manifest import digest_number

#: Tables that are sealed by checkpoint, with the place of its number in a row, and its name.
BY_CHECKPOINT = {"checkpoint": (0, "id")} | {
    "file": (0, "checkpoint_id"),
    "transition": (1, "checkpoint_id"),
    "verification": (1, "checkpoint_id"),
}
#: Tables that decide what may be resumed, deleted and listed; the empty name stands for the schema itself.
DECISIVE = ("", "alembic_version", "run", "epoch", "checkpoint", "pin", "retirement_decision")
#: Those of them whose rows a reader compares when it reads them, where the outline is right.
COMPARED_WHEN_READ = ("checkpoint", "retirement_decision")
OUTLINE = "outline"
_WHOLE = 0
#: So many rows are digested together.
_AT_ONCE = 400
_MODULUS = 1 << 128
_NOTHING = (0, "0" * 32)
_HEX = re.compile(r"[0-9a-f]{32}")
_SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"

#: Whole numbers, texts, and whether there is a time; never a time itself, which versions of SQLite may write in
#: different words.
_CHOSEN_BY = " || ',' || ".join(
    (
        *(
            f"quote({{row}}.{column})"
            for column in ("id", "series", "step", "format", "state", "directory", "staging_directory", "commit_seq")
        ),
        "({row}.retire_started_at IS NULL)",
        "({row}.retired_at IS NULL)",
    )
)

_as_text = json.JSONEncoder(default=repr).encode

Part = tuple[str, int]


class Seal:
    """
    Follows what one connection changes, and records it when asked.

    Args:
        connection: Ours, for writing.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._changes: dict[Part, list[int]] = {}
        self._raised: BaseException | None = None
        connection.create_function("ckptmgr_seal", -1, self._follow)
        connection.execute("PRAGMA temp_store=MEMORY").close()
        for table in _tables(connection):
            columns = [_quoted(column[1]) for column in connection.execute(f"PRAGMA table_info({_quoted(table)})")]
            text = "'" + table.replace("'", "''") + "'"
            gone, come = (
                f"SELECT ckptmgr_seal({sign}, {text}, {', '.join(f'{row}.{column}' for column in columns)});"
                + (f"SELECT ckptmgr_seal({sign}, '{OUTLINE}', {_CHOSEN_BY.format(row=row)});" * (table == "checkpoint"))
                for sign, row in ((-1, "OLD"), (1, "NEW"))
            )
            for event, what in (("INSERT", come), ("UPDATE", gone + come), ("DELETE", gone)):
                name = _quoted(f"seal_{table}_{event.lower()}")
                connection.execute(
                    f"CREATE TEMP TRIGGER {name} AFTER {event} ON main.{_quoted(table)} BEGIN {what} END"
                ).close()

    def begin(self) -> None:
        """Forget what a transaction that was rolled back had changed."""
        self._changes.clear()
        self._raised = None

    def lost(self, error: Exception) -> BaseException | None:
        """What is behind SQLite's *error* where that only says that our function raised something."""
        if str(getattr(error, "orig", error)) != "user-defined function raised exception":
            return None
        # Else a signal's handler raised it before the function's first line, and that is Ctrl-C.
        return self._raised or KeyboardInterrupt()

    def record(self) -> None:
        """Add what this transaction has changed to what is recorded, within it."""
        for part, (rows, total) in self._changes.items():
            rows_before, total_before = _recorded(self._connection, part)
            if type(rows_before) is not int or _HEX.fullmatch(str(total_before)) is None:
                # Nothing that we wrote: a sum that will never be right again.
                rows_before, total_before = _NOTHING
            _write(self._connection, part, rows_before + rows, _text(int(total_before, 16) + total))
        self._changes.clear()

    def _follow(self, sign: int, table: str, *row: Any) -> None:
        try:
            change = self._changes.setdefault(_part(table, row), [0, 0])
            change[0] += sign
            change[1] += sign * _digest(table, row)
        except BaseException as error:
            self._raised = error
            raise


def is_there(connection: sqlite3.Connection) -> bool:
    """Whether this journal has a seal; those of schema 0001 have none."""
    return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'seal'").fetchone())


def renew(connection: sqlite3.Connection) -> None:
    """Seal everything as it stands now, within the caller's transaction: after a migration, and never else."""
    connection.execute("DELETE FROM seal").close()
    for table in (*all_tables(connection), OUTLINE):
        for part, (rows, total) in _added_up(table, _rows(connection, table)).items():
            _write(connection, part, rows, total)


def draw(connection: sqlite3.Connection) -> None:
    """Have the outline say what the rows say, within the caller's transaction; the rows have been compared."""
    ((part, (rows, total)),) = _added_up(OUTLINE, _rows(connection, OUTLINE)).items()
    _write(connection, part, rows, total)


def broken(connection: sqlite3.Connection, table: str, checkpoints: Iterable[int] | None = None) -> str | None:
    """
    Why the rows of *table* are not those that were recorded, in words; None if they are.

    Args:
        connection: In a transaction, so that rows and seal are of one moment.
        table: Which table; the empty name stands for the schema, `OUTLINE` for the outline.
        checkpoints: Of a table that is sealed by checkpoint: whose rows; None for all.
    """
    if checkpoints is None or table not in BY_CHECKPOINT:
        recorded = {
            (table, of): (rows, digest)
            for of, rows, digest in connection.execute(
                "SELECT checkpoint_id, rows, digest FROM seal WHERE name = ?", (table,)
            )
        }
        return _compare(recorded, _added_up(table, _rows(connection, table)))
    ordered = sorted(checkpoints)
    for start in range(0, len(ordered), _AT_ONCE):
        few = ordered[start : start + _AT_ONCE]
        among = f"IN ({', '.join('?' * len(few))})"
        recorded = {
            (table, of): (rows, digest)
            for of, rows, digest in connection.execute(
                f"SELECT checkpoint_id, rows, digest FROM seal WHERE name = ? AND checkpoint_id {among}",  # noqa: S608
                (table, *few),
            )
        }
        rows = connection.execute(f"SELECT * FROM {table} WHERE {BY_CHECKPOINT[table][1]} {among}", few)  # noqa: S608
        if why := _compare(recorded, _added_up(table, rows)):
            return why
    return None


def all_tables(connection: sqlite3.Connection) -> list[str]:
    """Everything that is sealed, the schema first."""
    return ["", *_tables(connection)]


def _added_up(table: str, cursor: sqlite3.Cursor) -> dict[Part, tuple[int, str]]:
    """How many rows of each part there are, and their sum as the seal has it."""
    place = BY_CHECKPOINT[table][0] if table in BY_CHECKPOINT else None
    found: dict[int, list[int]] = {} if place is not None else {_WHOLE: [0, 0]}
    while rows := cursor.fetchmany(_AT_ONCE):
        for row, digest in zip(rows, _digests(table, rows), strict=True):
            of = _WHOLE if place is None else row[place]
            here = found.get(of)
            if here is None:
                here = found[of] = [0, 0]
            here[0] += 1
            here[1] += digest
    return {(table, of): (number, _text(total)) for of, (number, total) in found.items()}


def _compare(recorded: dict[Part, tuple[int, str]], found: dict[Part, tuple[int, str]]) -> str | None:
    if recorded == found:
        return None
    for part in sorted(recorded.keys() | found.keys(), key=str):
        before, now = recorded.get(part, _NOTHING), found.get(part, _NOTHING)
        if before != now:
            what = (f"table {part[0]}" if part[0] else "the schema") + (f", checkpoint {part[1]}," if part[1] else "")
            if before[0] != now[0]:
                return f"{what} has {now[0]} rows, and {before[0]} were written"
            return f"{what} has other rows than were written"
    return None


def _recorded(connection: sqlite3.Connection, part: Part) -> tuple[int, str]:
    row = connection.execute("SELECT rows, digest FROM seal WHERE name = ? AND checkpoint_id = ?", part).fetchone()
    return _NOTHING if row is None else tuple(row)


def _write(connection: sqlite3.Connection, part: Part, rows: int, total: str) -> None:
    connection.execute(
        "INSERT INTO seal (name, checkpoint_id, rows, digest) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (name, checkpoint_id) DO UPDATE SET rows = excluded.rows, digest = excluded.digest",
        (*part, rows, total),
    ).close()


def _tables(connection: sqlite3.Connection) -> list[str]:
    rows = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    ).fetchall()
    return [name for (name,) in rows if name != "seal"]


def _rows(connection: sqlite3.Connection, table: str) -> sqlite3.Cursor:
    if table == OUTLINE:
        return connection.execute(f"SELECT {_CHOSEN_BY.format(row='checkpoint')} FROM checkpoint NOT INDEXED")  # noqa: S608
    return connection.execute(f"SELECT * FROM {_quoted(table)}" if table else _SCHEMA)  # noqa: S608


def _text(total: int) -> str:
    return f"{total % _MODULUS:032x}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _part(table: str, row: tuple[Any, ...]) -> Part:
    return (table, row[BY_CHECKPOINT[table][0]]) if table in BY_CHECKPOINT else (table, _WHOLE)


def _digest(table: str, row: tuple[Any, ...]) -> int:
    """A number for a row that no other has; JSON tells 1 from 1.0 and from "1". A BLOB would be damage anyway."""
    return digest_number(_as_text((table, *row)).encode())


def _digests(table: str, rows: Sequence[tuple[Any, ...]]) -> list[int]:
    """What `_digest` says of each row; their JSON is made in one go, which takes a third less time."""
    begin = f"[{_as_text(table)}, "
    # Nothing within a row is this border: in a JSON string a quote would have a backslash before it.
    texts = _as_text([(table, *row) for row in rows])[len(begin) + 1 : -2].split("], " + begin)
    return [digest_number(f"{begin}{text}]".encode()) for text in texts]
