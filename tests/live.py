"""Live servers on free ports for tests: real uvicorn, real sockets, a tiny random model."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from ownlm.artifact import Workspace
from ownlm.generate.model import Model
from ownlm.generate.runners import Runner
from ownlm.generate.sequence import Row
from ownlm.models.decoder import Decoder
from ownlm.serve.server import serve

# One client for all plain requests: making one costs more than most of the requests.
http = httpx.Client(verify=False, trust_env=False, timeout=60)


@contextmanager
def running(model: Model, folder: Path, **options: Any) -> Iterator[str]:
    """The address of a server that runs inside the block."""
    started: queue.Queue[Any] = queue.Queue()

    def work() -> None:
        try:
            serve(
                model,
                port=options.pop("port", 0),
                workspace=Workspace(folder),
                ready=lambda server, address: started.put((server, address)),
                **options,
            )
        except BaseException as fault:  # noqa: BLE001  (it belongs to the test, not to this thread)
            started.put(fault)

    thread = threading.Thread(target=work)
    thread.start()
    found = started.get(timeout=60)
    if isinstance(found, BaseException):
        thread.join()
        raise found
    server, address = found
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def slow(model: Model, seconds: float) -> Model:
    """The same model, each step at least this long, and no answer ended by the model itself."""
    make, stops = model._runner, sorted(model.tokenizer.stop_ids)

    def slow_runner(decoder: Decoder, slots: int) -> Runner:
        runner = make(decoder, slots)
        run = runner.run

        def delayed(rows: Sequence[Row]) -> torch.Tensor:
            time.sleep(seconds)
            return run(rows).index_fill(-1, torch.tensor(stops), -1e4)

        runner.run = delayed  # type: ignore[method-assign]
        return runner

    model._runner = slow_runner  # type: ignore[method-assign]
    return model
