"""Bodies of every kind: what is malformed is refused with a 4xx and a sentence, never with a 500 and never in silence."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from live import http
from ownlm.serve.wire import (
    NEUTRAL,
    BadRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    PredictionRequest,
    Wire,
    parse,
)

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
KINDS: tuple[type[Wire], ...] = (ChatRequest, CompletionRequest, EmbeddingRequest, PredictionRequest)


def refusal(kind: type[Wire], body: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        parse(kind, body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


def test_each_fault_names_its_field() -> None:
    for change, param in (
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"logit_bias": {"one": 2}}, "logit_bias"),
        ({"model": None}, "model"),
        ({"unheard_of": None}, "unheard_of"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options"),
    ):
        fault = refusal(ChatRequest, {**CHAT, **change})
        assert fault.param == param, (change, fault.message)
        assert param in fault.message
    for change, words in (
        ({"top_logprobs": 2}, "needs logprobs=true"),
        ({"stream_options": {}}, "needs stream=true"),
        ({"max_completion_tokens": 2}, "two names of one limit"),
    ):
        assert words in refusal(ChatRequest, {**CHAT, **change}).message
    several = refusal(ChatRequest, {"temprature": 1, "n": 0})
    for words in ("Did you mean temperature?", "n: ", "Missing field model.", "Missing field messages."):
        assert words in several.message


def test_what_asks_for_nothing_is_accepted() -> None:
    neutral = {name: values[0] for name, values in NEUTRAL.items()}
    request = parse(ChatRequest, json.dumps({**CHAT, **neutral, "user": "me", "top_k": None, "seed": None}).encode())
    assert request == parse(ChatRequest, json.dumps(CHAT).encode())


def test_completions_refuse_what_makes_no_sense() -> None:
    base = {"model": "tiny", "prompt": "x"}
    for change, words in (
        ({"max_tokens": 0}, "needs echo"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 200, "n": 2}, "at most 256"),
        ({"suffix": "end"}, "suffix is not supported"),
        ({"best_of": 3, "n": 4}, "must be at most best_of"),
        ({"best_of": 3, "stream": True}, "best_of takes no stream"),
        ({"prompt": ["a"] * 90, "best_of": 3}, "at most 256"),
    ):
        assert words in refusal(CompletionRequest, {**base, **change}).message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"a": "\\ud800"}',
    ],
    ids=range(10),
)
def test_what_is_no_json_object_is_refused(body: bytes, address: str) -> None:
    assert refusal(ChatRequest, body).code == "invalid_json"
    answer = http.post(f"{address}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


names = st.sampled_from(sorted({field for kind in KINDS for field in kind.model_fields} | set(NEUTRAL))) | st.text(
    max_size=8
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(kind=st.sampled_from(KINDS), body=st.dictionaries(names, values, max_size=6) | values)
@settings(max_examples=200, deadline=None)
def test_any_json_is_parsed_or_refused(kind: type[Wire], body: Any) -> None:
    try:
        request = parse(kind, json.dumps(body).encode())
    except BadRequest:
        return
    else:
        # Nothing is accepted and ignored: every field is known, a label, or asks for nothing.
        assert set(body) <= set(kind.model_fields) | kind.labels | set(kind.neutral)
        assert isinstance(request, kind)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_live_server_never_fails_on_a_body(data: st.DataObject, address: str) -> None:
    path = data.draw(
        st.sampled_from(["chat/completions", "completions", "embeddings", "models/ownlm/tiny/predictions"])
    )
    body = data.draw(
        st.binary(max_size=40)
        | st.builds(lambda extra: json.dumps({**CHAT, **extra}).encode(), st.dictionaries(names, values, max_size=2))
    )
    answer = http.post(f"{address}/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code < 500, (path, body, answer.text)
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]
