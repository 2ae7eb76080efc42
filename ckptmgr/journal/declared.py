"""
What a journal of this revision is made of, as plain data: for whoever reads one without waiting for SQLAlchemy.

`schema` says the same to SQLAlchemy and Alembic. What stands below the line is made from it by
tools/declare_schema.py, and a test compares the two.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from ckptmgr import journal

#: The newest migration; it stands there because whoever asks for it alone need not wait for more.
REVISION = journal.REVISION

#: "ckpt", in the header of the file: tells a journal from somebody else's SQLite database.
APPLICATION_ID = 0x636B7074

#: Conditions of the partial indexes; a query uses such an index only if it says the same words.
IN_FLIGHT = "state IN ('PREWRITTEN', 'WRITING', 'GATHERED')"
LIVE = "state = 'COMMITTED' AND retire_started_at IS NULL"


@functools.cache
def objects() -> Mapping[str, str]:
    """Everything that a journal of `REVISION` is made of: name → its SQL, as `plain_sql` has it."""
    return {name: plain_sql(text) for name, text in OBJECTS.items()}


def plain_sql(text: str) -> str:
    """A statement without what SQLite, SQLAlchemy or Alembic may write one way or the other."""
    return re.sub(r'[\s"]+', "", text)


# --- made by tools/declare_schema.py ---

#: Of each table and column the type of its values, and whether there may be none.
COLUMNS: Mapping[str, Mapping[str, tuple[type, bool]]] = {
    "epoch": {
        "epoch": (int, False),
        "started_at": (float, False),
        "ended_at": (float, True),
        "host": (str, False),
        "pid": (int, False),
        "command": (str, False),
        "versions": (str, False),
    },
    "pin": {
        "series": (str, False),
        "step": (int, False),
        "note": (str, False),
        "pinned_at": (float, False),
    },
    "run": {
        "id": (int, False),
        "run_id": (str, False),
        "created_at": (float, False),
        "last_change": (str, False),
    },
    "seal": {
        "name": (str, False),
        "checkpoint_id": (int, False),
        "rows": (int, False),
        "digest": (str, False),
    },
    "checkpoint": {
        "id": (int, False),
        "series": (str, False),
        "step": (int, False),
        "format": (str, False),
        "state": (str, False),
        "epoch": (int, False),
        "world_size": (int, False),
        "directory": (str, False),
        "staging_directory": (str, False),
        "created_at": (float, False),
        "bytes": (int, False),
        "manifest_digest": (str, True),
        "committed_at": (float, True),
        "commit_seq": (int, True),
        "finished_at": (float, True),
        "stage_s": (float, True),
        "write_s": (float, True),
        "gather_s": (float, True),
        "commit_s": (float, True),
        "reason": (str, True),
        "failures": (str, False),
        "metrics": (str, False),
        "per_rank": (str, False),
        "overwrites": (int, True),
        "retire_started_at": (float, True),
        "retire_reason": (str, True),
        "retired_at": (float, True),
    },
    "file": {
        "checkpoint_id": (int, False),
        "path": (str, False),
        "rank": (int, False),
        "size": (int, False),
        "digest": (str, False),
    },
    "retirement_decision": {
        "checkpoint_id": (int, False),
        "decided_by": (int, False),
        "verdict": (str, False),
        "reasons": (str, False),
        "at": (float, False),
    },
    "transition": {
        "id": (int, False),
        "checkpoint_id": (int, False),
        "source": (str, True),
        "dest": (str, False),
        "at": (float, False),
        "epoch": (int, False),
        "host": (str, False),
        "pid": (int, False),
        "note": (str, False),
    },
    "verification": {
        "id": (int, False),
        "checkpoint_id": (int, False),
        "at": (float, False),
        "level": (str, False),
        "ok": (int, False),
        "mismatches": (str, False),
    },
}

#: Of each table, index and trigger the statement that makes it.
OBJECTS: Mapping[str, str] = {
    "alembic_version": """
CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL,
 CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))""",
    "transition_is_not_changed": """
CREATE TRIGGER transition_is_not_changed BEFORE UPDATE ON transition
BEGIN SELECT RAISE(ABORT, 'transition_is_not_changed: the history is append-only'); END""",
    "transition_is_not_deleted": """
CREATE TRIGGER transition_is_not_deleted BEFORE DELETE ON transition
BEGIN SELECT RAISE(ABORT, 'transition_is_not_deleted: the history is append-only'); END""",
    "transition_is_not_replaced": """
CREATE TRIGGER transition_is_not_replaced BEFORE INSERT ON transition
WHEN EXISTS (SELECT 1 FROM transition WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'transition_is_not_replaced: the history is append-only'); END""",
    "checkpoint_is_not_deleted": """
CREATE TRIGGER checkpoint_is_not_deleted BEFORE DELETE ON checkpoint
BEGIN SELECT RAISE(ABORT, 'checkpoint_is_not_deleted: attempt numbers are never used again'); END""",
    "state_moves_legally": """
CREATE TRIGGER state_moves_legally BEFORE UPDATE OF state ON checkpoint
WHEN OLD.state || '>' || NEW.state NOT IN ('PREWRITTEN>WRITING', 'WRITING>GATHERED', 'GATHERED>COMMITTED',
 'PREWRITTEN>FAILED', 'WRITING>FAILED', 'GATHERED>FAILED')
BEGIN SELECT RAISE(ABORT, 'state_moves_legally: the state machine has no such transition'); END""",
    "epoch": """
CREATE TABLE epoch (
    epoch INTEGER NOT NULL,
    started_at REAL NOT NULL,
    ended_at REAL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    command TEXT NOT NULL,
    versions TEXT NOT NULL,
    PRIMARY KEY (epoch),
    CONSTRAINT epoch_is_positive CHECK (epoch >= 1)
)""",
    "pin": """
CREATE TABLE pin (
    series TEXT NOT NULL,
    step INTEGER NOT NULL,
    note TEXT NOT NULL,
    pinned_at REAL NOT NULL,
    PRIMARY KEY (series, step)
)
 WITHOUT ROWID""",
    "run": """
CREATE TABLE run (
    id INTEGER NOT NULL,
    run_id TEXT NOT NULL,
    created_at REAL NOT NULL,
    last_change TEXT NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT one_run_per_journal CHECK (id = 1)
)""",
    "seal": """
CREATE TABLE seal (
    name TEXT NOT NULL,
    checkpoint_id INTEGER NOT NULL,
    rows INTEGER NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (name, checkpoint_id)
)
 WITHOUT ROWID""",
    "checkpoint": """
CREATE TABLE checkpoint (
    id INTEGER NOT NULL,
    series TEXT NOT NULL,
    step INTEGER NOT NULL,
    format TEXT NOT NULL,
    state TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    world_size INTEGER NOT NULL,
    directory TEXT NOT NULL,
    staging_directory TEXT NOT NULL,
    created_at REAL NOT NULL,
    bytes INTEGER DEFAULT 0 NOT NULL,
    manifest_digest TEXT,
    committed_at REAL,
    commit_seq INTEGER,
    finished_at REAL,
    stage_s REAL,
    write_s REAL,
    gather_s REAL,
    commit_s REAL,
    reason TEXT,
    failures TEXT DEFAULT '[]' NOT NULL,
    metrics TEXT DEFAULT '{}' NOT NULL,
    per_rank TEXT DEFAULT '[]' NOT NULL,
    overwrites INTEGER,
    retire_started_at REAL,
    retire_reason TEXT,
    retired_at REAL,
    PRIMARY KEY (id),
    CONSTRAINT state_is_known CHECK (state IN ('PREWRITTEN', 'WRITING', 'GATHERED', 'COMMITTED', 'FAILED')),
    CONSTRAINT format_is_known CHECK (format IN ('dcp', 'hf')),
    CONSTRAINT series_is_named CHECK (series <> ''),
    CONSTRAINT step_is_not_negative CHECK (typeof(step) = 'integer' AND step >= 0),
    CONSTRAINT world_size_is_positive CHECK (typeof(world_size) = 'integer' AND world_size >= 1),
    CONSTRAINT bytes_are_not_negative CHECK (typeof(bytes) = 'integer' AND bytes >= 0),
    CONSTRAINT committed_has_time CHECK ((state = 'COMMITTED') = (committed_at IS NOT NULL)),
    CONSTRAINT committed_has_sequence CHECK ((state = 'COMMITTED') = (commit_seq IS NOT NULL)),
    CONSTRAINT final_has_finish_time CHECK ((state IN ('COMMITTED', 'FAILED')) = (finished_at IS NOT NULL)),
    CONSTRAINT gathered_has_manifest_digest CHECK (state NOT IN ('GATHERED', 'COMMITTED') OR manifest_digest IS NOT
      NULL),
    CONSTRAINT failed_has_reason CHECK (state <> 'FAILED' OR reason IS NOT NULL),
    CONSTRAINT retiring_is_committed CHECK (retire_started_at IS NULL OR state = 'COMMITTED'),
    CONSTRAINT retiring_has_reason CHECK ((retire_started_at IS NULL) = (retire_reason IS NULL)),
    CONSTRAINT retired_was_retiring CHECK (retired_at IS NULL OR retire_started_at IS NOT NULL),
    CONSTRAINT fk_checkpoint_epoch FOREIGN KEY(epoch) REFERENCES epoch (epoch),
    CONSTRAINT fk_checkpoint_overwrites FOREIGN KEY(overwrites) REFERENCES checkpoint (id)
)""",
    "checkpoint_by_step": """
CREATE INDEX checkpoint_by_step ON checkpoint (series, step)""",
    "commit_seq_is_unique": """
CREATE UNIQUE INDEX commit_seq_is_unique ON checkpoint (commit_seq)""",
    "one_in_flight_per_series": """
CREATE UNIQUE INDEX one_in_flight_per_series ON checkpoint (series) WHERE state IN ('PREWRITTEN', 'WRITING',
  'GATHERED')""",
    "one_live_per_step": """
CREATE UNIQUE INDEX one_live_per_step ON checkpoint (series, step) WHERE state = 'COMMITTED' AND retire_started_at
  IS NULL""",
    "staging_directory_is_unique": """
CREATE UNIQUE INDEX staging_directory_is_unique ON checkpoint (staging_directory)""",
    "file": """
CREATE TABLE file (
    checkpoint_id INTEGER NOT NULL,
    path TEXT NOT NULL,
    rank INTEGER NOT NULL,
    size INTEGER NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (checkpoint_id, path),
    CONSTRAINT size_is_not_negative CHECK (typeof(size) = 'integer' AND size >= 0),
    CONSTRAINT rank_is_not_negative CHECK (typeof(rank) = 'integer' AND rank >= 0),
    CONSTRAINT fk_file_checkpoint_id FOREIGN KEY(checkpoint_id) REFERENCES checkpoint (id)
)
 WITHOUT ROWID""",
    "retirement_decision": """
CREATE TABLE retirement_decision (
    checkpoint_id INTEGER NOT NULL,
    decided_by INTEGER NOT NULL,
    verdict TEXT NOT NULL,
    reasons TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (checkpoint_id),
    CONSTRAINT verdict_is_known CHECK (verdict IN ('keep', 'drop')),
    CONSTRAINT fk_retirement_decision_checkpoint_id FOREIGN KEY(checkpoint_id) REFERENCES checkpoint (id),
    CONSTRAINT fk_retirement_decision_decided_by FOREIGN KEY(decided_by) REFERENCES checkpoint (id)
)""",
    "transition": """
CREATE TABLE transition (
    id INTEGER NOT NULL,
    checkpoint_id INTEGER NOT NULL,
    source TEXT,
    dest TEXT NOT NULL,
    at REAL NOT NULL,
    epoch INTEGER NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    note TEXT NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT transition_is_legal CHECK (coalesce(source, '') || '>' || dest IN ('>PREWRITTEN', '>COMMITTED',
      'PREWRITTEN>WRITING', 'WRITING>GATHERED', 'GATHERED>COMMITTED', 'PREWRITTEN>FAILED', 'WRITING>FAILED',
      'GATHERED>FAILED')),
    CONSTRAINT fk_transition_checkpoint_id FOREIGN KEY(checkpoint_id) REFERENCES checkpoint (id),
    CONSTRAINT fk_transition_epoch FOREIGN KEY(epoch) REFERENCES epoch (epoch)
)""",
    "transition_by_checkpoint": """
CREATE INDEX transition_by_checkpoint ON transition (checkpoint_id)""",
    "verification": """
CREATE TABLE verification (
    id INTEGER NOT NULL,
    checkpoint_id INTEGER NOT NULL,
    at REAL NOT NULL,
    level TEXT NOT NULL,
    ok INTEGER NOT NULL,
    mismatches TEXT NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT level_is_known CHECK (level IN ('size', 'digest')),
    CONSTRAINT ok_is_yes_or_no CHECK (ok IN (0, 1)),
    CONSTRAINT fk_verification_checkpoint_id FOREIGN KEY(checkpoint_id) REFERENCES checkpoint (id)
)""",
    "verification_by_checkpoint": """
CREATE INDEX verification_by_checkpoint ON verification (checkpoint_id)""",
}
