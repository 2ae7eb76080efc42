"""``ckptmgr upgrade``: bring the journal to this version's schema, after a backup."""

from __future__ import annotations

import argparse

from ckptmgr.cli import target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output

DESCRIPTION = """\
Bring the journal of a run to the schema of this version of ckptmgr. The old
one is kept beside it as <journal>.before-<schema>. There is no way back but
that backup. Takes the run lock."""
EXAMPLES = """\
  ckptmgr upgrade runs/alpha
  ckptmgr upgrade runs/alpha.journal.db --json"""

COMMAND = "ckptmgr upgrade"


def configure(parser: argparse.ArgumentParser) -> None:
    """This command has no flags of its own."""


def run(args: argparse.Namespace, out: Output) -> int:
    """Upgrade under the run lock, and take an epoch so that the journal says who did it."""
    from ckptmgr.journal import Journal
    from ckptmgr.journal.upgrade import backup_path
    from ckptmgr.journal.upgrade import upgrade as upgrade_journal

    rundir = target.locate(args)
    target.require_journal(rundir)
    with target.locked(rundir, COMMAND):
        before, after = upgrade_journal(rundir.journal_path)
        with Journal.open(rundir.journal_path) as journal:
            rundir.require_pair(journal.run_id)
            if before != after:
                with target.epoch(journal, COMMAND):
                    pass
            about = target.document(rundir, journal.run_id)
    backup = str(backup_path(rundir.journal_path)) if before not in (after, None) else None
    if out.as_json:
        out.document({"run": about, "from": before, "to": after, "backup": backup})
    elif before == after:
        out.line(f"{rundir.journal_path} has schema {after} already")
    else:
        out.line(f"{rundir.journal_path}: schema {before or 'none'} to {after}")
        if backup:
            out.line(f"backup: {backup}")
    return Exit.OK
