"""The one contract of every stage: an artifact is a directory with a manifest, whole or not there at all.

    workspace/artifacts/<name>/<version>/manifest.json  + the files it lists
    workspace/runs/<name>-<fingerprint>/                  scratch of a run in progress (training checkpoints)

An artifact is written into a hidden sibling, hashed, flushed to disk and renamed. Opening one reads every file it lists and
compares its SHA-256: safetensors, torch.save and DCP all accept a flipped bit in silence, so the manifest is the checksum.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from ownlm import __version__, device
from ownlm.errors import ArtifactError, NotFound, StorageFull, UserError
from ownlm.recipe import resolve
from ownlm.report import size

FORMAT = 1
KINDS = ("documents", "tokenizer", "tokens", "checkpoint", "adapter", "scores", "release", "feedback", "index")
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an artifact is, from what it was made, and the hash of every file in it."""

    kind: str
    name: str
    version: int
    created: str  # UTC, ISO 8601
    fingerprint: str  # of how it was made: kind, inputs, recipe, seed, ownlm version
    digest: str  # of what it holds: kind and file hashes
    inputs: dict[str, dict[str, str]]  # role -> {"ref": "name@version", "kind": …, "digest": …}
    recipe: dict[str, Any]
    seed: int
    packages: dict[str, str]
    machine: dict[str, Any]
    files: dict[str, dict[str, Any]]  # path -> {"sha256": …, "bytes": …}
    facts: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact on disk, verified when it was opened."""

    path: Path
    manifest: Manifest

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def ref(self) -> str:
        return f"{self.manifest.name}@{self.manifest.version}"

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest.facts

    @property
    def bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.manifest.files.values())

    def has(self, name: str) -> bool:
        """Whether the manifest lists this file."""
        return name in self.manifest.files

    def file(self, name: str) -> Path:
        """The path of a file the manifest lists. Raises ArtifactError for any other."""
        if name not in self.manifest.files:
            known = ", ".join(sorted(self.manifest.files))
            raise ArtifactError(f"{self.kind} artifact without {name}.", where=self.ref, cure=f"It has: {known}.")
        return self.path / name


class Draft:
    """An artifact being written: put files under `path` and numbers worth knowing into `facts`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self.artifact: Artifact | None = None

    @property
    def done(self) -> Artifact:
        """The finished artifact, once the `with` block has ended."""
        assert self.artifact is not None, "the draft is not finished"
        return self.artifact


class Workspace:
    """The folder in which artifacts, runs and the catalog live."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.verified: set[tuple[str, str]] = set()  # (path, digest) read through and found whole by this process

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def open(self, ref: str | Path, kind: str | tuple[str, ...] | None = None) -> Artifact:
        """The artifact `name`, `name@version` or at a path, every file verified; of `kind`, or of one of several.

        Raises NotFound, or ArtifactError when a file is missing, changed or the kind is another.
        """
        artifact = self._read(self._locate(str(ref)))
        kinds = (kind,) if isinstance(kind, str) else kind
        if kinds is not None and artifact.kind not in kinds:
            raise ArtifactError(
                f"a {artifact.kind} artifact, but a {' or '.join(kinds)} artifact is needed here.", where=artifact.ref
            )
        key = (str(artifact.path), artifact.digest)
        if key not in self.verified:
            verify(artifact)
            self.verified.add(key)
        return artifact

    def find(
        self, name: str, *, kind: str, inputs: Mapping[str, Artifact], recipe: Any, seed: int = 0
    ) -> Artifact | None:
        """The newest artifact made from the same inputs, recipe and seed by the same ownlm, if there is one."""
        wanted = fingerprint(kind, inputs, recipe, seed)
        for number in reversed(self._versions(name)):
            artifact = self._read(self.artifacts / name / str(number))
            if artifact.manifest.fingerprint == wanted:
                return self.open(artifact.ref, kind)
        return None

    @contextmanager
    def create(
        self, kind: str, name: str, *, inputs: Mapping[str, Artifact], recipe: Any, seed: int = 0
    ) -> Iterator[Draft]:
        """Write an artifact: yields a Draft; at the end of the block the artifact is there whole, after an error not at all."""
        assert kind in KINDS, kind
        check_name(name)
        folder = self.artifacts / name
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            path = folder / f".draft-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            path.mkdir()
        draft = Draft(path)
        try:
            with storage(folder):
                yield draft
                draft.artifact = self._finish(kind, name, draft, inputs, recipe, seed)
        finally:
            shutil.rmtree(path, ignore_errors=True)
            if not any(folder.iterdir()):
                folder.rmdir()

    def all(self) -> list[Artifact]:
        """Every artifact, by name and version; their files are not read."""
        names = sorted(folder.name for folder in self.artifacts.glob("*") if NAME.fullmatch(folder.name))
        return [self._read(self.artifacts / name / str(number)) for name in names for number in self._versions(name)]

    def remove(self, ref: str) -> Artifact:
        """Delete one artifact and return what it was. Refused while another artifact was made from it."""
        artifact = self._read(self._locate(ref))
        users = [
            other.ref
            for other in self.all()
            if any(source["ref"] == artifact.ref for source in other.manifest.inputs.values())
        ]
        if users:
            raise UserError(f"{artifact.ref} is an input of {', '.join(users)}.", cure="Remove those first.")
        shutil.rmtree(artifact.path)
        if not any(artifact.path.parent.iterdir()):
            artifact.path.parent.rmdir()
        return artifact

    def _versions(self, name: str) -> list[int]:
        folder = self.artifacts / name
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit() and path.is_dir())

    def _locate(self, ref: str) -> Path:
        if (Path(ref) / "manifest.json").is_file():
            return Path(ref)
        name, at, number = ref.partition("@")
        versions = self._versions(name) if NAME.fullmatch(name) else []
        if versions and (not at or number in {str(known) for known in versions}):
            return self.artifacts / name / (number if at else str(versions[-1]))
        if versions:
            raise NotFound(f"there is no {ref}.", cure=f"Versions of {name}: {', '.join(map(str, versions))}.")
        known = sorted(folder.name for folder in self.artifacts.glob("*") if NAME.fullmatch(folder.name))
        near = get_close_matches(name, known, n=1)
        cure = (
            f"Did you mean {near[0]}?"
            if near
            else "`ownlm list` shows what is there; `ownlm demo` makes a first model."
        )
        raise NotFound(f"there is no artifact {ref!r} in {self.root}.", cure=cure)

    def _read(self, path: Path) -> Artifact:
        return Artifact(path, read_manifest(path / "manifest.json"))

    def _finish(
        self, kind: str, name: str, draft: Draft, inputs: Mapping[str, Artifact], recipe: Any, seed: int
    ) -> Artifact:
        files = {}
        for file in sorted(path for path in draft.path.rglob("*") if path.is_file()):
            files[file.relative_to(draft.path).as_posix()] = {"sha256": sha256(file), "bytes": file.stat().st_size}
            flush(file)
        manifest = Manifest(
            kind=kind,
            name=name,
            version=max([0, *self._versions(name)]) + 1,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=fingerprint(kind, inputs, recipe, seed),
            digest=_hash({"kind": kind, "files": {path: entry["sha256"] for path, entry in files.items()}}),
            inputs={
                role: {"ref": source.ref, "kind": source.kind, "digest": source.digest}
                for role, source in inputs.items()
            },
            recipe=resolve(recipe),
            seed=seed,
            packages=packages(),
            machine=device.machine(),
            files=files,
            facts=json.loads(json.dumps(draft.facts)),
        )
        write_atomic(draft.path / "manifest.json", _seal(manifest))
        target = self.artifacts / name / str(manifest.version)
        draft.path.rename(target)
        flush(target.parent)
        artifact = Artifact(target, manifest)
        self.verified.add((str(target), manifest.digest))
        return artifact


def verify(artifact: Artifact) -> None:
    """Read every file the manifest lists and compare its hash. Raises ArtifactError that names each bad file."""
    faults = []
    for name, entry in artifact.manifest.files.items():
        path = artifact.path / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or path.is_symlink():
            faults.append(f"{name} leaves the artifact")
        elif not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif sha256(path) != entry["sha256"]:
            faults.append(f"{name} does not match its checksum")
    if faults:
        cure = "Nothing was loaded. Make it again with its stage, or restore the file from a copy."
        raise ArtifactError(f"damaged: {'; '.join(faults)}.", where=str(artifact.path), cure=cure)


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file, its own seal checked. Raises ArtifactError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        seal = data.pop("seal")
        if data["format"] != FORMAT:
            raise ArtifactError(
                f"manifest format {data['format']} is not known.", where=str(path), cure="Update ownlm."
            )
        if seal != _hash(data):
            raise ArtifactError("the manifest was changed after it was written.", where=str(path))
        return Manifest(**{key.name: data[key.name] for key in fields(Manifest)})
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as fault:
        raise ArtifactError(f"not a manifest ({fault!r}).", where=str(path)) from None


def fingerprint(kind: str, inputs: Mapping[str, Artifact], recipe: Any, seed: int) -> str:
    """A hash of how an artifact is made; two runs with the same one would make the same thing."""
    sources = {role: source.digest for role, source in inputs.items()}
    return _hash(
        {"kind": kind, "inputs": sources, "recipe": resolve(recipe), "seed": seed, "ownlm": packages()["ownlm"]}
    )


def packages() -> dict[str, str]:
    """The versions of the packages that decide results."""
    found = {"ownlm": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def check_name(name: str) -> str:
    """The name itself, if it can be a directory's name everywhere. Raises UserError."""
    if not NAME.fullmatch(name) or name.endswith("."):
        raise UserError(
            f"{name!r} can't be a name.",
            cure="Use letters, digits, '.', '_' and '-', beginning with a letter or digit.",
        )
    return name


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace a file's content: readers see the old or the new, also after a crash. Raises StorageFull."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with storage(path.parent):
        try:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def storage(folder: Path) -> Iterator[None]:
    """Turn "no space left" into StorageFull, with the folder and what is left there."""
    try:
        yield
    except OSError as fault:
        if fault.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise storage_full(folder) from fault


def require_space(folder: Path, bytes_needed: int) -> None:
    """Raise StorageFull now rather than after hours of work."""
    if free_bytes(folder) < bytes_needed:
        raise storage_full(folder, bytes_needed)


def storage_full(folder: Path, bytes_needed: int | None = None) -> StorageFull:
    """The error to raise for a folder without room."""
    need = f" and {size(bytes_needed)} are needed" if bytes_needed else ""
    cure = "Free some space, or set OWNLM_HOME to a folder elsewhere. What was finished before is whole."
    return StorageFull(f"the disk is full: {size(free_bytes(folder))} are free{need}.", where=str(folder), cure=cure)


def free_bytes(folder: Path) -> int:
    """Free space of the disk that holds `folder`, or will hold it."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _seal(manifest: Manifest) -> str:
    data = json.loads(json.dumps(asdict(manifest)))
    return json.dumps({**data, "seal": _hash(data)}, indent=2, ensure_ascii=False) + "\n"


def flush(path: Path) -> None:
    """fsync a file or, where the system can, a directory, so that a rename after it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Delete the drafts of processes that are gone."""
    import psutil

    for draft in folder.glob(".draft-*"):
        if not psutil.pid_exists(int(draft.name.split("-")[1])):
            shutil.rmtree(draft, ignore_errors=True)
