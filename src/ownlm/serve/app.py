"""The ASGI app: every endpoint with its access policy, in one table.

Guard (who, from where, how much) ─► router ─► endpoint (errors, record) ─► openai.py, replicate.py, the chat page
"""

import hashlib
import mimetypes
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ownlm.artifact import Workspace
from ownlm.generate.model import Model
from ownlm.serve import openai, replicate
from ownlm.serve.adapters import Loading
from ownlm.serve.guard import Access, Guard, Keys, check_access, error_body
from ownlm.serve.journal import Journal
from ownlm.serve.service import Handler, Service, endpoint

SLOTS = 16
MAX_WAITING = 256
MAX_BODY_BYTES = 4 * 2**20
PAGE = ("index.html", "style.css", "chat.js", "favicon.svg")


def create_app(
    model: Model,
    *,
    api_keys: Collection[str] = (),
    admin_keys: Collection[str] = (),
    allowed_hosts: Collection[str] = (),
    allowed_origins: Collection[str] = (),
    slots: int = SLOTS,
    max_waiting: int = MAX_WAITING,
    max_body_bytes: int = MAX_BODY_BYTES,
    record: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
    record_text: bool = False,
    workspace: Workspace | None = None,
) -> Starlette:
    """An app that serves one model.

    api_keys         who may use the API; none: everybody who can reach it. As {key: least priority} they say how far before
                     others each may go with `priority` (smaller goes first); otherwise at 0, before nobody
    admin_keys       who may load and unload adapters; none: nobody where there are API keys, otherwise everybody
    allowed_hosts    host names besides localhost and IP addresses
    allowed_origins  pages besides our own that may send requests, e.g. behind a TLS proxy
    slots            answers generated at the same time; max_waiting more may wait, beyond that 429
    record           gets the requests' records in batches, in a thread of its own
    record_text      keep prompts and answers in the records
    workspace        where references of adapters are looked up; None: that of `device.home()`
    Raises UserError for a route without an access policy and for API keys that are too weak.
    """
    keys = Keys(api_keys)
    journal = Journal(record) if record else None
    service = Service(model, keys=keys, slots=slots, max_waiting=max_waiting, journal=journal, record_text=record_text)
    predictions, loading = replicate.Predictions(), Loading(workspace)

    api: tuple[tuple[str, str, Handler], ...] = (
        ("GET", "/v1/models", openai.models),
        ("POST", "/v1/chat/completions", openai.chat_completions),
        ("POST", "/v1/completions", openai.completions),
        ("POST", "/v1/embeddings", openai.embeddings),
        ("POST", "/v1/predictions", predictions.create),
        ("GET", "/v1/predictions/{id}", predictions.get),
        ("GET", "/v1/predictions/{id}/stream", predictions.stream),
        ("POST", "/v1/predictions/{id}/cancel", predictions.cancel),
        ("POST", "/v1/models/{owner}/{name}/predictions", predictions.create),
        ("GET", "/v1/models/{owner}/{name}/versions/{version}", replicate.model_version),
        ("GET", "/v1/models/{owner}/{name}", replicate.model),
        ("GET", "/v1/models/{id}", openai.model),
    )
    admin: tuple[tuple[str, str, Handler], ...] = (
        ("POST", "/v1/load_lora_adapter", loading.load),
        ("POST", "/v1/unload_lora_adapter", loading.unload),
    )
    routes = [
        Route("/health", health(service), methods=["GET"]),
        Route("/metrics", metrics(service), methods=["GET"]),
        *(Route("/" if name == "index.html" else f"/{name}", page(name), methods=["GET"]) for name in PAGE),
        *(Route(path, endpoint(service, path, handler), methods=[method]) for method, path, handler in (*api, *admin)),
    ]
    access: dict[str, Access] = {
        "/health": "public",
        "/metrics": "key",
        "/": "public",  # the page itself holds no secret; what it shows, it asks the API for
        "/style.css": "public",
        "/chat.js": "public",
        "/favicon.svg": "public",
        **{path: "key" for _, path, _ in api},
        **{path: "admin" for _, path, _ in admin},
    }
    check_access(routes, access)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await predictions.close()
        service.worker.stop()
        if journal is not None:
            journal.close()

    guard = Middleware(
        Guard,
        routes=routes,
        access=access,
        keys=keys,
        admin_keys=Keys(admin_keys),
        allowed_hosts=allowed_hosts,
        allowed_origins=allowed_origins,
        max_body_bytes=max_body_bytes,
    )
    app = Starlette(
        routes=routes,
        middleware=[guard],
        lifespan=lifespan,
        exception_handlers={HTTPException: no_route},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def no_route(request: Request, fault: Exception) -> Response:
    """404 and 405 in the shape of every other error."""
    assert isinstance(fault, HTTPException), fault
    message = {404: "There is nothing at this address.", 405: "This address doesn't take that method."}
    body = error_body(fault.status_code, message.get(fault.status_code, str(fault.detail)))
    return JSONResponse(body, fault.status_code, dict(fault.headers or {}))


def health(service: Service) -> Callable[[Request], Response]:
    """GET /health: 200 while the engine works, else 503."""

    def show(request: Request) -> Response:
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else "engine stopped"}, 200 if alive else 503)

    return show


def metrics(service: Service) -> Callable[[Request], Response]:
    """GET /metrics in Prometheus' text format."""

    def show(request: Request) -> Response:
        engine, worker, journal = service.worker.engine, service.worker, service.journal
        if journal is not None:
            service.metrics.records_lost.set(journal.lost)
        text = service.metrics.text(
            running=len(engine.running),
            waiting=len(engine.waiting),
            cache_usage=engine.cache_usage,
            faults=worker.faults,
            drafted=engine.speculation.drafted_tokens,
            accepted=engine.speculation.accepted_tokens,
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return show


def page(name: str) -> Callable[[Request], Response]:
    """A file of the chat page, read once, with an ETag so that browsers ask but don't load again."""
    body = files("ownlm.serve").joinpath("page", name).read_bytes()
    kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
    headers = {"etag": f'"{hashlib.sha256(body).hexdigest()[:16]}"', "cache-control": "no-cache"}

    def show(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=kind, headers=headers)

    return show
