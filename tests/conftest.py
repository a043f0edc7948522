"""Settings for every test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from hub import Hub, serving
from ownlm import transfer

# No test asserts a time: the machine may be busy with others.
settings.register_profile("ownlm", deadline=None, max_examples=50)
settings.load_profile("ownlm")

# Models of a few thousand parameters gain nothing from threads, and on a busy machine they wait for each other.
torch.set_num_threads(1)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for the only one, and no waiting between tries."""
    from huggingface_hub import close_session

    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "HUGGING")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(transfer, "WAIT_S", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", False)
    with serving() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        yield served
        close_session()
