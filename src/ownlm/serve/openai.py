"""OpenAI's API: models, chat completions, completions, embeddings.

Shapes follow https://github.com/openai/openai-openapi; the official Python client's types check them in the tests.
"""

import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ownlm.generate.adapters import Adapter
from ownlm.generate.answers import best
from ownlm.generate.sampling import Token
from ownlm.generate.sequence import Event
from ownlm.serve.guard import error_body
from ownlm.serve.service import EventStream, Exchange, Service, Visible, read_body, token_text, unless_gone
from ownlm.serve.wire import BadRequest, ChatRequest, CompletionRequest, EmbeddingRequest, parse
from ownlm.serve.worker import EngineFault

Entry = tuple[int, Token]  # where a token's text starts, and the token


def model_card(service: Service, adapter: Adapter | None = None) -> dict[str, Any]:
    """The model, or an adapter of it, as /v1/models tells it; `max_model_len` and `parent` are vLLM's names for the context and for
    an adapter's base."""
    card = {
        "id": service.model.name,
        "object": "model",
        "created": service.started,
        "owned_by": "ownlm",
        "max_model_len": service.worker.engine.context,
        "ref": service.model.ref,
    }
    own = {} if adapter is None else {"id": adapter.name, "ref": adapter.ref, "parent": service.model.name}
    return card | own


async def models(exchange: Exchange, request: Request) -> Response:
    """GET /v1/models"""
    service = exchange.service
    return JSONResponse(
        {"object": "list", "data": [model_card(service, adapter) for adapter in (None, *service.adapters())]}
    )


async def model(exchange: Exchange, request: Request) -> Response:
    """GET /v1/models/{id}"""
    adapter = exchange.service.chosen(request.path_params["id"])
    return JSONResponse(model_card(exchange.service, adapter))


async def chat_completions(exchange: Exchange, request: Request) -> Response:
    """POST /v1/chat/completions"""
    wire = parse(ChatRequest, await read_body(request))
    service = exchange.service
    adapter = service.chosen(wire.model)
    sampling = await service.prepared(wire.sampling())
    prompt = await service.tokens([message.message() for message in wire.messages])
    exchange.submit([prompt], sampling, adapter=adapter, priority=wire.priority, deadline=wire.deadline)
    head = {"id": f"chatcmpl-{exchange.id}", "created": int(time.time()), "model": wire.model}
    if service.model.digest and adapter is None:
        head["system_fingerprint"] = f"fp_{service.model.digest[:10]}"

    def entries(tokens: list[Entry]) -> dict[str, Any] | None:
        return (
            {"content": [chat_entry(service, token) for _, token in tokens], "refusal": None} if wire.logprobs else None
        )

    if wire.stream:
        head["object"] = "chat.completion.chunk"

        def begin(index: int, event: Event, tokens: list[Entry]) -> list[dict[str, Any]]:
            return [
                {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            ]

        def choice(index: int, event: Event, tokens: list[Entry]) -> list[dict[str, Any]]:
            parts = []
            if event.text or (tokens and wire.logprobs):
                delta = {"content": event.text}
                parts.append({"index": index, "delta": delta, "logprobs": entries(tokens), "finish_reason": None})
            if event.finish_reason:
                parts.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": event.finish_reason})
            return parts

        return EventStream(chunks(exchange, head, begin, choice, wire.stream_options.include_usage), exchange.end)
    answers = await unless_gone(request.receive, gather(exchange))
    head["object"] = "chat.completion"
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": entries(tokens),
            "finish_reason": last.finish_reason,
        }
        for index, (text, tokens, _, last) in enumerate(answers)
    ]
    return JSONResponse({**head, "choices": choices, "usage": exchange.usage()})


async def completions(exchange: Exchange, request: Request) -> Response:
    """POST /v1/completions"""
    wire = parse(CompletionRequest, await read_body(request))
    service = exchange.service
    adapter = service.chosen(wire.model)
    given = wire.prompts()
    prompts = [await service.tokens(prompt) for prompt in given]
    sampling = await service.prepared(wire.sampling())
    exchange.submit(prompts, sampling, adapter=adapter, priority=wire.priority, deadline=wire.deadline)
    decode = service.model.tokenizer.decode
    echoed = [
        (prompt if isinstance(prompt, str) else decode(prompt, special=True)) if wire.echo else "" for prompt in given
    ]
    head = {"id": f"cmpl-{exchange.id}", "object": "text_completion", "created": int(time.time()), "model": wire.model}
    if service.model.digest and adapter is None:
        head["system_fingerprint"] = f"fp_{service.model.digest[:10]}"

    def body(index: int, text: str, tokens: list[Entry], first: Event | None, reason: str | None) -> dict[str, Any]:
        """A choice, or the part of it that a chunk carries; `first` is the event with the prompt's tokens."""
        prompt = echoed[index // wire.n]
        listed = [(start + len(prompt), token) for start, token in tokens]
        if first is not None:
            text = prompt + text
            listed = [*offsets(service, first.prompt), *listed]
        logprobs = legacy_logprobs(service, listed) if wire.logprobs is not None else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    if wire.stream:

        def begin(index: int, event: Event, tokens: list[Entry]) -> list[dict[str, Any]]:
            return [body(index, "", [], event, None)] if wire.echo else []

        def choice(index: int, event: Event, tokens: list[Entry]) -> list[dict[str, Any]]:
            if not event.text and not tokens and not event.finish_reason:
                return []
            return [body(index, event.text, tokens, None, event.finish_reason)]

        return EventStream(chunks(exchange, head, begin, choice, wire.stream_options.include_usage), exchange.end)
    answers = await unless_gone(request.receive, gather(exchange))
    choices = [
        body(index, text, tokens, first, last.finish_reason)
        for index, (text, tokens, first, last) in enumerate(answers)
    ]
    return JSONResponse({**head, "choices": choices, "usage": exchange.usage()})


async def embeddings(exchange: Exchange, request: Request) -> Response:
    """POST /v1/embeddings"""
    wire = parse(EmbeddingRequest, await read_body(request))
    service = exchange.service
    if service.chosen(wire.model) is not None:
        message = f"{wire.model!r} is an adapter, which writes. Embeddings are made by {service.model.name!r}."
        raise BadRequest(message, param="model")
    size = service.model.shapes.config.hidden_size
    if wire.dimensions not in {None, size}:
        raise BadRequest(f"This model's embeddings have {size} dimensions.", param="dimensions")
    ids = [await service.tokens(text) for text in wire.texts()]
    vectors = await service.worker.call(lambda: service.model.embed_ids(ids).numpy())
    exchange.prompt_tokens = sum(map(len, ids))
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if wire.encoding_format == "base64"
            else vector.tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": exchange.prompt_tokens, "total_tokens": exchange.prompt_tokens}
    return JSONResponse({"object": "list", "data": data, "model": wire.model, "usage": usage})


Answer = tuple[str, list[Entry], Event, Event]  # text, visible tokens, first and last event


async def gather(exchange: Exchange) -> list[Answer]:
    """All answers of a request, in the order of choices; with `best_of` the best of those to each prompt."""
    answers: dict[int, tuple[list[str], list[Entry], Visible, list[Event]]] = {}
    async for batch in exchange.batches():
        for index, event in batch:
            texts, tokens, visible, events = answers.setdefault(index, ([], [], Visible(), []))
            texts.append(event.text)
            tokens += visible.push(event)
            events.append(event)
    assert exchange.sampling is not None, "nothing was submitted"
    n, written = exchange.sampling.n, exchange.sampling.answers
    given: list[int] = []
    for first in range(0, len(answers), written):
        of_prompt = range(first, first + written)
        logprobs = [[_logprob(event) for event in answers[index][3] if event.token] for index in of_prompt]
        given += [first + place for place in best(logprobs, n)] if written > n else of_prompt
    return [
        ("".join(texts), tokens, events[0], events[-1]) for texts, tokens, _, events in (answers[at] for at in given)
    ]


def _logprob(event: Event) -> float:
    assert event.token is not None
    assert event.token.logprob is not None
    return event.token.logprob


Choices = Callable[[int, Event, list[Entry]], list[dict[str, Any]]]


async def chunks(
    exchange: Exchange, head: dict[str, Any], begin: Choices, choice: Choices, include_usage: bool
) -> AsyncIterator[bytes]:
    """The answers as server-sent events: what `begin` makes of an answer's first event, what `choice` makes of each."""
    visible: dict[int, Visible] = {}
    # With include_usage every chunk has the field, and only the last one a value.
    tail = {"usage": None} if include_usage else {}
    try:
        async for batch in exchange.batches():
            parts: list[dict[str, Any]] = []
            for index, event in batch:
                if index not in visible:
                    visible[index] = Visible()
                    parts += begin(index, event, [])
                parts += choice(index, event, visible[index].push(event))
            if parts:
                yield b"".join(sse({**head, "choices": [part], **tail}) for part in parts)
        if include_usage:
            yield sse({**head, "choices": [], "usage": exchange.usage()})
        yield b"data: [DONE]\n\n"
    except EngineFault as fault:
        yield sse({"error": error_body(500, str(fault), code="internal_error")["error"]})


def sse(data: dict[str, Any]) -> bytes:
    """One event. ASCII, so that no character of the text can be taken for a line's end."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def chat_entry(service: Service, token: Token) -> dict[str, Any]:
    """A token with its log-probability and the likeliest alternatives, as chat completions tell it."""

    def spelled(id: int, logprob: float) -> dict[str, Any]:
        data = service.token_bytes(id)
        return {"token": token_text(data), "logprob": max(logprob, -9999.0), "bytes": list(data)}

    assert token.logprob is not None
    return {**spelled(token.id, token.logprob), "top_logprobs": [spelled(id, value) for id, value in token.top]}


def legacy_logprobs(service: Service, entries: list[Entry]) -> dict[str, Any]:
    """Tokens, log-probabilities, alternatives and places of /v1/completions; the sampled token is always in `top_logprobs`."""

    def spelled(id: int) -> str:
        data = service.token_bytes(id)
        text = token_text(data)
        return text if text.encode() == data else f"bytes:{text}"

    def alternatives(token: Token) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for id, value in (*token.top, (token.id, token.logprob)):
            top.setdefault(spelled(id), max(value, -9999.0))
        return top

    return {
        "tokens": [spelled(token.id) for _, token in entries],
        "token_logprobs": [None if token.logprob is None else max(token.logprob, -9999.0) for _, token in entries],
        "top_logprobs": [alternatives(token) for _, token in entries],
        "text_offset": [start for start, _ in entries],
    }


def offsets(service: Service, prompt: tuple[Token, ...]) -> list[Entry]:
    """Where each token of an echoed prompt starts in its text."""
    stream, start, entries = service.model.tokenizer.decode_stream(), 0, []
    for token in prompt:
        entries.append((start, token))
        start += len(stream.push(token.id))
    return entries
