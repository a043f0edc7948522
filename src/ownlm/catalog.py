"""The embedded database of a workspace: which stages ran, and which requests were served.

Artifacts on disk are the truth about what exists; the catalog is the log of what happened, for tables and for operation.
SQLite in write-ahead mode by default; any SQLAlchemy URL works. The schema is moved forward by the append-only migrations
beside this file.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection, Engine

from ownlm import device
from ownlm.errors import Interrupted

HEAD = "0001"
METADATA = sql.MetaData()

RUNS = sql.Table(
    "runs",
    METADATA,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("stage", sql.String(40), nullable=False, index=True),
    sql.Column("name", sql.String(100), nullable=False),
    sql.Column("status", sql.String(20), nullable=False),  # running, done, failed, interrupted
    sql.Column("started", sql.DateTime, nullable=False),  # UTC
    sql.Column("seconds", sql.Float),
    sql.Column("peak_memory_bytes", sql.BigInteger),
    sql.Column("artifact", sql.String(120)),  # name@version of what came out
    sql.Column("digest", sql.String(64)),
    sql.Column("fault", sql.Text),
)

REQUESTS = sql.Table(
    "requests",
    METADATA,
    sql.Column("id", sql.String(40), primary_key=True),
    sql.Column("started", sql.DateTime, nullable=False, index=True),  # UTC
    sql.Column("route", sql.String(80), nullable=False),
    sql.Column("model", sql.String(200), nullable=False),
    sql.Column("key_id", sql.String(40)),  # which key, never the key
    sql.Column("status", sql.Integer, nullable=False),
    sql.Column("prompt_tokens", sql.Integer, nullable=False),
    sql.Column("completion_tokens", sql.Integer, nullable=False),
    sql.Column("first_token_s", sql.Float),
    sql.Column("latency_s", sql.Float, nullable=False),
    sql.Column("finish_reason", sql.String(20)),
    sql.Column("sampling", sql.JSON),
    sql.Column("prompt", sql.Text),  # texts only where the server was told to keep them
    sql.Column("completion", sql.Text),
)


class Run:
    """A stage in progress; set `artifact` and `digest` to say what came out."""

    def __init__(self) -> None:
        self.artifact: str | None = None
        self.digest: str | None = None


class Catalog:
    """The database of the workspace at `root`, made and moved to the newest schema when needed."""

    def __init__(self, root: Path, url: str | None = None) -> None:
        if url is None:
            root.mkdir(parents=True, exist_ok=True)
            url = f"sqlite:///{root / 'catalog.sqlite'}"
        self.engine = sql.create_engine(url)
        if self.engine.dialect.name == "sqlite":
            sql.event.listen(self.engine, "connect", _configure_sqlite)
        upgrade(self.engine)

    @contextmanager
    def run(self, stage: str, name: str) -> Iterator[Run]:
        """Record a stage from start to end, whatever the end is."""
        row = {"stage": stage, "name": name, "status": "running", "started": datetime.now(UTC).replace(tzinfo=None)}
        with self.engine.begin() as connection:
            key = connection.execute(RUNS.insert().values(row)).inserted_primary_key
        assert key is not None
        run, began, status, fault = Run(), monotonic(), "done", None
        try:
            yield run
        except (Interrupted, KeyboardInterrupt):
            status = "interrupted"
            raise
        except BaseException as error:
            status, fault = "failed", str(error)[:2000]
            raise
        finally:
            outcome = {
                "status": status,
                "seconds": monotonic() - began,
                "peak_memory_bytes": device.peak_memory_bytes(),
                "artifact": run.artifact,
                "digest": run.digest,
                "fault": fault,
            }
            with self.engine.begin() as connection:
                connection.execute(RUNS.update().where(RUNS.c.id == key[0]).values(outcome))

    def runs(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest runs first."""
        return self._rows(sql.select(RUNS).order_by(RUNS.c.id.desc()).limit(limit))

    def record_requests(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert served requests in one transaction; each row has the columns of REQUESTS."""
        if rows:
            with self.engine.begin() as connection:
                connection.execute(REQUESTS.insert(), [dict(row) for row in rows])

    def requests(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest requests first."""
        return self._rows(sql.select(REQUESTS).order_by(REQUESTS.c.started.desc()).limit(limit))

    def close(self) -> None:
        """Give back the connections."""
        self.engine.dispose()

    def _rows(self, query: sql.Select[Any]) -> list[dict[str, Any]]:
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]


def upgrade(engine: Engine) -> None:
    """Run the migrations this database has not seen. Alembic is only loaded when there are some."""
    if _revision(engine) == HEAD:
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revision(engine: Engine) -> str | None:
    with engine.connect() as connection:
        if not sql.inspect(connection).has_table("alembic_version"):
            return None
        return _current(connection)


def _current(connection: Connection) -> str | None:
    return connection.execute(sql.text("SELECT version_num FROM alembic_version")).scalar()


def _configure_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA busy_timeout=5000")
    cursor.close()
