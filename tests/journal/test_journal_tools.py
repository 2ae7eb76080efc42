"""The two tools that keep the line of schemas going."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from ckptmgr.journal import Journal, declared, upgrade

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / tool), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_new_revision_gets_the_next_number_and_continues_the_line(tmp_path):
    scripts = tmp_path / "100% migrations"
    shutil.copytree(upgrade.script_location(), scripts, ignore=shutil.ignore_patterns("__pycache__"))
    done = run("new_revision.py", "--into", scripts, "add", "a", "colour")
    assert done.returncode == 0, done.stderr
    written = scripts / "versions" / f"{int(declared.REVISION) + 1:04}_add_a_colour.py"

    assert done.stdout.splitlines()[-1] == str(written)
    text = written.read_text()
    assert f"down_revision = '{declared.REVISION}'" in text
    # Nothing differs now, so the migration must be empty: models and migrations agree for this tool, too.
    body = text.split("def upgrade() -> None:")[1].split("def ")[0]
    assert [line.strip() for line in body.splitlines() if line.strip() and not line.strip().startswith("#")] == ["pass"]


def test_what_is_declared_for_readers_is_what_the_schema_says():
    """Else: run tools/declare_schema.py, and look at what it changes."""
    assert run("declare_schema.py", "--check").returncode == 0


def test_freezing_writes_a_journal_once(tmp_path):
    done = run("freeze_journal.py", "--into", tmp_path)
    assert done.returncode == 0, done.stderr
    frozen = tmp_path / f"{declared.REVISION}.db"
    content = frozen.read_bytes()
    again = run("freeze_journal.py", "--into", tmp_path)

    assert again.returncode != 0
    assert "never written again" in again.stderr
    assert frozen.read_bytes() == content
    with Journal.open_read_only(frozen) as journal:
        facts = json.loads(frozen.with_suffix(".json").read_text())
        assert [f"{r.series} {r.step} {r.state}" for r in journal.checkpoints()] == facts["checkpoints"]
