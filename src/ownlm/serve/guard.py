"""What stands before every route: who may ask, from which page, and how much.

    headers too large ► 431   Host not ours ► 421   Origin not ours ► 403   no key ► 401   body too large ► 413   route

A route has a declared access policy or the app doesn't start. Loopback alone protects nobody: a page in the user's browser
can send requests there, and by DNS rebinding read the answers. Such a page comes with a Host that is a name of its own and
an Origin that is not ours, so names that nobody declared are refused.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ownlm.errors import UserError

Access: TypeAlias = Literal["public", "key", "admin"]

MAX_HEADERS = 64
MAX_HEADER_BYTES = 16_384
MAX_TARGET_BYTES = 4_096  # path and query
DRAIN_S = 2.0

SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)


class Keys:
    """API keys, kept as SHA-256 only, and the least priority of each (0 where `keys` is no mapping)."""

    def __init__(self, keys: Collection[str]) -> None:
        if any(len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise UserError(
                "an API key must be at least 16 printable ASCII characters without spaces.",
                where="api_keys",
                cure='`python -c "import secrets; print(secrets.token_urlsafe(24))"` makes one.',
            )
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        least = [keys[key] if isinstance(keys, Mapping) else 0 for key in keys]
        self.least = dict(zip(map(_key_id, self.digests), least, strict=True))

    @property
    def required(self) -> bool:
        return bool(self.digests)

    def find(self, authorization: str) -> str | None:
        """The id of the key in an Authorization header, or None. Takes the same time whichever key it is."""
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        matches = [digest for digest in self.digests if hmac.compare_digest(given, digest)]
        return _key_id(matches[0]) if matches and scheme.lower() == "bearer" else None

    def least_priority(self, key_id: str | None) -> float:
        """The smallest priority that requests with this key may have; without keys there is nobody to push aside."""
        return self.least[key_id] if self.required and key_id is not None else -math.inf


def _key_id(digest: bytes) -> str:
    return digest.hex()[:8]


def check_access(routes: Sequence[BaseRoute], declared: dict[str, Access]) -> None:
    """Raise UserError for a route without an access policy, so that none is ever open by oversight."""
    open_routes = [route for route in routes if not isinstance(route, Route) or route.path not in declared]
    if open_routes:
        names = ", ".join(str(getattr(route, "path", route)) for route in open_routes)
        raise UserError(
            f"no access policy is declared for {names}.", where="routes", cure='Declare "public", "key" or "admin".'
        )


def host_allowed(host: str, allowed: Collection[str]) -> bool:
    """True for IP addresses, localhost and the declared names: host_allowed("127.0.0.1:8000", ()).

    An address can't be rebound: a page whose Host is one really is of this server.
    """
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.removeprefix("[").removesuffix("]").lower()
    if name == "localhost" or name in allowed:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class BodyTooLarge(Exception):
    """More bytes than the limit came in, whatever Content-Length said."""


class Guard:
    """ASGI middleware around the whole app; puts the caller's key id into scope["key_id"]."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Sequence[BaseRoute],
        access: dict[str, Access],
        keys: Keys,
        admin_keys: Keys,
        allowed_hosts: Collection[str],
        allowed_origins: Collection[str],
        max_body_bytes: int,
    ) -> None:
        self.app, self.routes, self.access = app, routes, access
        self.keys, self.admin_keys = keys, admin_keys
        self.allowed_hosts = {name.lower() for name in allowed_hosts}
        self.allowed_origins = {origin.lower().rstrip("/") for origin in allowed_origins}
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            check_access(scope["app"].routes, self.access)
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        started = False

        async def safe_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS]
            await send(message)

        refusal = self.refuse(scope)
        if refusal:
            if refusal[0] == 413:
                await drain(receive, self.max_body_bytes)
            return await respond(safe_send, *refusal)
        size = 0

        async def limited_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body_bytes:
                raise BodyTooLarge
            return message

        try:
            await self.app(scope, limited_receive, safe_send)
        except BodyTooLarge:
            assert not started, "bodies are read before the answer begins"
            await drain(receive, self.max_body_bytes)
            await respond(safe_send, 413, f"The body is larger than {self.max_body_bytes} bytes.", "body_too_large")

    def refuse(self, scope: Scope) -> tuple[int, str, str] | None:
        """(status, message, code) for a request that must not reach its route; notes the key's id otherwise."""
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in headers and name in {b"host", b"origin", b"authorization", b"content-length"}:
                return 400, f"The header {name.decode()} came twice.", "invalid_header"
            headers[name] = value
        if len(scope["headers"]) > MAX_HEADERS or sum(len(n) + len(v) for n, v in scope["headers"]) > MAX_HEADER_BYTES:
            return 431, "The headers are too large.", "headers_too_large"
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_TARGET_BYTES:
            return 414, "The address is too long.", "uri_too_long"
        host = headers.get(b"host", b"").decode("latin-1")
        if not host_allowed(host, self.allowed_hosts):
            return 421, f"This server is not {host[:80]!r}. Its owner can allow more host names.", "host_not_allowed"
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin not in {f"{scope['scheme']}://{host}".lower(), *self.allowed_origins}:
            return 403, "Requests from other pages are not allowed.", "origin_not_allowed"
        policy = self.policy(scope)
        if policy == "key":
            scope["key_id"] = key_id = self.keys.find(headers.get(b"authorization", b"").decode("latin-1"))
            if self.keys.required and key_id is None:
                return 401, "This server needs an API key: Authorization: Bearer KEY.", "invalid_api_key"
        if policy == "admin" and (self.keys.required or self.admin_keys.required):
            if not self.admin_keys.required:
                return 403, "This server was started without OWNLM_ADMIN_KEYS: nobody may do that.", "no_admin_keys"
            scope["key_id"] = self.admin_keys.find(headers.get(b"authorization", b"").decode("latin-1"))
            if scope["key_id"] is None:
                return 401, "This needs an administrator's key: Authorization: Bearer KEY.", "invalid_admin_key"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 15:
            return 400, "Content-Length is not a number.", "invalid_header"
        if int(length) > self.max_body_bytes:
            return 413, f"The body is larger than {self.max_body_bytes} bytes.", "body_too_large"
        return None

    def policy(self, scope: Scope) -> Access:
        """The access of the route a request goes to; what is no route needs a key like what is most guarded."""
        for route in self.routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                return self.access[route.path]
        return "key"


async def drain(receive: Receive, most: int) -> None:
    """Read and forget up to `most` bytes of a body, for DRAIN_S at most: a client that is still writing when its connection
    closes loses the answer with it."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while size <= most:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body"):
                    return


async def respond(send: Send, status: int, message: str, code: str) -> None:
    """An error in OpenAI's shape, without any framework."""
    body = json.dumps(error_body(status, message, code=code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    # Nobody reads the rest of what was refused.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object of OpenAI's API, with `detail` and `title` for Replicate's client."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {
        "error": {"message": message, "type": kind, "param": param, "code": code},
        "title": kind.replace("_", " "),
        "detail": message,
        "status": status,
    }
