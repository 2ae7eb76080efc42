"""
Create the journal.

Forward only: the copy made before an upgrade is the way back.
"""

import time
import uuid

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("PRAGMA application_id = 1667985524")  # "ckpt"
    run = op.create_table(
        "run",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("created_at", sa.REAL, nullable=False),
        sa.Column("last_change", sa.Text, nullable=False),
        sa.CheckConstraint("id = 1", name="one_run_per_journal"),
    )
    op.create_table(
        "epoch",
        sa.Column("epoch", sa.Integer, primary_key=True),
        sa.Column("started_at", sa.REAL, nullable=False),
        sa.Column("ended_at", sa.REAL),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("command", sa.Text, nullable=False),
        sa.Column("versions", sa.Text, nullable=False),
        sa.CheckConstraint("epoch >= 1", name="epoch_is_positive"),
    )
    create_checkpoint()
    create_history()
    create_triggers()
    op.bulk_insert(
        run,
        [{"id": 1, "run_id": uuid.uuid4().hex, "created_at": time.time(), "last_change": "created"}],
    )


def create_checkpoint() -> None:
    op.create_table(
        "checkpoint",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("series", sa.Text, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("format", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("epoch", sa.Integer, sa.ForeignKey("epoch.epoch", name="fk_checkpoint_epoch"), nullable=False),
        sa.Column("world_size", sa.Integer, nullable=False),
        sa.Column("directory", sa.Text, nullable=False),
        sa.Column("staging_directory", sa.Text, nullable=False),
        sa.Column("created_at", sa.REAL, nullable=False),
        sa.Column("bytes", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("manifest_digest", sa.Text),
        sa.Column("committed_at", sa.REAL),
        sa.Column("commit_seq", sa.Integer),
        sa.Column("finished_at", sa.REAL),
        sa.Column("stage_s", sa.REAL),
        sa.Column("write_s", sa.REAL),
        sa.Column("gather_s", sa.REAL),
        sa.Column("commit_s", sa.REAL),
        sa.Column("reason", sa.Text),
        sa.Column("failures", sa.Text, nullable=False, server_default=sa.text("'[]'")),
        sa.Column("metrics", sa.Text, nullable=False, server_default=sa.text("'{}'")),
        sa.Column("per_rank", sa.Text, nullable=False, server_default=sa.text("'[]'")),
        sa.Column("overwrites", sa.Integer, sa.ForeignKey("checkpoint.id", name="fk_checkpoint_overwrites")),
        sa.Column("retire_started_at", sa.REAL),
        sa.Column("retire_reason", sa.Text),
        sa.Column("retired_at", sa.REAL),
        sa.CheckConstraint(
            "state IN ('PREWRITTEN', 'WRITING', 'GATHERED', 'COMMITTED', 'FAILED')", name="state_is_known"
        ),
        sa.CheckConstraint("format IN ('dcp', 'hf')", name="format_is_known"),
        sa.CheckConstraint("series <> ''", name="series_is_named"),
        sa.CheckConstraint("typeof(step) = 'integer' AND step >= 0", name="step_is_not_negative"),
        sa.CheckConstraint("typeof(world_size) = 'integer' AND world_size >= 1", name="world_size_is_positive"),
        sa.CheckConstraint("typeof(bytes) = 'integer' AND bytes >= 0", name="bytes_are_not_negative"),
        sa.CheckConstraint("(state = 'COMMITTED') = (committed_at IS NOT NULL)", name="committed_has_time"),
        sa.CheckConstraint("(state = 'COMMITTED') = (commit_seq IS NOT NULL)", name="committed_has_sequence"),
        sa.CheckConstraint(
            "(state IN ('COMMITTED', 'FAILED')) = (finished_at IS NOT NULL)", name="final_has_finish_time"
        ),
        sa.CheckConstraint(
            "state NOT IN ('GATHERED', 'COMMITTED') OR manifest_digest IS NOT NULL",
            name="gathered_has_manifest_digest",
        ),
        sa.CheckConstraint("state <> 'FAILED' OR reason IS NOT NULL", name="failed_has_reason"),
        sa.CheckConstraint("retire_started_at IS NULL OR state = 'COMMITTED'", name="retiring_is_committed"),
        sa.CheckConstraint("(retire_started_at IS NULL) = (retire_reason IS NULL)", name="retiring_has_reason"),
        sa.CheckConstraint("retired_at IS NULL OR retire_started_at IS NOT NULL", name="retired_was_retiring"),
    )
    op.create_index("checkpoint_by_step", "checkpoint", ["series", "step"])
    op.create_index("staging_directory_is_unique", "checkpoint", ["staging_directory"], unique=True)
    op.create_index("commit_seq_is_unique", "checkpoint", ["commit_seq"], unique=True)
    op.create_index(
        "one_in_flight_per_series",
        "checkpoint",
        ["series"],
        unique=True,
        sqlite_where=sa.text("state IN ('PREWRITTEN', 'WRITING', 'GATHERED')"),
    )
    op.create_index(
        "one_live_per_step",
        "checkpoint",
        ["series", "step"],
        unique=True,
        sqlite_where=sa.text("state = 'COMMITTED' AND retire_started_at IS NULL"),
    )


def create_history() -> None:
    op.create_table(
        "transition",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column(
            "checkpoint_id",
            sa.Integer,
            sa.ForeignKey("checkpoint.id", name="fk_transition_checkpoint_id"),
            nullable=False,
        ),
        sa.Column("source", sa.Text),
        sa.Column("dest", sa.Text, nullable=False),
        sa.Column("at", sa.REAL, nullable=False),
        sa.Column("epoch", sa.Integer, sa.ForeignKey("epoch.epoch", name="fk_transition_epoch"), nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.CheckConstraint(
            "coalesce(source, '') || '>' || dest IN ('>PREWRITTEN', '>COMMITTED', 'PREWRITTEN>WRITING',"
            " 'WRITING>GATHERED', 'GATHERED>COMMITTED', 'PREWRITTEN>FAILED', 'WRITING>FAILED', 'GATHERED>FAILED')",
            name="transition_is_legal",
        ),
    )
    op.create_index("transition_by_checkpoint", "transition", ["checkpoint_id"])
    op.create_table(
        "file",
        sa.Column(
            "checkpoint_id", sa.Integer, sa.ForeignKey("checkpoint.id", name="fk_file_checkpoint_id"), primary_key=True
        ),
        sa.Column("path", sa.Text, primary_key=True),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.CheckConstraint("typeof(size) = 'integer' AND size >= 0", name="size_is_not_negative"),
        sa.CheckConstraint("typeof(rank) = 'integer' AND rank >= 0", name="rank_is_not_negative"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "retirement_decision",
        sa.Column(
            "checkpoint_id",
            sa.Integer,
            sa.ForeignKey("checkpoint.id", name="fk_retirement_decision_checkpoint_id"),
            primary_key=True,
        ),
        sa.Column(
            "decided_by",
            sa.Integer,
            sa.ForeignKey("checkpoint.id", name="fk_retirement_decision_decided_by"),
            nullable=False,
        ),
        sa.Column("verdict", sa.Text, nullable=False),
        sa.Column("reasons", sa.Text, nullable=False),
        sa.Column("at", sa.REAL, nullable=False),
        sa.CheckConstraint("verdict IN ('keep', 'drop')", name="verdict_is_known"),
    )
    op.create_table(
        "pin",
        sa.Column("series", sa.Text, primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("pinned_at", sa.REAL, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "verification",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column(
            "checkpoint_id",
            sa.Integer,
            sa.ForeignKey("checkpoint.id", name="fk_verification_checkpoint_id"),
            nullable=False,
        ),
        sa.Column("at", sa.REAL, nullable=False),
        sa.Column("level", sa.Text, nullable=False),
        sa.Column("ok", sa.Integer, nullable=False),
        sa.Column("mismatches", sa.Text, nullable=False),
        sa.CheckConstraint("level IN ('size', 'digest')", name="level_is_known"),
        sa.CheckConstraint("ok IN (0, 1)", name="ok_is_yes_or_no"),
    )
    op.create_index("verification_by_checkpoint", "verification", ["checkpoint_id"])


def create_triggers() -> None:
    op.execute("""
CREATE TRIGGER transition_is_not_changed BEFORE UPDATE ON transition
BEGIN SELECT RAISE(ABORT, 'transition_is_not_changed: the history is append-only'); END""")
    op.execute("""
CREATE TRIGGER transition_is_not_deleted BEFORE DELETE ON transition
BEGIN SELECT RAISE(ABORT, 'transition_is_not_deleted: the history is append-only'); END""")
    op.execute("""
CREATE TRIGGER transition_is_not_replaced BEFORE INSERT ON transition
WHEN EXISTS (SELECT 1 FROM transition WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'transition_is_not_replaced: the history is append-only'); END""")
    op.execute("""
CREATE TRIGGER checkpoint_is_not_deleted BEFORE DELETE ON checkpoint
BEGIN SELECT RAISE(ABORT, 'checkpoint_is_not_deleted: attempt numbers are never used again'); END""")
    op.execute("""
CREATE TRIGGER state_moves_legally BEFORE UPDATE OF state ON checkpoint
WHEN OLD.state || '>' || NEW.state NOT IN ('PREWRITTEN>WRITING', 'WRITING>GATHERED', 'GATHERED>COMMITTED',
 'PREWRITTEN>FAILED', 'WRITING>FAILED', 'GATHERED>FAILED')
BEGIN SELECT RAISE(ABORT, 'state_moves_legally: the state machine has no such transition'); END""")


def downgrade() -> None:
    raise NotImplementedError("journals are not downgraded; go back to the copy made before the upgrade")
