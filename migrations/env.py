"""Alembic's entry: runs the migrations on the connection it was handed, and on no other."""

from alembic import context

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("use `ckptmgr upgrade RUN` or `tools/new_revision.py`, not `alembic`")
context.configure(
    connection=connection,
    target_metadata=context.config.attributes.get("target_metadata"),
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
