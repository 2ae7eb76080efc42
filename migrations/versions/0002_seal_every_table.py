"""
Seal every table.

What the rows add up to is entered when all migrations have run; see ckptmgr/journal/upgrade.py.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "seal",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("checkpoint_id", sa.Integer, primary_key=True),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    raise NotImplementedError("journals are not downgraded; go back to the copy made before the upgrade")
