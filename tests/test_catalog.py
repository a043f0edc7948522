from datetime import datetime

import pytest
import sqlalchemy as sql

from ownlm.catalog import METADATA, Catalog
from ownlm.errors import Interrupted, UserError


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(tmp_path)
    yield catalog
    catalog.close()


def test_migrations_build_the_declared_schema(catalog):
    inspector = sql.inspect(catalog.engine)
    for table in METADATA.sorted_tables:
        found = {column["name"]: str(column["type"]) for column in inspector.get_columns(table.name)}
        assert found == {column.name: str(column.type) for column in table.columns}


def test_runs_are_recorded_whatever_their_end(catalog):
    with catalog.run("pretrain", "good") as run:
        run.artifact, run.digest = "good@1", "d" * 64
    with pytest.raises(UserError), catalog.run("pretrain", "bad"):
        raise UserError("no documents.")
    with pytest.raises(Interrupted), catalog.run("pretrain", "stopped"):
        raise Interrupted("again")
    rows = catalog.runs()
    assert [(row["name"], row["status"]) for row in rows] == [
        ("stopped", "interrupted"),
        ("bad", "failed"),
        ("good", "done"),
    ]
    assert rows[1]["fault"] == "no documents."
    assert rows[2]["artifact"] == "good@1"
    assert rows[2]["peak_memory_bytes"] > 1e6


def test_requests_are_kept_and_survive_reopening(tmp_path):
    row = {
        "id": "r1", "started": datetime(2026, 1, 2), "route": "/v1/completions", "model": "m", "status": 200,
        "prompt_tokens": 3, "completion_tokens": 4, "latency_s": 0.5, "sampling": {"seed": 1},
    }  # fmt: skip
    first = Catalog(tmp_path)
    first.record_requests([row])
    first.record_requests([])
    first.close()
    second = Catalog(tmp_path)
    (found,) = second.requests()
    second.close()
    assert found["sampling"] == {"seed": 1}
    assert found["prompt"] is None
