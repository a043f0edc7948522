"""Replicate's API, as its Python client uses it: run, stream, get, cancel.

    POST …/predictions ─► Prediction (an id of ours, in a bounded store) ─► a task that gathers the output
                              ▲                                                  │
        GET …/{id}, …/{id}/stream, POST …/{id}/cancel ◄──────────────────────────┘

A prediction goes on when its client goes away, and whoever created it can come back for it: ids are random, and belong to the
API key that made them.
"""

import asyncio
import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ownlm.generate.adapters import Adapter
from ownlm.serve.service import CLIENT_GONE, EventStream, Exchange, Service, read_body
from ownlm.serve.wire import BadRequest, PredictionRequest, parse
from ownlm.serve.worker import EngineFault

OWNER = "ownlm"
KEPT = 512  # predictions in memory; the oldest finished ones go first
WAIT_S = 60.0  # what "Prefer: wait" means without a number, and at most
# httpx, inside the client, ends a line at each of these; a spec-abiding client only at the first three.
LINE_ENDS = re.compile("\r\n|[\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029]")

Status = Literal["starting", "processing", "succeeded", "failed", "canceled"]


class Prediction:
    """A generation under way or done. Lives on the event loop."""

    def __init__(self, exchange: Exchange, inputs: dict[str, Any]) -> None:
        self.exchange, self.inputs = exchange, inputs
        self.id = secrets.token_hex(13)
        self.status: Status = "starting"
        self.output: list[str] = []
        self.error: str | None = None
        self.created = now()
        self.began: str | None = None
        self.completed: str | None = None
        self.changed = asyncio.Condition()
        self.task = asyncio.create_task(self.run())

    @property
    def done(self) -> bool:
        return self.status in {"succeeded", "failed", "canceled"}

    async def run(self) -> None:
        """Gather the output until the answer ends, the engine fails, or somebody cancels."""
        status = 200
        try:
            async for batch in self.exchange.batches():
                self.began = self.began or now()
                self.output += [event.text for _, event in batch if event.text]
                await self.tell("processing")
            await self.tell("succeeded")
        except EngineFault as fault:
            status, self.error = 500, str(fault)
            await self.tell("failed")
        except asyncio.CancelledError:
            status = CLIENT_GONE
            await self.tell("canceled")
        finally:
            self.exchange.end(status)

    async def tell(self, status: Status) -> None:
        """Take on a status and wake who waits."""
        self.status = status
        if self.done:
            self.completed = now()
        async with self.changed:
            self.changed.notify_all()

    async def finished(self, timeout_s: float) -> None:
        """Wait for the end, but not longer than `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.task), timeout_s)

    async def cancel(self) -> None:
        """End it now, unless it has ended."""
        if not self.done:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task
        # A task that is cancelled before its first step never runs.
        if not self.done:
            await self.tell("canceled")
            self.exchange.end(CLIENT_GONE)

    async def events(self, first: int) -> AsyncIterator[bytes]:
        """The output from piece `first` on as server-sent events, ended by `done`."""
        place = first
        while True:
            async with self.changed:
                while not self.done and len(self.output) <= place:
                    await self.changed.wait()
            while place < len(self.output):
                yield server_event("output", place, self.output[place])
                place += 1
            if self.done:
                break
        if self.error is not None:
            yield server_event("error", place, self.error)
        yield server_event("done", place, '{"reason":"canceled"}' if self.status == "canceled" else "{}")

    def body(self, request: Request) -> dict[str, Any]:
        """The prediction as JSON."""
        service, base = self.exchange.service, str(request.base_url).rstrip("/")
        place = f"{base}/v1/predictions/{self.id}"
        usage = {
            "input_token_count": self.exchange.prompt_tokens,
            "output_token_count": self.exchange.completion_tokens,
        }
        return {
            "id": self.id,
            "model": f"{OWNER}/{name_of(service, self.exchange.adapter)}",
            "version": version_id(service, self.exchange.adapter),
            "status": self.status,
            "input": self.inputs,
            "output": self.output if self.output or self.done else None,
            "logs": "",
            "error": self.error,
            "metrics": usage if self.done else {},
            "created_at": self.created,
            "started_at": self.began,
            "completed_at": self.completed,
            "urls": {"get": place, "cancel": f"{place}/cancel", "stream": f"{place}/stream"},
        }


class Predictions:
    """The bounded store of predictions."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, Prediction] = OrderedDict()

    def add(self, prediction: Prediction) -> None:
        self.kept[prediction.id] = prediction
        for id in [id for id, one in self.kept.items() if one.done][: max(0, len(self.kept) - KEPT)]:
            del self.kept[id]

    def find(self, exchange: Exchange, request: Request) -> Prediction:
        """The prediction in the address. Raises BadRequest (404) when there is none of this caller."""
        found = self.kept.get(request.path_params["id"])
        if found is None or found.exchange.key_id != exchange.key_id:
            raise BadRequest("There is no such prediction.", status=404, code="prediction_not_found")
        return found

    async def close(self) -> None:
        """Cancel what is still running."""
        for prediction in self.kept.values():
            await prediction.cancel()

    async def create(self, exchange: Exchange, request: Request) -> Response:
        """POST /v1/predictions and /v1/models/{owner}/{name}/predictions"""
        service, named = exchange.service, "name" in request.path_params
        adapter = named_adapter(service, request) if named else None
        wire = parse(PredictionRequest, await read_body(request))
        versions = {version_id(service, one): one for one in ([adapter] if named else [None, *service.adapters()])}
        if not (named and wire.version is None):
            if wire.version not in versions:
                raise BadRequest(f"This server has version {', '.join(versions)}.", param="version", status=422)
            adapter = versions[wire.version]
        wait_s = preferred_wait(request.headers.get("prefer", ""))
        # The exchange of the HTTP request ends with its answer; the prediction has one of its own.
        work = Exchange(service, exchange.route, exchange.key_id, http=False)
        work.submit([await service.tokens(wire.input.question())], wire.input.sampling(), adapter=adapter)
        prediction = Prediction(work, wire.input.model_dump(exclude_unset=True))
        self.add(prediction)
        if wait_s:
            await prediction.finished(wait_s)
        body = prediction.body(request)
        if not prediction.done:
            # The client takes any other status after "Prefer: wait" for the end.
            body["status"] = "starting"
        return JSONResponse(body, 201)

    async def get(self, exchange: Exchange, request: Request) -> Response:
        """GET /v1/predictions/{id}"""
        return JSONResponse(self.find(exchange, request).body(request))

    async def cancel(self, exchange: Exchange, request: Request) -> Response:
        """POST /v1/predictions/{id}/cancel"""
        prediction = self.find(exchange, request)
        await prediction.cancel()
        return JSONResponse(prediction.body(request))

    async def stream(self, exchange: Exchange, request: Request) -> Response:
        """GET /v1/predictions/{id}/stream"""
        prediction = self.find(exchange, request)
        last = request.headers.get("last-event-id", "")
        first = int(last) + 1 if last.isdecimal() and len(last) < 10 else 0
        return EventStream(prediction.events(first), exchange.end)


async def model(exchange: Exchange, request: Request) -> Response:
    """GET /v1/models/{owner}/{name}"""
    service = exchange.service
    adapter = named_adapter(service, request)
    return JSONResponse(
        {
            "url": str(request.base_url),
            "owner": OWNER,
            "name": name_of(service, adapter),
            "description": service.model.ref if adapter is None else adapter.ref,
            "visibility": "private",
            "github_url": None,
            "paper_url": None,
            "license_url": None,
            "run_count": 0,
            "cover_image_url": None,
            "default_example": None,
            "latest_version": version(service, adapter),
        }
    )


async def model_version(exchange: Exchange, request: Request) -> Response:
    """GET /v1/models/{owner}/{name}/versions/{version}"""
    adapter = named_adapter(exchange.service, request)
    if request.path_params["version"] != (known := version_id(exchange.service, adapter)):
        raise BadRequest(f"This server has version {known}.", status=404)
    return JSONResponse(version(exchange.service, adapter))


def version(service: Service, adapter: Adapter | None) -> dict[str, Any]:
    """The version with the schema that tells the client to iterate over the output."""
    output = {"type": "array", "items": {"type": "string"}, "x-cog-array-type": "iterator"}
    output["x-cog-array-display"] = "concatenate"
    return {
        "id": version_id(service, adapter),
        "created_at": datetime.fromtimestamp(service.started, UTC).isoformat(),
        "cog_version": "0.9.0",
        "openapi_schema": {"components": {"schemas": {"Output": output}}},
    }


def version_id(service: Service, adapter: Adapter | None = None) -> str:
    """The checkpoint's digest; for a model without one, a hash of its reference; for an adapter, one of both references."""
    if adapter is None:
        return service.model.digest or hashlib.sha256(service.model.ref.encode()).hexdigest()
    return hashlib.sha256(f"{version_id(service)} {adapter.ref}".encode()).hexdigest()


def name_of(service: Service, adapter: Adapter | None) -> str:
    return service.model.name if adapter is None else adapter.name


def named_adapter(service: Service, request: Request) -> Adapter | None:
    """The adapter in the address, None for the model itself. Raises BadRequest (404) for another model than ours."""
    owner, name = request.path_params["owner"], request.path_params["name"]
    served = {name_of(service, one): one for one in (None, *service.adapters())}
    if owner != OWNER or name not in served:
        message = f"There is no model {owner}/{name}. This server has {', '.join(f'{OWNER}/{one}' for one in served)}."
        raise BadRequest(message, status=404, code="model_not_found")
    return served[name]


def preferred_wait(prefer: str) -> float:
    """Seconds to hold the answer back: preferred_wait("wait=5") == 5.0, preferred_wait("") == 0.0."""
    found = re.search(r"(?:^|[,;\s])wait(?:=(\d{1,4}))?(?:$|[,;\s])", prefer)
    return min(float(found[1] or WAIT_S), WAIT_S) if found else 0.0


def server_event(event: str, id: int, text: str) -> bytes:
    """One server-sent event; each line of the text is a data line, which the client joins again."""
    data = "\n".join(f"data: {line}" for line in LINE_ENDS.split(text))
    return f"event: {event}\nid: {id}\n{data}\n\n".encode()


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
