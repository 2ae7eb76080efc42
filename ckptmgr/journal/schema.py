"""
The tables of the journal, and the rules the database itself holds.

This is the present; `migrations/` is how it came about, `declared` says the same without SQLAlchemy, and tests
compare the three. Every rule
is named as the fact it keeps true, so that the message of a violated one explains itself.
Times are Unix seconds, sizes bytes, durations seconds; lists and mappings are JSON text.
"""

from __future__ import annotations

from sqlalchemy import REAL, CheckConstraint, Column, ForeignKey, Index, Integer, MetaData, Table, Text, text

from ckptmgr.journal.declared import IN_FLIGHT, LIVE

metadata = MetaData(naming_convention={"fk": "fk_%(table_name)s_%(column_0_name)s"})

run = Table(
    "run",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("created_at", REAL, nullable=False),
    # Names the last transaction, so that a COMMIT that raised can be looked up afterwards.
    Column("last_change", Text, nullable=False),
    CheckConstraint("id = 1", name="one_run_per_journal"),
)

epoch = Table(
    "epoch",
    metadata,
    Column("epoch", Integer, primary_key=True),
    Column("started_at", REAL, nullable=False),
    Column("ended_at", REAL),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("command", Text, nullable=False),
    Column("versions", Text, nullable=False),
    CheckConstraint("epoch >= 1", name="epoch_is_positive"),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("series", Text, nullable=False),
    Column("step", Integer, nullable=False),
    Column("format", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("epoch", Integer, ForeignKey("epoch.epoch"), nullable=False),
    Column("world_size", Integer, nullable=False),
    Column("directory", Text, nullable=False),
    Column("staging_directory", Text, nullable=False),
    Column("created_at", REAL, nullable=False),
    Column("bytes", Integer, nullable=False, server_default=text("0")),
    Column("manifest_digest", Text),
    Column("committed_at", REAL),
    Column("commit_seq", Integer),
    Column("finished_at", REAL),
    Column("stage_s", REAL),
    Column("write_s", REAL),
    Column("gather_s", REAL),
    Column("commit_s", REAL),
    Column("reason", Text),
    Column("failures", Text, nullable=False, server_default=text("'[]'")),
    Column("metrics", Text, nullable=False, server_default=text("'{}'")),
    Column("per_rank", Text, nullable=False, server_default=text("'[]'")),
    Column("overwrites", Integer, ForeignKey("checkpoint.id")),
    Column("retire_started_at", REAL),
    Column("retire_reason", Text),
    Column("retired_at", REAL),
    CheckConstraint("state IN ('PREWRITTEN', 'WRITING', 'GATHERED', 'COMMITTED', 'FAILED')", name="state_is_known"),
    CheckConstraint("format IN ('dcp', 'hf')", name="format_is_known"),
    CheckConstraint("series <> ''", name="series_is_named"),
    # SQLite sorts text above every number, so a bare `step >= 0` would let text pass.
    CheckConstraint("typeof(step) = 'integer' AND step >= 0", name="step_is_not_negative"),
    CheckConstraint("typeof(world_size) = 'integer' AND world_size >= 1", name="world_size_is_positive"),
    CheckConstraint("typeof(bytes) = 'integer' AND bytes >= 0", name="bytes_are_not_negative"),
    CheckConstraint("(state = 'COMMITTED') = (committed_at IS NOT NULL)", name="committed_has_time"),
    CheckConstraint("(state = 'COMMITTED') = (commit_seq IS NOT NULL)", name="committed_has_sequence"),
    CheckConstraint("(state IN ('COMMITTED', 'FAILED')) = (finished_at IS NOT NULL)", name="final_has_finish_time"),
    CheckConstraint(
        "state NOT IN ('GATHERED', 'COMMITTED') OR manifest_digest IS NOT NULL", name="gathered_has_manifest_digest"
    ),
    CheckConstraint("state <> 'FAILED' OR reason IS NOT NULL", name="failed_has_reason"),
    CheckConstraint("retire_started_at IS NULL OR state = 'COMMITTED'", name="retiring_is_committed"),
    CheckConstraint("(retire_started_at IS NULL) = (retire_reason IS NULL)", name="retiring_has_reason"),
    CheckConstraint("retired_at IS NULL OR retire_started_at IS NOT NULL", name="retired_was_retiring"),
)
Index("checkpoint_by_step", checkpoint.c.series, checkpoint.c.step)
Index("staging_directory_is_unique", checkpoint.c.staging_directory, unique=True)
Index("commit_seq_is_unique", checkpoint.c.commit_seq, unique=True)
Index(
    "one_in_flight_per_series",
    checkpoint.c.series,
    unique=True,
    sqlite_where=text(IN_FLIGHT),
)
Index(
    "one_live_per_step",
    checkpoint.c.series,
    checkpoint.c.step,
    unique=True,
    sqlite_where=text(LIVE),
)

transition = Table(
    "transition",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("checkpoint_id", Integer, ForeignKey("checkpoint.id"), nullable=False),
    Column("source", Text),
    Column("dest", Text, nullable=False),
    Column("at", REAL, nullable=False),
    Column("epoch", Integer, ForeignKey("epoch.epoch"), nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("note", Text, nullable=False),
    # Without a source: a save began, or a committed checkpoint was rebuilt from its manifest.
    CheckConstraint(
        "coalesce(source, '') || '>' || dest IN ('>PREWRITTEN', '>COMMITTED', 'PREWRITTEN>WRITING',"
        " 'WRITING>GATHERED', 'GATHERED>COMMITTED', 'PREWRITTEN>FAILED', 'WRITING>FAILED', 'GATHERED>FAILED')",
        name="transition_is_legal",
    ),
)
Index("transition_by_checkpoint", transition.c.checkpoint_id)

file = Table(
    "file",
    metadata,
    Column("checkpoint_id", Integer, ForeignKey("checkpoint.id"), primary_key=True),
    Column("path", Text, primary_key=True),
    Column("rank", Integer, nullable=False),
    Column("size", Integer, nullable=False),
    Column("digest", Text, nullable=False),
    CheckConstraint("typeof(size) = 'integer' AND size >= 0", name="size_is_not_negative"),
    CheckConstraint("typeof(rank) = 'integer' AND rank >= 0", name="rank_is_not_negative"),
    sqlite_with_rowid=False,
)

retirement_decision = Table(
    "retirement_decision",
    metadata,
    Column("checkpoint_id", Integer, ForeignKey("checkpoint.id"), primary_key=True),
    Column("decided_by", Integer, ForeignKey("checkpoint.id"), nullable=False),
    Column("verdict", Text, nullable=False),
    Column("reasons", Text, nullable=False),
    Column("at", REAL, nullable=False),
    CheckConstraint("verdict IN ('keep', 'drop')", name="verdict_is_known"),
)

pin = Table(
    "pin",
    metadata,
    Column("series", Text, primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("note", Text, nullable=False),
    Column("pinned_at", REAL, nullable=False),
    sqlite_with_rowid=False,
)

verification = Table(
    "verification",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("checkpoint_id", Integer, ForeignKey("checkpoint.id"), nullable=False),
    Column("at", REAL, nullable=False),
    Column("level", Text, nullable=False),
    Column("ok", Integer, nullable=False),
    Column("mismatches", Text, nullable=False),
    CheckConstraint("level IN ('size', 'digest')", name="level_is_known"),
    CheckConstraint("ok IN (0, 1)", name="ok_is_yes_or_no"),
)
Index("verification_by_checkpoint", verification.c.checkpoint_id)

#: What the rows of every other table add up to; see `seal`.
seal = Table(
    "seal",
    metadata,
    Column("name", Text, primary_key=True),
    Column("checkpoint_id", Integer, primary_key=True),
    Column("rows", Integer, nullable=False),
    Column("digest", Text, nullable=False),
    sqlite_with_rowid=False,
)

#: What CHECKs cannot say. A batch migration that copies a table must create its triggers again.
TRIGGERS = {
    "transition_is_not_changed": """
CREATE TRIGGER transition_is_not_changed BEFORE UPDATE ON transition
BEGIN SELECT RAISE(ABORT, 'transition_is_not_changed: the history is append-only'); END""",
    "transition_is_not_deleted": """
CREATE TRIGGER transition_is_not_deleted BEFORE DELETE ON transition
BEGIN SELECT RAISE(ABORT, 'transition_is_not_deleted: the history is append-only'); END""",
    # INSERT OR REPLACE deletes without firing the trigger above.
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
}
