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
            "model": f"{OWNER}/{service.model.name}",
            "version": version_id(service),
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
        if named:
            check_name(service, request)
        wire = parse(PredictionRequest, await read_body(request))
        if wire.version not in {None, version_id(service)} or (wire.version is None and not named):
            raise BadRequest(f"This server has version {version_id(service)}.", param="version", status=422)
        wait_s = preferred_wait(request.headers.get("prefer", ""))
        # The exchange of the HTTP request ends with its answer; the prediction has one of its own.
        work = Exchange(service, exchange.route, exchange.key_id, http=False)
        work.submit([await service.tokens(wire.input.question())], wire.input.sampling())
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
    check_name(exchange.service, request)
    service = exchange.service
    return JSONResponse(
        {
            "url": str(request.base_url),
            "owner": OWNER,
            "name": service.model.name,
            "description": service.model.ref,
            "visibility": "private",
            "github_url": None,
            "paper_url": None,
            "license_url": None,
            "run_count": 0,
            "cover_image_url": None,
            "default_example": None,
            "latest_version": version(service),
        }
    )


async def model_version(exchange: Exchange, request: Request) -> Response:
    """GET /v1/models/{owner}/{name}/versions/{version}"""
    check_name(exchange.service, request)
    if request.path_params["version"] != version_id(exchange.service):
        raise BadRequest(f"This server has version {version_id(exchange.service)}.", status=404)
    return JSONResponse(version(exchange.service))


def version(service: Service) -> dict[str, Any]:
    """The version with the schema that tells the client to iterate over the output."""
    output = {"type": "array", "items": {"type": "string"}, "x-cog-array-type": "iterator"}
    output["x-cog-array-display"] = "concatenate"
    return {
        "id": version_id(service),
        "created_at": datetime.fromtimestamp(service.started, UTC).isoformat(),
        "cog_version": "0.9.0",
        "openapi_schema": {"components": {"schemas": {"Output": output}}},
    }


def version_id(service: Service) -> str:
    """The checkpoint's digest; for a model without one, a hash of its reference."""
    return service.model.digest or hashlib.sha256(service.model.ref.encode()).hexdigest()


def check_name(service: Service, request: Request) -> None:
    """Raise BadRequest (404) for another model than ours."""
    owner, name = request.path_params["owner"], request.path_params["name"]
    if (owner, name) != (OWNER, service.model.name):
        message = f"There is no model {owner}/{name}. This server has {OWNER}/{service.model.name}."
        raise BadRequest(message, status=404, code="model_not_found")


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
