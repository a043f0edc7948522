"""A stand-in for a model hub, on loopback: the part of Hugging Face's HTTP API that a download needs, and its faults.

    GET  /api/models/OWNER/NAME/revision/REVISION?blobs=True    the commit, files with sizes and hashes
    GET  /OWNER/NAME/resolve/COMMIT/FILE                        small files themselves; large ones (LFS) redirect to
    GET  /cdn/SHA256                                            of another origin, with Range

What each repository does wrong is set on it: `hub.repos["o/n"].gated = True`.
"""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model")  # kept as LFS objects


@dataclass
class Repo:
    """A repository: its commits by hash, branches and tags, and what goes wrong with it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    licence: str = "apache-2.0"
    private: bool = False
    gated: bool = False
    listed: list[dict[str, Any]] = field(default_factory=list)  # entries the listing has beside the files
    cut_after: list[int] = field(default_factory=list)  # bytes after which the next downloads break off
    busy: int = 0  # so many requests for content are answered 503
    wrong: set[str] = field(default_factory=set)  # files whose content is not what was announced
    no_ranges: bool = False
    too_long: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with these files and let the branch stand at it."""
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name] = files
        self.refs[branch] = name
        return name


@dataclass
class Request:
    """What was asked, of which of the two origins."""

    origin: str  # "hub" or "cdn"
    path: str
    headers: dict[str, str]
    status: int = 0


class Hub:
    """The server's state: repositories, the token it knows, every request it got."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.token = "hf_right"
        self.requests: list[Request] = []
        self.address = self.cdn = ""
        self.loops = False

    def repo(self, name: str, files: dict[str, bytes] | None = None) -> Repo:
        self.repos[name] = Repo()
        if files is not None:
            self.repos[name].commit(files)
        return self.repos[name]

    def asked(self, path: str) -> list[Request]:
        """The requests whose path ends so."""
        return [one for one in self.requests if urlsplit(one.path).path.endswith(path)]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers inside the block, its CDN on a port of its own."""
    hub = Hub()
    servers = []
    for origin in ("hub", "cdn"):
        handler = type("Handler", (Answers,), {"hub": hub, "origin": origin})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
    hub.address, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Answers(http.server.BaseHTTPRequestHandler):
    """One connection. `hub` and `origin` are set by `serving`."""

    hub: Hub
    origin: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        request = Request(self.origin, self.path, {key.lower(): value for key, value in self.headers.items()})
        self.hub.requests.append(request)
        self.request_of = request
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.hub.loops:
            self.answer(302, Location=self.path)
        elif self.origin == "cdn":
            self.large(*parts)
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["revision"]:
            self.info("/".join(parts[2:4]), "/".join(parts[5:]))
        elif parts[2:3] == ["resolve"]:
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.answer(404)

    def info(self, name: str, revision: str) -> None:
        repo = self.allowed(name)
        if repo is None:
            return
        commit = revision if revision in repo.commits else repo.refs.get(revision)
        if commit is None:
            self.answer(404, **{"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
            return
        siblings: list[dict[str, Any]] = []
        for file, data in repo.commits[commit].items():
            entry = {"rfilename": file, "size": len(data), "blobId": git_sha1(data)}
            if file.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        about = {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repo.private,
            "tags": [f"license:{repo.licence}"],
        }
        self.answer(
            200,
            json.dumps({**about, "siblings": siblings + repo.listed}).encode(),
            **{"Content-Type": "application/json"},
        )

    def resolve(self, name: str, commit: str, file: str) -> None:
        repo = self.allowed(name, content=True)
        if repo is None:
            return
        if file not in repo.commits.get(commit, {}):
            self.answer(404, **{"X-Error-Code": "EntryNotFound"})
            return
        data = repo.commits[commit][file]
        etag = hashlib.sha256(data).hexdigest() if file.endswith(LARGE) else git_sha1(data)
        linked = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if file.endswith(LARGE):
            self.answer(302, **linked, Location=f"{self.hub.cdn}/{name}/{commit}/{file}")
        else:
            self.content(repo, file, data, linked)

    def large(self, owner: str, name: str, commit: str, file: str) -> None:
        repo = self.hub.repos[f"{owner}/{name}"]
        self.content(repo, file, repo.commits[commit][file], {})

    def content(self, repo: Repo, file: str, data: bytes, headers: dict[str, str]) -> None:
        if repo.busy:
            repo.busy -= 1
            self.answer(503, **{"Retry-After": "0"})
            return
        if file in repo.wrong:
            data = bytes(len(data) - 1) + b"!"
        if repo.too_long:
            data = data + b"more"
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and not repo.no_ranges else 0
        if start:
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        part = data[start:]
        cut = repo.cut_after.pop(0) if repo.cut_after and file.endswith(LARGE) else None
        self.answer(206 if start else 200, part, cut=cut, **headers)

    def allowed(self, name: str, *, content: bool = False) -> Repo | None:
        """The repository, or None after the refusal has gone out, in the hub's words."""
        repo = self.hub.repos.get(name)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if bearer and bearer != self.hub.token:
            self.answer(401, **{"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.private and not bearer):
            self.answer(401, **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repo.gated and not bearer and content:
            self.answer(
                401, **{"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {name} is restricted."}
            )
        else:
            return repo
        return None

    def answer(self, status: int, body: bytes = b"", *, cut: int | None = None, **headers: str) -> None:
        self.request_of.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cut is not None and cut < len(body):
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(body)
