"""A server's life: a taken port, records in the catalog, metrics, health, and an end in good order."""

import queue
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from live import http, running, slow
from ownlm.catalog import Catalog
from ownlm.errors import Busy, UserError
from ownlm.generate.model import Model
from ownlm.serve.app import create_app
from ownlm.serve.journal import Journal
from ownlm.serve.metrics import Counter, Histogram
from ownlm.serve.server import serve
from tiny import tiny_model

KEY = "a-key-of-these-tests"
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a secret"}],
    "max_tokens": 3,
    "seed": 1,
}


def test_a_port_in_use_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Busy, match=f"port {port} on 127.0.0.1 is in use"):
            serve(tmp_path / "no model at all", port=port)
    for port in (70_000, -1):
        with pytest.raises(UserError):
            serve(tmp_path / "no model at all", port=port)


def test_requests_are_recorded_without_their_text(tmp_path: Path) -> None:
    with running(tiny_model(), tmp_path, api_keys=(KEY,)) as address:
        headers = {"authorization": f"Bearer {KEY}"}
        assert http.post(f"{address}/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
        assert (
            http.post(f"{address}/v1/chat/completions", json={**CHAT, "model": "x"}, headers=headers).status_code == 404
        )
        body = {"model": "tiny", "prompt": "x", "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, headers=headers) as response:
            response.read()
        http.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": "abc"}, headers=headers)
        given = {"input": {"prompt": "x", "max_tokens": 2}}
        http.post(f"{address}/v1/models/ownlm/tiny/predictions", json=given, headers={**headers, "prefer": "wait"})
        http.get(f"{address}/v1/models", headers=headers)
    catalog = Catalog(tmp_path)
    rows = {(row["route"], row["status"]): row for row in catalog.requests()}
    catalog.close()
    assert set(rows) == {
        ("/v1/chat/completions", 200),
        ("/v1/chat/completions", 404),
        ("/v1/completions", 200),
        ("/v1/embeddings", 200),
        ("/v1/models/{owner}/{name}/predictions", 200),
    }
    row = rows["/v1/chat/completions", 200]
    assert row["model"] == "tiny@1"
    assert row["completion_tokens"] == 3
    assert row["prompt_tokens"] == 27
    assert 0 < row["first_token_s"] <= row["latency_s"]
    assert row["sampling"]["seed"] == 1
    assert row["key_id"] is not None
    assert row["key_id"] not in KEY
    assert "secret" not in str(list(rows.values()))
    assert KEY not in str(list(rows.values()))


def test_texts_are_kept_where_the_owner_says_so(tmp_path: Path) -> None:
    with running(tiny_model(), tmp_path, record_text=True) as address:
        text = http.post(f"{address}/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
    catalog = Catalog(tmp_path)
    [row] = catalog.requests()
    catalog.close()
    assert "a secret" in row["prompt"]
    assert row["completion"] == text


def test_metrics_are_for_prometheus(tmp_path: Path) -> None:
    with running(tiny_model(), tmp_path) as address:
        http.post(f"{address}/v1/chat/completions", json=CHAT)
        text = http.get(f"{address}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    labels = '{model_name="tiny",engine="0"}'
    assert values['ownlm_requests_total{route="/v1/chat/completions",status="200"}'] == "1"
    assert values[f"vllm:generation_tokens_total{labels}"] == "3"
    assert values[f"vllm:prompt_tokens_total{labels}"] == "27"
    assert values[f"vllm:time_to_first_token_seconds_count{labels}"] == "1"
    assert values['vllm:request_generation_tokens_bucket{model_name="tiny",engine="0",le="5"}'] == "1"
    assert values['vllm:request_success_total{model_name="tiny",engine="0",finished_reason="length"}'] == "1"
    assert values[f"vllm:num_requests_running{labels}"] == "0"
    assert text.count("# TYPE") == text.count("# HELP") > 10


def test_a_model_that_drafts_is_counted_and_changes_nothing(tmp_path: Path) -> None:
    model, asked = tiny_model(), {**CHAT, "max_tokens": 40, "temperature": 1, "seed": 3}
    answers = []
    for _ in range(2):
        with running(model, tmp_path) as address:
            answers.append(http.post(f"{address}/v1/chat/completions", json=asked).json()["choices"])
            text = http.get(f"{address}/metrics").text
        model.draft_with(tiny_model())
    assert answers[0] == answers[1]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    drafted, accepted = (
        int(values[f'vllm:spec_decode_num_{kind}_tokens_total{{model_name="tiny",engine="0"}}'])
        for kind in ("draft", "accepted")
    )
    # The first draft is always tried; how many follow is decided by what it cost.
    assert 2 <= accepted <= drafted


def test_the_text_format() -> None:
    counter = Counter("c", "help")
    counter.add(2, path='a"b\\c\nd')
    assert list(counter.lines()) == ['c{path="a\\"b\\\\c\\nd"} 2']
    histogram = Histogram("h", "help", (1, 2))
    for value in (0.5, 1, 1.5, 9):
        histogram.observe(value)
    buckets = ['h_bucket{le="1"} 2', 'h_bucket{le="2"} 3', 'h_bucket{le="+Inf"} 4']
    assert list(histogram.lines()) == [*buckets, "h_sum 12.0", "h_count 4"]


def test_the_journal_writes_in_batches_and_counts_what_it_lost() -> None:
    batches: list[int] = []
    journal = Journal(lambda rows: batches.append(len(rows)))
    for number in range(1200):
        journal.add({"id": number})
    journal.close()
    assert sum(batches) == 1200
    assert max(batches) <= 500

    def broken(rows: Any) -> None:
        raise OSError("disk full")

    journal = Journal(broken)
    journal.add({"id": 1})
    journal.close()
    assert journal.lost == 1


def test_the_end_waits_for_open_streams(tmp_path: Path) -> None:
    model = slow(tiny_model(context=512), 0.01)
    body = {**CHAT, "max_tokens": 40, "stream": True}
    with running(model, tmp_path) as address:
        stream = httpx.stream("POST", f"{address}/v1/chat/completions", json=body)
        response = stream.__enter__()
        lines = response.iter_lines()
        next(lines)
        # Leaving the block asks the server to end while the answer is still being written.
        rest: queue.Queue[list[str]] = queue.Queue()
        reader = threading.Thread(target=lambda: rest.put(list(lines)))
        reader.start()
    reader.join(10)
    stream.__exit__(None, None, None)
    assert "data: [DONE]" in rest.get(timeout=1)


def test_health_tells_of_a_dead_engine() -> None:
    app = create_app(tiny_model())
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/health").json() == {"status": "ok"}
        app.state.service.worker.stop()
        assert client.get("/health").status_code == 503


def test_the_command_exits_with_2_when_the_port_is_taken(model: Model, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code = "import sys; from ownlm.cli import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, "serve", "demo", "--port", port],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": "src", "OWNLM_HOME": str(tmp_path), "PATH": "/usr/bin"},
            check=False,
        )
    assert done.returncode == 2
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr
