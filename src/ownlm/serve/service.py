"""What every endpoint shares: the model and its worker, the limits, and the life of one request.

begin ─► submit (capacity, context) ─► batches of events ─► end (metrics, one record)
"""

import asyncio
import functools
import re
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ownlm.errors import ContextTooLong, UserError
from ownlm.generate.adapters import Adapter
from ownlm.generate.model import Model
from ownlm.generate.prompts import Prompt
from ownlm.generate.sampling import Sampling, Token
from ownlm.generate.sequence import Event
from ownlm.serve.guard import BodyTooLarge, Keys, error_body
from ownlm.serve.journal import Journal
from ownlm.serve.metrics import Metrics
from ownlm.serve.wire import BadRequest
from ownlm.serve.worker import Batch, EngineFault, Ticket, Worker
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.stream import BYTE_OF

T = TypeVar("T")
LONG_TEXT = 20_000  # characters; encoding more would hold up the event loop
BODY_TIMEOUT_S = 30.0
CLIENT_GONE = 499  # nginx's number for a client that closed the connection


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


class Service:
    """The model being served. Lives as long as the app."""

    def __init__(
        self, model: Model, *, keys: Keys, slots: int, max_waiting: int, journal: Journal | None, record_text: bool
    ) -> None:
        self.model, self.keys, self.journal, self.record_text = model, keys, journal, record_text
        self.worker = Worker(model, slots=slots)
        self.metrics = Metrics(model.name)
        self.max_answers = self.worker.engine.slots + max_waiting
        self.open_answers = 0
        self.started = int(time.time())
        self.token_bytes = functools.lru_cache(maxsize=65_536)(functools.partial(token_bytes, model.tokenizer))

    def adapters(self) -> list[Adapter]:
        """Those that are loaded now; none for a model that can have none."""
        return self.model.loaded_adapters

    def chosen(self, name: str) -> Adapter | None:
        """The adapter of that name, None for the model itself. Raises BadRequest (404) for a model that isn't served here."""
        if name in {self.model.name, self.model.ref}:
            return None
        loaded = {adapter.name: adapter for adapter in self.adapters()}
        if name not in loaded:
            served = ", ".join(map(repr, [self.model.name, *loaded]))
            message = f"The model {name!r} does not exist here. This server has {served}."
            raise BadRequest(message, param="model", status=404, code="model_not_found")
        return loaded[name]

    async def tokens(self, prompt: Prompt | list[int]) -> list[int]:
        """The tokens of a prompt, long texts in a thread of their own."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return [id for id in prompt if isinstance(id, int)]
        text: Prompt = prompt  # type: ignore[assignment]  # tokens are gone
        size = len(text) if isinstance(text, str) else sum(len(str(message)) for message in text)
        if size > LONG_TEXT:
            return await asyncio.to_thread(self.model.prompt_ids, text)
        return self.model.prompt_ids(text)

    async def prepared(self, sampling: Sampling) -> Sampling:
        """The same, its form built in a thread of its own: that may take a moment. Raises UserError."""
        if sampling.form is not None:
            await asyncio.to_thread(self.worker.engine.grammars.matcher, sampling.form)
        return sampling


class Exchange:
    """One request to the model, from its arrival to its record. `http` is false for work that outlives its HTTP request."""

    def __init__(self, service: Service, route: str, key_id: str | None, *, http: bool = True) -> None:
        self.service, self.route, self.key_id, self.http = service, route, key_id, http
        self.id = uuid.uuid4().hex
        self.started, self.began_s = datetime.now(UTC), time.monotonic()
        self.ticket: Ticket | None = None
        self.sampling: Sampling | None = None
        self.adapter: Adapter | None = None
        self.prompt_tokens = self.completion_tokens = 0
        self.first_token_s: float | None = None
        self.finish_reason: str | None = None
        self.prompt_text, self.answer_text = "", ""
        self.ended = False

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        adapter: Adapter | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> None:
        """Queue the prompts. Raises BadRequest (429 when too much is waiting, 403 for a priority that isn't this key's),
        ContextTooLong or UserError."""
        service, answers = self.service, len(prompts) * sampling.answers
        if answers > service.max_answers:
            raise BadRequest(f"This request asks for {answers} answers; at most {service.max_answers} may be open.")
        if service.open_answers + answers > service.max_answers:
            raise BadRequest("Too many requests are waiting. Try again soon.", status=429, code="queue_full")
        least = service.keys.least_priority(self.key_id)
        if priority < least:
            message = f"With this API key the least priority is {least}, not {priority}."
            raise BadRequest(message, param="priority", status=403, code="priority_not_allowed")
        if adapter is not None and sampling.beams > 1:
            raise BadRequest("A search over beams goes without adapters.", param="use_beam_search")
        self.ticket = service.worker.submit(
            prompts, sampling, adapter=adapter, tenant=self.key_id or "", priority=priority, deadline=deadline
        )
        self.adapter = adapter
        service.open_answers += answers
        self.sampling = sampling
        self.prompt_tokens = sum(map(len, prompts))
        if service.record_text:
            self.prompt_text = "\n\n".join(service.model.tokenizer.decode(prompt, special=True) for prompt in prompts)

    async def batches(self) -> AsyncIterator[Batch]:
        """The events of the answers, counted as they pass."""
        assert self.ticket is not None, "nothing was submitted"
        async for batch in self.ticket.batches():
            for _, event in batch:
                self.count(event)
            yield batch

    def count(self, event: Event) -> None:
        if event.token is not None:
            self.completion_tokens += 1
            if self.first_token_s is None:
                self.first_token_s = time.monotonic() - self.began_s
        self.finish_reason = event.finish_reason or self.finish_reason
        if self.service.record_text:
            self.answer_text += event.text

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def end(self, status: int) -> None:
        """Free what is left and write the record; only the first call counts."""
        if self.ended:
            return
        self.ended = True
        service, latency_s = self.service, time.monotonic() - self.began_s
        if self.ticket is not None:
            service.open_answers -= self.ticket.answers
            if self.ticket.open:
                service.worker.cancel(self.ticket)
                self.finish_reason = "error" if status >= 500 else "abort"
            service.metrics.generated(
                self.prompt_tokens, self.completion_tokens, self.first_token_s, latency_s, self.finish_reason or "stop"
            )
        if self.http:
            service.metrics.answered(self.route, status, latency_s)
        if service.journal is not None and (self.prompt_tokens or status >= 400):
            service.journal.add(self.record(status, latency_s))

    def record(self, status: int, latency_s: float) -> dict[str, Any]:
        """A row of the catalog's requests."""
        settings = asdict(self.sampling) if self.sampling else None
        if settings:
            settings["stop_ids"] = None if settings["stop_ids"] is None else sorted(settings["stop_ids"])
        keep = self.service.record_text
        return {
            "id": self.id,
            "started": self.started.replace(tzinfo=None),
            "route": self.route,
            "model": self.service.model.ref if self.adapter is None else self.adapter.ref,
            "key_id": self.key_id,
            "status": status,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "first_token_s": self.first_token_s,
            "latency_s": latency_s,
            "finish_reason": self.finish_reason,
            "sampling": settings,
            "prompt": self.prompt_text if keep else None,
            "completion": self.answer_text if keep else None,
        }


class Visible:
    """Which tokens of an answer its client may see: those whose text has been shown. One per answer."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, Token]] = []
        self.shown = 0

    def push(self, event: Event) -> list[tuple[int, Token]]:
        """(start, token) of what this event's text brings to light."""
        if event.token is not None:
            self.waiting.append((event.start, event.token))
        self.shown += len(event.text)
        ready = [item for item in self.waiting if item[0] < self.shown]
        del self.waiting[: len(ready)]
        return ready


class EventStream(Response):
    """Server-sent events: sends each chunk as it comes, and stops the work when the client goes away."""

    def __init__(self, chunks: AsyncIterator[bytes], end: Callable[[int], None]) -> None:
        super().__init__()
        self.chunks, self.end = chunks, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write() -> None:
            async for chunk in self.chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        status = CLIENT_GONE
        try:
            await unless_gone(receive, write())
            status = 200
        except ClientGone:
            pass
        finally:
            self.end(status)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client disconnects first, the work is cancelled and ClientGone raised."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def read_body(request: Request) -> bytes:
    """The whole body of JSON. Raises BadRequest for another content type or a client that takes too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Browsers send other types across origins without asking first.
        raise BadRequest("Content-Type must be application/json.", status=415, code="unsupported_media_type")
    try:
        return await asyncio.wait_for(request.body(), BODY_TIMEOUT_S)
    except TimeoutError:
        raise BadRequest("The body did not arrive in time.", status=408, code="body_timeout") from None


Handler = Callable[[Exchange, Request], Awaitable[Response]]


def endpoint(service: Service, route: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """A Starlette endpoint that runs `handler`, turns its errors into answers, and ends the exchange."""

    async def run(request: Request) -> Response:
        exchange = Exchange(service, route, request.scope.get("key_id"))
        try:
            response = await handler(exchange, request)
        except BodyTooLarge:
            exchange.end(413)
            raise
        except ClientGone:
            response = Response(status_code=CLIENT_GONE)
        except asyncio.CancelledError:
            exchange.end(CLIENT_GONE)
            raise
        except Exception as fault:  # noqa: BLE001  (every other fault becomes an answer; the unexpected ones are printed)
            response = failure(fault)
        if not isinstance(response, EventStream):
            exchange.end(response.status_code)
        return response

    return run


def failure(fault: Exception) -> JSONResponse:
    """The answer to a request that failed."""
    if isinstance(fault, BadRequest):
        body = error_body(fault.status, fault.message, param=fault.param, code=fault.code)
        return JSONResponse(body, fault.status, {"retry-after": "1"} if fault.status == 429 else None)
    if isinstance(fault, ContextTooLong):
        return JSONResponse(error_body(400, str(fault), param="messages", code="context_length_exceeded"), 400)
    if isinstance(fault, UserError):
        return JSONResponse(error_body(400, str(fault), param=fault.where or None), 400)
    if isinstance(fault, EngineFault):
        return JSONResponse(error_body(500, str(fault), code="internal_error"), 500)
    traceback.print_exception(fault)
    return JSONResponse(error_body(500, "The server failed on this request.", code="internal_error"), 500)


def token_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """The bytes that a token stands for inside a text; half a character where it is that."""
    before = tokenizer.encode("a")[:1]
    # A word's first token shows its space only when something stands before it.
    text = tokenizer.decode([*before, id], special=True).removeprefix(tokenizer.decode(before, special=True))
    if "�" not in text:
        return text.encode()
    piece: str = tokenizer.backend.id_to_token(id) or ""
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1])
    return bytes(BYTE_OF[character] for character in piece) if set(piece) <= set(BYTE_OF) else text.encode()


def token_text(data: bytes) -> str:
    """A token as a string; bytes that are no text are escaped: b"\\xc3" -> "\\\\xc3"."""
    return data.decode("utf-8", "backslashreplace")
