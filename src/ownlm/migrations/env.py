"""Alembic's entry: run the migrations on the connection that catalog.upgrade hands over."""

from alembic import context

from ownlm.catalog import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
