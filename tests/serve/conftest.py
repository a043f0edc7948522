"""Live servers on free ports: real uvicorn, real sockets, a tiny random model."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ownlm.artifact import Workspace
from ownlm.generate.model import Model
from ownlm.serve import serve
from tiny import tiny_model


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
    """The same model, each step at least this long."""
    forward = model.decoder.forward

    def delayed(*args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(seconds)
        return forward(*args, **kwargs)

    model.decoder.forward = delayed  # type: ignore[method-assign]
    return model


@pytest.fixture(scope="session")
def model() -> Model:
    return tiny_model(context=512)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def address(model: Model, home: Path) -> Iterator[str]:
    """A server without keys on loopback."""
    with running(model, home) as address:
        yield address


@pytest.fixture(scope="session")
def slow_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that needs 20 ms per token, with room for two answers and two that wait."""
    slow_model = slow(tiny_model(context=4096, seed=3), 0.02)
    with running(slow_model, tmp_path_factory.mktemp("slow"), slots=2, max_waiting=2) as address:
        yield address


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool]) -> None:
        for _ in range(500):
            if condition():
                return
            time.sleep(0.02)
        raise AssertionError("it did not happen within ten seconds")

    return wait
