"""A server whose model can't run any more says so once, to those who wait and to whoever started it, and ends."""

import os
import queue
import signal
import threading
from pathlib import Path

import httpx
import pytest

from live import http
from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import save_model
from ownlm.generate.model import Model
from ownlm.generate.opening import load
from ownlm.generate.parallel import RankLost
from ownlm.serve.server import serve
from tiny import tiny_model


@pytest.mark.slow
def test_the_server_of_a_split_model_ends_when_a_process_of_it_does(tmp_path: Path) -> None:
    tiny = tiny_model(context=2048)
    save_model(tiny.decoder, tmp_path / "model")
    tiny.tokenizer.save(tmp_path / "model")
    model = load(tmp_path / "model", tensor_parallel=2)
    assert isinstance(model, Model)
    assert model.ranks is not None
    heard: queue.Queue[object] = queue.Queue()

    def work() -> None:
        try:
            serve(model, port=0, workspace=Workspace(tmp_path), ready=lambda server, address: heard.put(address))
        except RankLost as fault:
            heard.put(fault)

    thread = threading.Thread(target=work)
    thread.start()
    address = heard.get(timeout=60)
    body = {"model": "model", "prompt": "x", "max_tokens": 4}
    assert http.post(f"{address}/v1/completions", json=body).status_code == 200
    assert http.post(f"{address}/v1/embeddings", json={"model": "model", "input": "abc"}).status_code == 200
    with httpx.stream(
        "POST", f"{address}/v1/completions", json=body | {"max_tokens": 2000, "stream": True}, timeout=60
    ) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(model.ranks.processes[0].pid, signal.SIGKILL)
        assert "process 1 of 2 has ended" in "".join(lines)
    thread.join(40)
    assert not thread.is_alive()
    fault = heard.get(timeout=1)
    assert isinstance(fault, RankLost)
    with pytest.raises(httpx.ConnectError):
        http.get(f"{address}/health")
