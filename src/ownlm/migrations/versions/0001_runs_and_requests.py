"""The first schema: runs and requests. Migrations are append-only; a landed one never changes."""

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "runs",
        sql.Column("id", sql.Integer, primary_key=True),
        sql.Column("stage", sql.String(40), nullable=False, index=True),
        sql.Column("name", sql.String(100), nullable=False),
        sql.Column("status", sql.String(20), nullable=False),
        sql.Column("started", sql.DateTime, nullable=False),
        sql.Column("seconds", sql.Float),
        sql.Column("peak_memory_bytes", sql.BigInteger),
        sql.Column("artifact", sql.String(120)),
        sql.Column("digest", sql.String(64)),
        sql.Column("fault", sql.Text),
    )
    op.create_table(
        "requests",
        sql.Column("id", sql.String(40), primary_key=True),
        sql.Column("started", sql.DateTime, nullable=False, index=True),
        sql.Column("route", sql.String(80), nullable=False),
        sql.Column("model", sql.String(200), nullable=False),
        sql.Column("key_id", sql.String(40)),
        sql.Column("status", sql.Integer, nullable=False),
        sql.Column("prompt_tokens", sql.Integer, nullable=False),
        sql.Column("completion_tokens", sql.Integer, nullable=False),
        sql.Column("first_token_s", sql.Float),
        sql.Column("latency_s", sql.Float, nullable=False),
        sql.Column("finish_reason", sql.String(20)),
        sql.Column("sampling", sql.JSON),
        sql.Column("prompt", sql.Text),
        sql.Column("completion", sql.Text),
    )


def downgrade() -> None:
    op.drop_table("requests")
    op.drop_table("runs")
