"""
${message}

Forward only: the copy made before the upgrade is the way back. A batch operation copies a table
and drops the old one; pass it ``table_kwargs`` (``sqlite_with_rowid``) and the CHECKs it must
keep, and create the table's triggers again.
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    raise NotImplementedError("journals are not downgraded; go back to the copy made before the upgrade")
