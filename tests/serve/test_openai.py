"""The official openai client against a live server, and its types as the oracle for every shape."""

import base64
import json
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types import Model as ModelCard
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from live import http
from ownlm.generate.model import Model
from ownlm.generate.sampling import Sampling

MESSAGES: Any = [{"role": "user", "content": "hello"}]
# Fields of ours that OpenAI's API doesn't have.
WAIVED = {"max_model_len", "ref"}


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def strict(kind: type[BaseModel], data: Any) -> Any:
    """The object of the client's own type, nothing coerced and nothing unknown."""

    def known(value: Any) -> None:
        if isinstance(value, BaseModel):
            assert not set(value.model_extra or {}) - WAIVED, value.model_extra
            for field in value.model_fields_set:
                known(getattr(value, field))
        elif isinstance(value, list):
            for item in value:
                known(item)

    made = kind.model_validate(data, strict=True)
    known(made)
    return made


def streamed(address: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The parsed chunks of a stream, which must end with [DONE]."""
    with httpx.stream("POST", address + path, json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_models(client: openai.OpenAI, address: str) -> None:
    [listed] = client.models.list().data
    assert listed.id == "tiny"
    strict(ModelCard, http.get(f"{address}/v1/models/tiny").json())
    assert client.models.retrieve("tiny@1").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_chat_equals_the_engine(client: openai.OpenAI, address: str, model: Model) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=1, seed=3, max_tokens=20, top_p=0.9
    )
    expected = model.generate(MESSAGES, temperature=1, seed=3, max_tokens=20, top_p=0.9)
    assert reply.choices[0].message.content == expected.text
    assert reply.choices[0].finish_reason == expected.finish_reason
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == expected.prompt_tokens
    assert reply.usage.completion_tokens == len(expected.tokens)
    body = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 3,
        "seed": 1,
    }
    strict(ChatCompletion, http.post(f"{address}/v1/chat/completions", json=body).json())


def test_chat_streams_the_same(address: str, client: openai.OpenAI) -> None:
    body = {
        "model": "tiny",
        "messages": MESSAGES,
        "seed": 5,
        "max_tokens": 30,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 2,
    }
    whole = client.chat.completions.create(**body)
    chunks = [
        strict(ChatCompletionChunk, chunk)
        for chunk in streamed(address, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    for index, choice in enumerate(whole.choices):
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content or []]
        assert choice.logprobs is not None
        assert [entry.token for entry in entries] == [entry.token for entry in choice.logprobs.content or []]
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_logprobs_spell_the_answer(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=2, max_tokens=40, logprobs=True, top_logprobs=4, temperature=1
    )
    [choice] = reply.choices
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    joined = b"".join(bytes(entry.bytes or []) for entry in entries)
    assert joined.decode("utf-8", "replace") == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 4
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert entry.logprob <= entry.top_logprobs[0].logprob


def test_a_stop_string_hides_its_tokens(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny", "messages": MESSAGES, "seed": 11, "max_tokens": 40, "logprobs": True}
    whole = client.chat.completions.create(**settings).choices[0]
    text = whole.message.content or ""
    stop = text[6:8]
    cut = client.chat.completions.create(**settings, stop=[stop]).choices[0]
    assert cut.message.content == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.logprobs is not None
    shown = b"".join(bytes(entry.bytes or []) for entry in cut.logprobs.content or [])
    assert shown.decode("utf-8", "replace") == cut.message.content


def test_completions_echo_scores_the_prompt(address: str, client: openai.OpenAI, model: Model) -> None:
    """What lm-eval's local-completions asks for: the log-probability of every prompt token."""
    text = "the cat sat"
    reply = client.completions.create(model="tiny", prompt=text, max_tokens=1, echo=True, logprobs=2, temperature=0)
    [choice] = reply.choices
    assert choice.text.startswith(text)
    found = choice.logprobs
    assert found is not None
    ids = model.tokenizer.encode(text)
    reference = model.logits([ids])[0].log_softmax(-1)
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    assert "".join(found.tokens[: len(ids)]) == text
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(
        [reference[at, id].item() for at, id in enumerate(ids[1:])], abs=1e-4
    )
    assert found.text_offset[: len(ids)] == list(range(len(text)))
    for token, logprob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert top[token] == pytest.approx(logprob)
        assert len(top) in {2, 3}
    only = client.completions.create(model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert only.text == text
    assert only.finish_reason == "length"


def test_completions_of_text_and_tokens(address: str, client: openai.OpenAI, model: Model) -> None:
    prompts = ["one", "two three"]
    expected = [model.generate(prompt, temperature=1, seed=1, max_tokens=16) for prompt in prompts]
    for prompt in (prompts, [model.tokenizer.encode(prompt) for prompt in prompts]):
        reply = client.completions.create(model="tiny", prompt=prompt, seed=1)
        assert [choice.text for choice in reply.choices] == [answer.text for answer in expected]
    one = client.completions.create(model="tiny", prompt=model.tokenizer.encode("one"), seed=1)
    assert one.choices[0].text == expected[0].text
    body = {"model": "tiny", "prompt": prompts, "n": 2, "seed": 1, "logprobs": 1, "max_tokens": 6, "echo": True}
    whole = http.post(f"{address}/v1/completions", json=body).json()
    answers = model.answers(
        [model.prompt_ids(prompt) for prompt in prompts], Sampling(n=2, temperature=1, seed=1, max_tokens=6)
    )
    assert [c["text"] for c in whole["choices"]] == [
        prompt + one.text for prompt, row in zip(prompts, answers, strict=True) for one in row
    ]
    chunks = streamed(address, "/v1/completions", body)
    for index, choice in enumerate(whole["choices"]):
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for field in ("tokens", "token_logprobs", "text_offset"):
            assert [value for part in parts for value in part["logprobs"][field]] == choice["logprobs"][field]
    del body["echo"]
    strict(Completion, http.post(f"{address}/v1/completions", json=body).json())
    for chunk in streamed(address, "/v1/completions", body):
        assert chunk["object"] == "text_completion"


def test_embeddings(address: str, client: openai.OpenAI, model: Model) -> None:
    texts = ["one", "two and three"]
    reference = model.embed(texts).numpy()
    # The client asks for base64 by itself and decodes it.
    reply = client.embeddings.create(model="tiny", input=texts)
    np.testing.assert_allclose([item.embedding for item in reply.data], reference, atol=1e-5)
    assert reply.usage.prompt_tokens == 16
    body = {"model": "tiny", "input": texts, "encoding_format": "float"}
    plain = strict(CreateEmbeddingResponse, http.post(f"{address}/v1/embeddings", json=body).json())
    np.testing.assert_allclose(plain.data[1].embedding, reference[1], atol=1e-5)
    raw = http.post(f"{address}/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"][0][
        "embedding"
    ]
    np.testing.assert_allclose(struct.unpack("<32f", base64.b64decode(raw)), reference[0], atol=1e-5)
    ids = client.embeddings.create(model="tiny", input=[model.tokenizer.encode("one")])
    np.testing.assert_allclose(ids.data[0].embedding, reference[0], atol=1e-5)
    assert len(client.embeddings.create(model="tiny", input="one", dimensions=32).data) == 1
    with pytest.raises(openai.BadRequestError, match="32 dimensions"):
        client.embeddings.create(model="tiny", input="one", dimensions=7)
    with pytest.raises(openai.BadRequestError, match="600 tokens"):
        client.embeddings.create(model="tiny", input="x" * 600)


def test_errors_come_in_openai_s_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 600}], max_tokens=10)
    assert caught.value.code == "context_length_exceeded"
    assert "619 tokens and 10 more" in str(caught.value)
    assert "512" in str(caught.value)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, frequency_penalty=2.5)
    with pytest.raises(openai.BadRequestError, match="Did you mean temperature"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"temprature": 1})
    with pytest.raises(openai.BadRequestError, match="999 is not a token"):
        client.completions.create(model="tiny", prompt=[999])
    with pytest.raises(openai.BadRequestError) as roles:
        client.chat.completions.create(model="tiny", messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}])
    assert roles.value.param == "messages"
    harmless: Any = {"user": "me", "store": False, "metadata": {"a": "b"}, "tools": []}
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1, **harmless).choices


def test_content_parts_and_developer_messages(client: openai.OpenAI) -> None:
    plain: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    parts: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    replies = [
        client.chat.completions.create(model="tiny", messages=messages, seed=1, max_tokens=8)
        for messages in (plain, parts)
    ]
    assert replies[0].choices[0].message == replies[1].choices[0].message


def open_requests(address: str) -> float:
    lines = http.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_"))


def test_a_client_that_leaves_frees_its_slot(
    slow_address: str, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "seed": 1, "max_tokens": 3000}
    with httpx.stream("POST", f"{slow_address}/v1/chat/completions", json={**body, "stream": True}) as response:
        pieces = response.iter_bytes()  # httpx hangs up when nobody holds this any more
        next(pieces)
        wait_until(lambda: open_requests(slow_address) == 1)
    wait_until(lambda: open_requests(slow_address) == 0)
    with pytest.raises(httpx.ReadTimeout):
        http.post(f"{slow_address}/v1/chat/completions", json=body, timeout=httpx.Timeout(20, read=2))
    wait_until(lambda: open_requests(slow_address) == 0)


def test_a_search_over_beams_is_what_the_model_finds(client: openai.OpenAI, model: Model) -> None:
    """By vLLM's names: n is the width, and all beams are given, best first."""
    search: dict[str, Any] = {"use_beam_search": True}
    prompts = ["once upon", "the mill"]
    sampling = Sampling(beams=3, n=3, max_tokens=12)
    expected = [one for row in model.answers([model.prompt_ids(text) for text in prompts], sampling) for one in row]
    found = client.completions.create(model="tiny", prompt=prompts, n=3, max_tokens=12, logprobs=0, extra_body=search)
    assert [choice.text for choice in found.choices] == [one.text for one in expected]
    assert [choice.finish_reason for choice in found.choices] == [one.finish_reason for one in expected]
    assert found.usage is not None
    assert found.usage.completion_tokens == sum(len(one.tokens) for one in expected)
    short = {**search, "length_penalty": 0.0}
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=4, max_tokens=9, logprobs=True, extra_body=short
    )
    ids, settings = model.prompt_ids(MESSAGES), Sampling(beams=4, n=4, max_tokens=9, length_penalty=0.0)
    assert [choice.message.content for choice in chat.choices] == [
        one.text for one in model.answers([ids], settings)[0]
    ]
    # A search of width one is greedy.
    [one] = client.completions.create(model="tiny", prompt="once", max_tokens=8, extra_body=search).choices
    assert one.text == model.generate("once", max_tokens=8).text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"use_beam_search": True, "stream": True}, "takes no stream"),
        ({"use_beam_search": True, "temperature": 0.7}, "goes without temperature"),
        ({"use_beam_search": True, "top_p": 0.5, "priority": 1}, "goes without top_p, priority"),
        ({"use_beam_search": True, "n": 2, "stop": "x"}, "neither temperature nor stop strings"),
        ({"use_beam_search": True, "n": 2, "logprobs": 2}, "tells no alternatives"),
        ({"length_penalty": 0.5}, "needs use_beam_search"),
    ],
)
def test_what_a_search_does_not_take_is_told(address: str, fields: dict[str, Any], told: str) -> None:
    reply = http.post(f"{address}/v1/completions", json={"model": "tiny", "prompt": "x", **fields})
    assert reply.status_code == 400
    assert told in reply.json()["error"]["message"]


def test_a_search_holds_nobody_up_and_ends_when_its_client_leaves(
    slow_address: str, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    def cache_usage() -> float:
        lines = http.get(f"{slow_address}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:kv_cache_usage_perc"))

    def leave() -> None:
        with pytest.raises(httpx.ReadTimeout):
            http.post(f"{slow_address}/v1/completions", json=body, timeout=httpx.Timeout(20, read=2))

    body = {"model": "tiny", "prompt": "once", "n": 2, "max_tokens": 900, "use_beam_search": True}
    wait_until(lambda: cache_usage() == 0)
    with ThreadPoolExecutor(1) as pool:
        searching = pool.submit(leave)
        wait_until(lambda: cache_usage() > 0)
        plain = http.post(f"{slow_address}/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 5})
        assert plain.status_code == 200
        assert not searching.done()
        # Its beams are answers that are open.
        assert http.post(f"{slow_address}/v1/completions", json={**body, "n": 3}).status_code == 429
        searching.result()
    wait_until(lambda: cache_usage() == 0)


def test_too_many_requests_are_told_to_come_back(
    slow_address: str, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "seed": 1,
        "max_tokens": 3000,
        "stream": True,
        "n": 4,
    }
    with httpx.stream("POST", f"{slow_address}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        pieces = response.iter_bytes()  # httpx hangs up when nobody holds this any more
        next(pieces)
        refused = http.post(f"{slow_address}/v1/chat/completions", json={**body, "n": 1})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
    wait_until(lambda: open_requests(slow_address) == 0)
    assert http.post(f"{slow_address}/v1/chat/completions", json={**body, "n": 5}).status_code == 400


def test_a_broken_step_ends_its_requests_and_not_the_server(
    address: str, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ownlm.generate.engine.sample", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="engine failed"):
            client.chat.completions.create(model="tiny", messages=MESSAGES)
        with pytest.raises(openai.APIError, match="engine failed"):
            list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1).choices
    assert http.get(f"{address}/health").status_code == 200


def test_answers_of_a_given_form(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "length" or json.loads(answer.choices[0].message.content or "")["a"] in (
        1,
        2,
    )
    found = client.completions.create(model="tiny", prompt="x", extra_body={"guided_regex": "(ab){2}c"})
    assert found.choices[0].text == "ababc"
    with pytest.raises(openai.BadRequestError, match="regex"):
        client.completions.create(model="tiny", prompt="x", extra_body={"guided_regex": "((("})
    with pytest.raises(openai.BadRequestError, match="one form"):
        client.completions.create(model="tiny", prompt="x", extra_body={"guided_regex": "a", "guided_grammar": "b"})


def test_the_best_of_several_completions(client: openai.OpenAI, address: str) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": ["a", "bc"], "max_tokens": 6, "temperature": 1, "seed": 5}
    every = client.completions.create(**settings, n=5, logprobs=0)
    found = client.completions.create(**settings, n=2, best_of=5, logprobs=0)

    def mean(choice: Any) -> float:
        values = choice.logprobs.token_logprobs
        return sum(values) / len(values)

    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    for place in range(2):
        of_prompt = sorted(every.choices[5 * place : 5 * place + 5], key=mean, reverse=True)
        assert [choice.text for choice in found.choices[2 * place : 2 * place + 2]] == [
            choice.text for choice in of_prompt[:2]
        ]
    assert found.usage == every.usage  # what was written counts, as OpenAI counts it
    for wrong in ({"best_of": 2, "n": 3}, {"best_of": 3, "stream": True}, {"best_of": 200}):
        with pytest.raises(openai.BadRequestError, match="best_of"):
            client.completions.create(**settings, **wrong)
