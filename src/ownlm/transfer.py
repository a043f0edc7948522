"""Bytes from a hub: one file, through breaks of the connection, held against its hash.

huggingface_hub knows proxies, redirects and the words of the API. Its own downloads begin anew when a process was stopped, and
compare the size of what came, not its hash; so the bytes are written here.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ownlm import __version__, device
from ownlm.errors import ArtifactError, NotFound, UserError

if TYPE_CHECKING:
    import httpx2

COMMIT, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
TIMEOUT_S, TRIES, WAIT_S, MOST_TRIES = 20.0, 5, 1.0, 100
CHUNK_BYTES = 1_000_000


class Away(UserError):
    """The hub can't be reached, or doesn't answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of a commit. Large ones are known by the SHA-256 of their content, small ones by git's hash of it."""

    repo: str
    commit: str
    name: str
    bytes: int
    sha256: str | None
    git_sha1: str | None

    @property
    def where(self) -> str:
        return f"hf:{self.repo}@{self.commit}"

    @property
    def digest(self) -> str:
        return self.sha256 or self.git_sha1 or ""

    def hash(self) -> Any:
        """A hash object that comes to `digest` when it has seen the content."""
        return hashlib.sha256() if self.sha256 else hashlib.sha1(f"blob {self.bytes}\0".encode(), usedforsecurity=False)


def part_of(folder: Path, file: File) -> Path:
    """Where the beginning of a file lies until it is whole."""
    return folder / f"{file.name}.{file.digest[:12]}.part"


def fetch(file: File, folder: Path, came: Callable[[int], object]) -> None:
    """Bring the file into the folder, going on where an earlier download broke off. `came` is told how many bytes came.

    Raises Away, or ArtifactError when the content is not what was announced.
    """
    part = part_of(folder, file)
    while True:
        resumed = part.stat().st_size if part.is_file() else 0
        if resumed > file.bytes:
            part.unlink()
            resumed = 0
        with part.open("ab") as out:

            def restart(out: Any = out) -> None:
                came(-out.tell())
                out.truncate(0)

            for chunk in read(file, resumed, restart):
                out.write(chunk)
                came(len(chunk))
        if digest_of(part, file) == file.digest:
            part.rename(folder / file.name)
            return
        part.unlink()
        # What was left of an earlier download may be what is wrong; what came now is not.
        if not resumed:
            raise ArtifactError(
                f"the content of {file.name} is not what the hub announced.",
                where=file.where,
                cure="Nothing of it was kept. Try again; if it stays so, the repository or the way to it is not to be trusted.",
            )
        came(-file.bytes)


def digest_of(path: Path, file: File) -> str:
    """What `file.digest` is, of this content."""
    digest = file.hash()
    with path.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


def read(file: File, start: int, restart: Callable[[], object]) -> Iterator[bytes]:
    """The content from `start`, through breaks of the connection. `restart` is called when it begins at 0 again instead."""
    at, tries, all_tries = start, 0, 0
    while at < file.bytes:
        before = at
        try:
            with told(file.repo, file.commit), _open(file, at) as response:
                if at and response.status_code != 206:
                    restart()
                    at = before = 0
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    at += len(chunk)
                    if at > file.bytes:
                        raise ArtifactError(
                            f"{file.name} is longer than the {file.bytes} bytes the hub announced.",
                            where=file.where,
                        )
                    yield chunk
                if at < file.bytes:
                    raise Away("the connection ended early.", where=file.where)
        except Away:
            tries, all_tries = 0 if at - before >= CHUNK_BYTES else tries + 1, all_tries + 1
            if tries >= TRIES or all_tries >= MOST_TRIES:
                raise
            time.sleep(WAIT_S * 2**tries)


@contextmanager
def _open(file: File, start: int) -> "Iterator[httpx2.Response]":
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    endpoint, token = device.hub()
    no_telemetry()
    headers = build_hf_headers(token=token or False, library_name="ownlm", library_version=__version__)
    headers |= {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    url = hf_hub_url(file.repo, file.name, revision=file.commit, endpoint=endpoint)
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
        hf_raise_for_status(response)
        yield response


def no_telemetry() -> None:
    """huggingface_hub tells a hub which packages and programs run here, and fetches a list for that, unless told not to."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True


@contextmanager
def told(repo: str, revision: str) -> Iterator[None]:
    """What goes wrong on the way, as a sentence: Away where trying again may help."""
    import httpx2
    from huggingface_hub import errors

    where, endpoint = f"hf:{repo}@{revision}", device.hub()[0]
    try:
        yield
    except errors.GatedRepoError:
        cure = f"Accept its terms on {endpoint}/{repo}, then set HF_TOKEN to a token of that account."
        raise UserError("this model is given only to those who accept its terms.", where=where, cure=cure) from None
    except errors.RepositoryNotFoundError:
        cure = "Check the spelling; for a private one set HF_TOKEN to a token that may read it."
        raise NotFound("there is no such model, or it is private.", where=where, cure=cure) from None
    except errors.RevisionNotFoundError:
        raise NotFound(f"the model has no branch, tag or commit {revision}.", where=where) from None
    except errors.EntryNotFoundError as fault:
        raise NotFound("a file that the hub listed is not there.", where=where) from fault
    except errors.HfHubHTTPError as fault:
        code = fault.response.status_code
        if code in (401, 403):
            raise UserError(f"the hub refuses ({code}).", where=where, cure="Check the token in HF_TOKEN.") from None
        if code in (408, 429) or code >= 500:
            with suppress(ValueError):
                time.sleep(min(60.0, float(fault.response.headers.get("Retry-After", "0"))))
            raise Away(
                f"the hub answers {code}.", where=where, cure="Try again later; what has arrived is kept."
            ) from None
        raise UserError(f"the hub answers {code}.", where=where) from None
    except errors.OfflineModeIsEnabled:
        raise Away("HF_HUB_OFFLINE is set, so the hub is not asked.", where=where) from None
    except (httpx2.TransportError, ConnectionError) as fault:
        what = f"{endpoint} can't be reached ({type(fault).__name__})."
        raise Away(what, where=where, cure="Check the network and HF_ENDPOINT; what has arrived is kept.") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, TypeError, ValueError, KeyError, AttributeError) as fault:
        what = f"{endpoint} doesn't speak the hub's API ({type(fault).__name__})."
        raise UserError(what, where=where, cure="Check HF_ENDPOINT.") from None
