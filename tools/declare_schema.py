#!/usr/bin/env python3
"""
Write into ckptmgr/journal/declared.py what ckptmgr/journal/schema.py declares, as plain data.

    tools/declare_schema.py            rewrite what stands below the line
    tools/declare_schema.py --check    change nothing; end with 1 if it says something else
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from ckptmgr.journal import schema

PAGE = Path(__file__).resolve().parent.parent / "ckptmgr" / "journal" / "declared.py"
LINE = "# --- made by tools/declare_schema.py ---\n"
#: Alembic's own table, as it makes it.
_VERSIONS = """
CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL,
 CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"""


def declare() -> str:
    """What belongs below the line."""
    dialect = sqlite.dialect()
    statements = {"alembic_version": _VERSIONS, **schema.TRIGGERS}
    columns = ""
    for table in schema.metadata.sorted_tables:
        statements[table.name] = str(CreateTable(table).compile(dialect=dialect))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            statements[str(index.name)] = str(CreateIndex(index).compile(dialect=dialect))
        kinds = [(c.name, c.type.python_type.__name__, c.nullable is True) for c in table.columns]
        columns += f'    "{table.name}": {{\n'
        columns += "".join(f'        "{name}": ({kind}, {nullable}),\n' for name, kind, nullable in kinds)
        columns += "    },\n"
    text = LINE + "\n#: Of each table and column the type of its values, and whether there may be none.\n"
    text += f"COLUMNS: Mapping[str, Mapping[str, tuple[type, bool]]] = {{\n{columns}}}\n"
    text += "\n#: Of each table, index and trigger the statement that makes it.\nOBJECTS: Mapping[str, str] = {\n"
    for name, statement in statements.items():
        lines = [piece for line in statement.strip().splitlines() for piece in _wrapped(line.replace("\t", "    "))]
        text += f'    "{name}": """\n' + "\n".join(lines) + '""",\n'
    return text + "}\n"


def _wrapped(line: str) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line, 116, initial_indent="", subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    options = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    made = page.partition(LINE)[0] + declare()
    if options.check:
        return int(page != made)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
