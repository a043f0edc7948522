"""Who gets in: keys, hosts, origins, sizes, and that no route is open by oversight."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from live import http, running
from ownlm.errors import UserError
from ownlm.serve.app import create_app
from ownlm.serve.guard import Keys, check_access, host_allowed
from ownlm.serve.server import serve
from tiny import tiny_model

KEY, OTHER = "first-key-of-the-tests", "second-key-of-the-tests"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options: dict[str, Any] = {
        "api_keys": (KEY, OTHER),
        "allowed_hosts": ("lm.example",),
        "allowed_origins": ("https://lm.example",),
    }
    with running(tiny_model(), tmp_path_factory.mktemp("locked"), **options) as address:
        yield address


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_guarded_route_needs_a_key(locked: str) -> None:
    guarded = [
        "/v1/models",
        "/v1/models/tiny",
        "/v1/models/ownlm/tiny",
        "/v1/predictions/x",
        "/metrics",
        "/nowhere",
        "/v1",
    ]
    for path in guarded:
        for headers in (
            {},
            bearer("wrong"),
            bearer(KEY + "x"),
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
        ):
            refused = http.get(locked + path, headers=headers)
            assert refused.status_code == 401, path
            assert refused.json()["error"]["code"] == "invalid_api_key"
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/predictions",
        "/v1/predictions/x/cancel",
    ):
        assert http.post(locked + path, json=BODY).status_code == 401
        assert http.get(locked + path).status_code == 401
    for key in (KEY, OTHER):
        assert http.get(f"{locked}/v1/models", headers=bearer(key)).status_code == 200
    for path in ("/", "/style.css", "/chat.js", "/favicon.svg", "/health"):
        assert http.get(locked + path).status_code == 200
    assert http.get(f"{locked}/nowhere", headers=bearer(KEY)).status_code == 404
    assert http.get(f"{locked}/v1/chat/completions", headers=bearer(KEY)).status_code == 405


def test_a_prediction_belongs_to_its_key(locked: str) -> None:
    given = {"input": {"prompt": "x", "max_tokens": 1}}
    made = http.post(
        f"{locked}/v1/models/ownlm/tiny/predictions", json=given, headers={**bearer(KEY), "prefer": "wait"}
    ).json()
    assert made["status"] == "succeeded"
    assert http.get(made["urls"]["get"], headers=bearer(KEY)).status_code == 200
    assert http.get(made["urls"]["get"], headers=bearer(OTHER)).status_code == 404


def test_names_that_nobody_declared_are_refused(locked: str, address: str) -> None:
    port = address.rpartition(":")[2]
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "lm.example",
        "",
    ):
        assert http.get(f"{address}/health", headers={"host": host}).status_code == 421, host
    for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1", "[::1]:80", "192.168.1.4:8000"):
        assert http.get(f"{address}/health", headers={"host": host}).status_code == 200, host
    assert http.get(f"{locked}/health", headers={"host": "lm.example:443"}).status_code == 200
    assert not host_allowed("[::1", ())
    assert not host_allowed("1.2.3", ())


def test_other_pages_are_refused(locked: str, address: str) -> None:
    for origin in (
        "https://evil.example",
        "null",
        "http://127.0.0.1:1",
        address.replace("http", "https"),
        f"{address}.evil.example",
    ):
        refused = http.post(f"{address}/v1/chat/completions", json=BODY, headers={"origin": origin})
        assert refused.status_code == 403, origin
        assert "access-control-allow-origin" not in refused.headers
    assert http.post(f"{address}/v1/chat/completions", json=BODY, headers={"origin": address}).status_code == 200
    assert http.get(f"{locked}/health", headers={"origin": "https://lm.example"}).status_code == 200
    # What a form of another page can send without the browser asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused = http.post(f"{address}/v1/chat/completions", content=b"{}", headers={"content-type": kind})
        assert refused.status_code == 415


def test_sizes_are_limited(address: str) -> None:
    url = f"{address}/v1/chat/completions"
    big = b" " * (4 * 2**20 + 1)
    kind = {"content-type": "application/json"}

    def drip() -> Iterator[bytes]:
        for _ in range(5):
            yield big[: 2**20]

    for content in (big, drip()):
        refused = httpx.post(url, content=content, headers=kind)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "body_too_large"
    assert http.get(f"{address}/health", headers={"x-a": "a" * 20_000}).status_code == 431
    assert http.get(f"{address}/health", headers={f"x-{number}": "a" for number in range(80)}).status_code == 431
    assert http.get(f"{address}/health?{'a' * 5000}").status_code == 414
    assert http.get(f"{address}/health", headers={"x-a": "a" * 100_000}).status_code in {400, 431}
    twice = http.get(f"{address}/health", headers=[("authorization", "a"), ("authorization", "b")])
    assert twice.status_code == 400


def test_every_answer_carries_the_security_headers(address: str) -> None:
    for path in ("/", "/health", "/v1/models", "/nowhere"):
        headers = http.get(address + path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "server" not in headers


def test_a_route_without_a_policy_stops_the_app() -> None:
    app = create_app(tiny_model())
    app.routes.append(Route("/forgotten", lambda request: None))
    with pytest.raises(UserError, match="no access policy is declared for /forgotten"), TestClient(app):
        pass
    with pytest.raises(UserError, match="/all"):
        check_access([Mount("/all", app)], {})


def test_a_server_that_others_reach_needs_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        with pytest.raises(UserError, match="no API key"):
            serve(tiny_model(), host=host, port=0)
    for weak in ("short", "with spaces in the middle", "ünïcödé-letters-here"):
        with pytest.raises(UserError, match="16 printable"):
            Keys([weak])
    with running(tiny_model(), tmp_path, host="0.0.0.0", api_keys=(KEY,)) as address:
        assert http.get(address.replace("0.0.0.0", "127.0.0.1") + "/v1/models", headers=bearer(KEY)).status_code == 200


def test_keys_are_not_kept() -> None:
    keys = Keys([KEY])
    assert KEY not in repr(vars(keys))
    assert keys.find(f"bearer {KEY}") == keys.find(f"Bearer {KEY}")
    assert keys.find("") is None
