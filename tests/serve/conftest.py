"""Servers that the tests of this folder share."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from live import running, slow
from ownlm.generate.model import Model
from tiny import tiny_model


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
