"""Priorities and deadlines over HTTP: bounded, told where they aren't allowed, and kept to."""

from pathlib import Path
from typing import Any

import pytest

from live import http, running, slow
from ownlm import device
from ownlm.errors import UserError
from tiny import tiny_model

ORDINARY, URGENT = "ordinary-0123456789", "urgent-0123456789"


def ask(address: str, key: str = "", **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4, "temperature": 0, **fields}
    return http.post(f"{address}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"} if key else {})


def test_a_key_goes_before_others_only_as_far_as_it_may(tmp_path: Path) -> None:
    with running(tiny_model(), tmp_path, api_keys={ORDINARY: 0, URGENT: -5}) as address:
        assert ask(address, ORDINARY, priority=7).status_code == 200
        assert ask(address, URGENT, priority=-5).status_code == 200
        for key, priority, least in ((ORDINARY, -1, 0), (URGENT, -6, -5)):
            refused = ask(address, key, priority=priority)
            assert refused.status_code == 403
            error = refused.json()["error"]
            assert (error["code"], error["param"]) == ("priority_not_allowed", "priority")
            assert f"least priority is {least}" in error["message"]


def test_fields_are_bounded(address: str) -> None:
    assert ask(address, priority=-1000, deadline=86_400).status_code == 200
    for fields in ({"priority": 1001}, {"priority": 0.5}, {"deadline": 0}, {"deadline": 1e6}, {"deadline": "soon"}):
        refused = ask(address, **fields)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] in fields


def test_an_answer_ends_at_its_deadline(tmp_path: Path) -> None:
    """Steps take 20 ms and the answer would have 400 of them."""
    with running(slow(tiny_model(context=512), 0.02), tmp_path, slots=1) as address:
        answer = ask(address, max_tokens=400, deadline=0.5)
        body = answer.json()
        assert answer.status_code == 200
        assert body["choices"][0]["finish_reason"] == "length"
        assert 0 < body["usage"]["completion_tokens"] < 400
        stream = ask(address, max_tokens=400, deadline=0.5, stream=True).text
        assert '"finish_reason":"length"' in stream
        assert stream.endswith("data: [DONE]\n\n")


def test_keys_bring_their_priorities_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWNLM_API_KEYS", f"{ORDINARY},{URGENT};priority=-5,")
    assert device.api_keys() == {ORDINARY: 0, URGENT: -5}
    monkeypatch.setenv("OWNLM_API_KEYS", f"{ORDINARY};prio=3")
    with pytest.raises(UserError, match="semicolon of key 1") as caught:
        device.api_keys()
    assert "prio=3" not in str(caught.value)
