"""Replicate's own Python client against a live server: run, stream, versions, polling, cancel."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from live import http, running
from ownlm.generate.model import Model
from ownlm.serve.replicate import preferred_wait, server_event
from tiny import tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import replicate
    from replicate.exceptions import ReplicateError

INPUT: dict[str, Any] = {"prompt": "hello", "max_tokens": 12, "seed": 4, "temperature": 1}


def client_for(address: str) -> replicate.Client:
    client = replicate.Client(api_token="none", base_url=address)
    client.poll_interval = 0.05
    return client


@pytest.fixture
def client(address: str) -> Iterator[replicate.Client]:
    client = client_for(address)
    yield client
    client._client.close()


@pytest.fixture
def slow_client(slow_address: str) -> Iterator[replicate.Client]:
    client = client_for(slow_address)
    yield client
    client._client.close()


@pytest.fixture
def expected(model: Model) -> str:
    return model.generate([{"role": "user", "content": "hello"}], max_tokens=12, seed=4, temperature=1).text


def test_run_gives_the_pieces(client: replicate.Client, expected: str) -> None:
    output = client.run("ownlm/tiny", input=INPUT)
    assert isinstance(output, list)
    assert "".join(output) == expected


def test_the_environment_variable_is_enough(address: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICATE_BASE_URL", address)
    client = replicate.Client(api_token="none")
    assert "".join(client.run("ownlm/tiny", input=INPUT)) == expected
    client._client.close()


def test_stream_gives_them_one_by_one(client: replicate.Client, expected: str) -> None:
    events = list(client.stream("ownlm/tiny", input=INPUT))
    assert "".join(str(event) for event in events) == expected.replace("\x0b", "\n").replace("\x0c", "\n").replace(
        "\r", "\n"
    )
    assert events[-1].event.value == "done"
    assert len(events) > 3


def test_a_version_is_the_checkpoint(client: replicate.Client, expected: str) -> None:
    model = client.models.get("ownlm/tiny")
    version = model.versions.get(model.latest_version.id)
    assert version.id == "0" * 64
    assert "".join(client.run(f"ownlm/tiny:{version.id}", input=INPUT)) == expected
    with pytest.raises(ReplicateError, match="This server has version"):
        client.run("ownlm/tiny:abc", input=INPUT)


def test_raw_text_through_a_prompt_template(client: replicate.Client, model: Model) -> None:
    given = {**INPUT, "prompt_template": "{system_prompt}: {prompt}", "system_prompt": "S"}
    assert (
        "".join(client.run("ownlm/tiny", input=given))
        == model.generate("S: hello", max_tokens=12, seed=4, temperature=1).text
    )


def test_wrong_requests_are_told(client: replicate.Client) -> None:
    for ref, given, message in (
        ("ownlm/other", INPUT, "This server has ownlm/tiny"),
        ("meta/tiny", INPUT, "This server has ownlm/tiny"),
        ("ownlm/tiny", {"prompt": "x", "image": "y"}, "Unknown field input.image"),
        ("ownlm/tiny", {}, "Missing field input.prompt"),
        ("ownlm/tiny", {"prompt": "x" * 600}, "512 tokens"),
    ):
        with pytest.raises(ReplicateError, match=message):
            client.run(ref, input=given)
    with pytest.raises(ReplicateError, match="webhook"):
        client.predictions.create(version="0" * 64, input=INPUT, webhook="https://example.org")


def test_a_prediction_outlives_its_request(slow_client: replicate.Client) -> None:
    # A wait that ends too early: the client polls until the end.
    output = slow_client.run("ownlm/tiny", input={"prompt": "x", "max_tokens": 80, "seed": 2}, wait=1)
    assert "".join(output)
    created = slow_client.models.predictions.create("ownlm/tiny", input={"prompt": "x", "max_tokens": 20, "seed": 2})
    assert created.status == "starting"
    created.wait()
    assert created.status == "succeeded"
    assert created.metrics["output_token_count"] == 20


def test_cancel_ends_the_stream(slow_client: replicate.Client, slow_address: str) -> None:
    prediction = slow_client.models.predictions.create(
        "ownlm/tiny", input={"prompt": "x", "max_tokens": 3000, "seed": 2}
    )
    events = prediction.stream()
    next(events)
    prediction.cancel()
    assert prediction.status == "canceled"
    rest = list(events)
    assert rest[-1].event.value == "done"
    assert "canceled" in rest[-1].data
    again = http.get(prediction.urls["stream"], headers={"last-event-id": "0"}).text
    assert "id: 0\n" not in again
    assert "event: done" in again
    assert http.get(f"{slow_address}/v1/predictions/{'0' * 26}").status_code == 404


def test_lines_and_waits() -> None:
    assert server_event("output", 3, "a\n b\u2028c") == b"event: output\nid: 3\ndata: a\ndata:  b\ndata: c\n\n"
    assert [preferred_wait(value) for value in ("wait", "wait=5", "wait=500", "respond-async", "")] == [60, 5, 60, 0, 0]


def test_the_store_is_bounded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]) -> None:
    monkeypatch.setattr("ownlm.serve.replicate.KEPT", 3)
    with running(tiny_model(), tmp_path) as address:
        client = client_for(address)
        made = [
            client.predictions.create(version="0" * 64, input={"prompt": "x", "max_tokens": 1}, wait=True)
            for _ in range(5)
        ]
        found = [http.get(one.urls["get"]).status_code for one in made]
        client._client.close()
    assert found == [404, 404, 200, 200, 200]
