#!/usr/bin/env python3
"""
Write the next numbered migration, with what differs between ckptmgr/journal/schema.py and the migrations so far.

    tools/new_revision.py add a colour to every checkpoint

Read what it wrote: Alembic sees tables, columns and indexes, but neither CHECKs nor triggers.
Then set REVISION in ckptmgr/journal/__init__.py to the new number; the tests hold the two together.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.config import Config

from ckptmgr.journal import database, declared, schema, upgrade, writing


def write_revision(message: str, scripts: Path) -> Path:
    """Write the migration after ``declared.REVISION`` into the folder *scripts*, and say where."""
    number = f"{int(declared.REVISION) + 1:04}"
    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    config.set_main_option("truncate_slug_length", "60")
    config.attributes["target_metadata"] = schema.metadata
    with tempfile.TemporaryDirectory() as folder:
        path = database.plain_path(Path(folder) / "empty.journal.db")
        upgrade.upgrade(path, create=True)
        with writing.create_journal_engine(path, "rw", foreign_keys=False).connect() as connection:
            config.attributes["connection"] = connection
            script = command.revision(config, message=message, rev_id=number, autogenerate=True)
    if script is None or isinstance(script, list):
        raise SystemExit("Alembic wrote no single migration")
    return Path(script.path)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("message", nargs="+", help="what the migration does; becomes its file name")
    parser.add_argument("--into", type=Path, default=Path(upgrade.script_location()), help="the folder of migrations")
    options = parser.parse_args(arguments)
    print(write_revision(" ".join(options.message), options.into))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
