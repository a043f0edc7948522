"""The one contract of every stage: an artifact is a directory with a manifest, whole or not there at all.

    workspace/artifacts/<name>/<version>/manifest.json  + the files it lists
    workspace/runs/<name>-<fingerprint>/                  scratch of a run in progress (training checkpoints)

An artifact is written into a hidden sibling, hashed, flushed to disk and renamed. Opening one reads every file it lists and
compares its SHA-256: safetensors, torch.save and DCP all accept a flipped bit in silence, so the manifest is the checksum.

A model of a hub (hf:owner/name) becomes an artifact the first time it is opened; a folder of Hugging Face's layout and a GGUF file
are opened where they lie, with a manifest that is made on the spot and is not written.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ownlm import __version__, device, foreign, hub
from ownlm.errors import ArtifactError, NotFound, UserError
from ownlm.recipe import resolve
from ownlm.report import Reporter, size
from ownlm.storage import alone, flush, require_space, sha256, storage, write_atomic
from ownlm.transfer import Away
from ownlm.verify import Check

FORMAT = 1
KINDS = ("documents", "tokenizer", "tokens", "checkpoint", "adapter", "scores", "release", "feedback", "index")
TOKENIZER_ONLY = "--tokenizer"  # behind the name of a hub's repository of which only the tokenizer was taken
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
    inputs: dict[
        str, dict[str, str]
    ]  # role -> {"ref": "name@version", "kind": …, "digest": …}, and "source" if it has one
    recipe: dict[str, Any]
    seed: int
    packages: dict[str, str]
    machine: dict[str, Any]
    files: dict[str, dict[str, Any]]  # path -> {"sha256": …, "bytes": …}
    facts: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact on disk, verified when it was opened. `path` is its folder, or a GGUF file."""

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
        """name@version; of a folder or file that is no artifact, which has version 0, its path."""
        return f"{self.manifest.name}@{self.manifest.version}" if self.version else str(self.path)

    @property
    def source(self) -> str:
        """Where it was taken from, if ownlm didn't make it: hf:owner/name@commit."""
        return str(self.manifest.facts.get("source", ""))

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
        return self.folder / name

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.path.parent if self.path.suffix == ".gguf" and self.path.is_file() else self.path


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


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRecipe:
    """How a model of a hub became an artifact."""

    name: str
    source: str  # hf:owner/name@commit
    revision: str  # that was asked for
    endpoint: str


class Workspace:
    """The folder in which artifacts, runs and the catalog live. `reporter` hears of downloads."""

    def __init__(self, root: Path, reporter: Reporter | None = None) -> None:
        self.root = root
        self.reporter = reporter or Reporter.silent()
        self.verified: set[tuple[str, str]] = set()  # (path, digest) read through and found whole by this process
        self._checks: dict[tuple[str, str], Check] = {}  # those that are being read
        self.commits: dict[hub.Source, str] = {}  # what branches and tags meant when this process asked first
        self.folders: dict[tuple[Any, ...], Artifact] = {}  # (path, sizes and times) of what is no artifact

    @classmethod
    def at_home(cls, reporter: Reporter) -> "Workspace":
        """The one of whoever uses this machine. Downloads are told to programs, and to people on the error stream: standard output is for
        what was asked, an answer of a model perhaps."""
        return cls(device.home(), reporter if reporter.audience == "programs" else Reporter(out=sys.stderr))

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def open(self, ref: str | Path, kind: str | tuple[str, ...] | None = None) -> Artifact:
        """The artifact `name`, `name@version`, at a path or of a hub (hf:owner/name[@revision]), every file verified.

        kind  that it must have, or those it may have; of a hub, the first is what is downloaded
        Raises NotFound, or ArtifactError when a file is missing, changed or the kind is another.
        """
        kinds = (kind,) if isinstance(kind, str) else kind or ()
        source = hub.parse(str(ref))
        artifact = self._from_hub(source, kinds or ("checkpoint",)) if source else self._read(self._locate(str(ref)))
        if kinds and artifact.kind not in kinds:
            raise ArtifactError(
                f"a {artifact.kind} artifact, but a {' or '.join(kinds)} artifact is needed here.", where=artifact.ref
            )
        key = (str(artifact.path), artifact.digest)
        if key not in self.verified:
            try:
                self._check(artifact).wait()
            finally:
                del self._checks[key]
            self.verified.add(key)
        return artifact

    def check_ahead(self, ref: str | Path) -> None:
        """Begin to verify what will be opened soon, while something else is done. What is wrong with it, `open` says."""
        with suppress(UserError):
            path = self._locate(str(ref))
            if (path / "manifest.json").is_file():  # of our own
                self._check(self._read(path))

    def _check(self, artifact: Artifact) -> Check:
        key = (str(artifact.path), artifact.digest)
        if key not in self._checks:
            self._checks[key] = Check(artifact.path, artifact.folder, artifact.manifest.files)
        return self._checks[key]

    def downloaded(self, source: hub.Source, kinds: tuple[str, ...] = KINDS) -> list[Artifact]:
        """What is here of a hub's repository at this commit, or that was asked for by this branch or tag; newest first."""
        ours = self._of_repository(source, kinds)
        if source.pinned:
            return [one for one in ours if one.source == str(source)]
        return [one for one in ours if one.manifest.recipe["revision"] == source.revision]

    def _of_repository(self, source: hub.Source, kinds: tuple[str, ...]) -> list[Artifact]:
        names = (source.name, f"{source.name}{TOKENIZER_ONLY}")
        found = [self._read(self.artifacts / name / str(number)) for name in names for number in self._versions(name)]
        found = [one for one in found if one.source.startswith(f"hf:{source.repo}@") and one.kind in kinds]
        return sorted(found, key=lambda one: (one.manifest.created, one.version), reverse=True)

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
        if not artifact.version:
            raise UserError("ownlm didn't make this, and doesn't delete it.", where=str(artifact.path))
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

    def _from_hub(self, source: hub.Source, kinds: tuple[str, ...]) -> Artifact:
        """What a hub has, as an artifact: what is here already, else downloaded. Asks the network for what may have changed."""
        asked = source
        if commit := self.commits.get(source):
            source = replace(source, revision=commit)
        if source.pinned and (here := self.downloaded(source, kinds)):
            return here[0]
        try:
            plan = hub.look(source, kinds[0])
        except Away as fault:
            if here := self.downloaded(source, kinds):
                self.reporter.line(
                    f"{fault} What was downloaded on {here[0].manifest.created[:10]} is used: {here[0].source}"
                )
                return here[0]
            if other := [one.source for one in self._of_repository(source, kinds)]:
                raise Away(fault.what, where=fault.where, cure=f"Here already: {', '.join(other[:3])}.") from None
            raise
        self.commits[asked] = plan.commit
        pinned = replace(source, revision=plan.commit)
        if here := self.downloaded(pinned, kinds):
            return here[0]
        name = check_name(source.name + (TOKENIZER_ONLY if kinds[0] == "tokenizer" else ""))
        scratch = self.root / "hub" / f"{name}-{plan.commit}"
        with storage(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
            with alone(scratch / "lock", lambda: self.reporter.status(f"{asked}: another process is downloading it")):
                if here := self.downloaded(pinned, kinds):  # by the one that was waited for
                    return here[0]
                self.reporter.line(f"{asked}: {len(plan.files)} files, {size(plan.bytes)}, from {device.hub()[0]}")
                require_space(scratch, plan.missing_bytes(scratch) + (1 << 20))
                hub.download(plan, scratch, self.reporter)
                recipe = HubRecipe(name=name, source=plan.ref, revision=asked.revision, endpoint=device.hub()[0])
                with self.create(kinds[0], name, inputs={}, recipe=recipe) as draft:
                    for file in plan.files:
                        (draft.path / file.name).parent.mkdir(exist_ok=True)
                        (scratch / file.name).rename(draft.path / file.name)
                    draft.facts |= {"source": plan.ref, "licence": plan.licence}
                    if code := foreign.own_code(draft.path):
                        draft.facts["code_not_run"] = code
                        self.reporter.line(f"{asked}: names code of its own, which ownlm never runs: {', '.join(code)}")
                shutil.rmtree(scratch, ignore_errors=True)
        return draft.done

    def _locate(self, ref: str) -> Path:
        if (Path(ref) / "manifest.json").is_file() or foreign.kind_of(Path(ref)):
            return Path(ref)
        if ref.endswith(".gguf"):
            raise NotFound("there is no such file.", where=ref)
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
        ours = self.artifacts.resolve() in path.resolve().parents  # there a missing manifest is damage
        if ours or (path / "manifest.json").is_file() or not (kind := foreign.kind_of(path)):
            return Artifact(path, read_manifest(path / "manifest.json"))
        path, folder, names = foreign.files(path)
        stats = {name: (folder / name).stat() for name in names}
        key = (path, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()))
        if key not in self.folders:
            files = {name: {"sha256": sha256(folder / name), "bytes": stats[name].st_size} for name in names}
            written = max(stat.st_mtime for stat in stats.values())
            self.folders[key] = Artifact(path, _manifest_of(path, kind, files, written))
        artifact = self.folders[key]
        self.verified.add((str(path), artifact.digest))  # hashed just now; its files may be links into another cache
        return artifact

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
            digest=_digest(kind, files),
            inputs={
                role: {"ref": source.ref, "kind": source.kind, "digest": source.digest}
                | ({"source": source.source} if source.source else {})
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


def _manifest_of(path: Path, kind: str, files: dict[str, dict[str, Any]], written: float) -> Manifest:
    code, one = foreign.own_code(path), path.is_file()
    return Manifest(
        kind=kind,
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem if one else path.name).strip("-._")[:100] or "model",
        version=0,
        created=datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds"),
        fingerprint="",
        digest=_digest(kind, files),
        inputs={},
        recipe={"file" if one else "folder": str(path)},
        seed=0,
        packages={},
        machine={},
        files=files,
        facts={"code_not_run": code} if code else {},
    )


def _digest(kind: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    return _hash({"kind": kind, "files": {path: entry["sha256"] for path, entry in files.items()}})


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


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _seal(manifest: Manifest) -> str:
    data = json.loads(json.dumps(asdict(manifest)))
    return json.dumps({**data, "seal": _hash(data)}, indent=2, ensure_ascii=False) + "\n"


def _remove_abandoned(folder: Path) -> None:
    """Delete the drafts of processes that are gone."""
    import psutil

    for draft in folder.glob(".draft-*"):
        if not psutil.pid_exists(int(draft.name.split("-")[1])):
            shutil.rmtree(draft, ignore_errors=True)
