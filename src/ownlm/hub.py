"""Models from a hub that speaks Hugging Face's HTTP API: hf:owner/name, hf:owner/name@revision.

    parse ─► Source ─► look ─► Plan: the commit, its licence, the files that we read with their sizes and hashes
                                 └► download: into a folder, each file resumed where it broke off, then hashed

What a repository lists is not trusted: only names of the closed sets below are ever asked for, and shards that the index
names beside itself. Never a pickle, never code. Requests go through huggingface_hub, which knows proxies and the words of the
API; the files themselves come through transfer.py.
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ownlm import __version__, device
from ownlm.errors import ArtifactError, Interrupted, UserError
from ownlm.report import Reporter, duration, size
from ownlm.transfer import COMMIT, SHA256, File, digest_of, fetch, no_telemetry, part_of, read, told

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "bpe_simple_vocab_16e6.txt.gz",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
VOCABULARIES = (TOKENIZER[0], *TOKENIZER[4:12])  # any of them makes a tokenizer
CONFIG = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
BESIDE = (*CONFIG, *TOKENIZER, ADAPTER[0])  # what belongs to weights, whatever their format
PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt)")
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
OWNER = NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
REF = re.compile(rf"hf:(?P<repo>{OWNER}/{NAME})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
TIMEOUT_S = 20.0
SMALL_BYTES, FILE_BYTES = 256_000_000, 10**13  # of a text that belongs to a model; of any file


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A reference to a repository, as it was written."""

    repo: str
    revision: str  # a branch, a tag or a commit

    @property
    def pinned(self) -> bool:
        """Whether it names a commit, which never changes."""
        return COMMIT.fullmatch(self.revision) is not None

    @property
    def name(self) -> str:
        """owner--name: a hub allows no two dashes in a row, so it stands for no other repository."""
        return self.repo.replace("/", "--")

    def __str__(self) -> str:
        return f"hf:{self.repo}" if self.revision == "main" else f"hf:{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What would be downloaded."""

    source: Source
    commit: str
    licence: str
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def ref(self) -> str:
        """The reference that always means the same: hf:owner/name@commit."""
        return f"hf:{self.source.repo}@{self.commit}"

    def missing_bytes(self, folder: Path) -> int:
        """How much of it is not in the folder yet."""
        have = 0
        for file in self.files:
            for path in (folder / file.name, part_of(folder, file)):
                have += min(path.stat().st_size, file.bytes) if path.is_file() else 0
        return max(0, self.bytes - have)


def parse(ref: str) -> Source | None:
    """The source a reference means, or None when it is no reference to a hub. Raises UserError for a malformed one."""
    if not ref.startswith("hf:"):
        return None
    found = REF.fullmatch(ref)
    if found is None or ".." in ref or "--" in found["repo"] or len(found["repo"]) > 96:
        raise UserError(
            f"{ref[:200]!a} is not a reference to a model of a hub.",
            cure="Write hf:owner/name or hf:owner/name@revision, for example hf:openai-community/gpt2.",
        )
    return Source(repo=found["repo"], revision=found["revision"] or "main")


def look(source: Source, kind: str = "checkpoint") -> Plan:
    """What the hub has under this reference: the commit, and the files an artifact of this kind is made of.

    Raises NotFound, Away, or UserError for a repository that has no such files or that may not be read.
    """
    endpoint, token = device.hub()
    with told(source.repo, source.revision):
        from huggingface_hub import HfApi

        no_telemetry()
        api = HfApi(endpoint=endpoint, token=token or False, library_name="ownlm", library_version=__version__)
        info = api.model_info(source.repo, revision=source.revision, files_metadata=True, timeout=TIMEOUT_S)
        commit = str(info.sha)
        listed = {one.rfilename: one for one in info.siblings or []}
        licences = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    if not COMMIT.fullmatch(commit):
        raise UserError("the hub names no commit.", where=str(source))
    names = _wanted(source, kind, listed)
    files = [_file(source, commit, listed[name]) for name in names]
    if INDEX in names:
        shards = _shards(source, files[names.index(INDEX)], listed)
        files += [_file(source, commit, listed[name]) for name in shards]
    return Plan(source=source, commit=commit, licence=" ".join(licences)[:100] or "not said", files=tuple(files))


def download(plan: Plan, folder: Path, reporter: Reporter) -> None:
    """Bring every file of the plan into the folder, whole and of the right hash. What is there already is kept.

    A broken download goes on where it was, within this call and in the next. Raises Away, ArtifactError for content that
    is not what the hub announced, and Interrupted after Ctrl-C.
    """
    progress = Progress(plan, folder, reporter)
    try:
        for file in plan.files:
            if not (folder / file.name).is_file() or digest_of(folder / file.name, file) != file.digest:
                (folder / file.name).unlink(missing_ok=True)
                fetch(file, folder, progress.add)
    except KeyboardInterrupt:
        left = size(plan.missing_bytes(folder))
        raise Interrupted(f"{plan.source} is not whole yet, {left} are missing. The same command goes on.") from None
    progress.done()


class Progress:
    """How far the download of a plan is."""

    def __init__(self, plan: Plan, folder: Path, reporter: Reporter) -> None:
        self.plan, self.reporter = plan, reporter
        self.fetched, self.begun, self.shown = 0, time.monotonic(), 0.0
        self.had = plan.bytes - plan.missing_bytes(folder)

    def add(self, count: int) -> None:
        self.fetched += count
        now = time.monotonic()
        if now - self.shown < 0.1:
            return
        self.shown = now
        speed = self.fetched / max(now - self.begun, 1e-3)
        have = max(0, min(self.had + self.fetched, self.plan.bytes))
        left = (self.plan.bytes - have) / speed if speed > 0 else 0
        self.reporter.status(
            f"{self.plan.source}: {size(have)} of {size(self.plan.bytes)}  {size(speed)}/s  {duration(left)} left"
        )

    def done(self) -> None:
        seconds = time.monotonic() - self.begun
        self.reporter.line(
            f"{self.plan.source}: {size(self.fetched)} downloaded in {duration(seconds)}, commit {self.plan.commit[:12]}, "
            f"licence: {self.plan.licence}"
        )
        self.reporter.event(
            "downloaded", source=self.plan.ref, bytes=self.fetched, seconds=seconds, licence=self.plan.licence
        )


# ── Which files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _wanted(source: Source, kind: str, listed: Mapping[str, Any]) -> list[str]:
    """The files of an artifact of this kind. Raises UserError when the repository has no such thing."""
    names = {"adapter": ADAPTER, "tokenizer": (*CONFIG[:2], *TOKENIZER)}.get(kind, (*CONFIG, *TOKENIZER))
    found = [name for name in names if name in listed]
    found += sorted(
        name for name in listed if kind != "adapter" and re.fullmatch(r"[A-Za-z0-9._-]{1,100}\.tiktoken", name)
    )
    weights = [INDEX] if INDEX in listed else [MODEL] if MODEL in listed else []
    if kind == "adapter" and len(found) < len(ADAPTER):
        raise UserError(f"this repository has no {' or no '.join(set(ADAPTER) - set(found))}.", where=str(source))
    if kind == "tokenizer" and not any(name in VOCABULARIES or name.endswith(".tiktoken") for name in found):
        raise UserError("this repository has no tokenizer that we read.", where=str(source))
    if kind == "checkpoint" and ("config.json" not in found or not weights):
        what = "config.json" if weights else "safetensors"
        have = sorted(
            {f"*.{name.rpartition('.')[2]}" for name in listed if PICKLED.fullmatch(name) or name.endswith(".gguf")}
        )
        beside = f", but {', '.join(have)}" if have and not weights else ""
        pickled = "Pickled weights are never loaded: download them yourself, then `ownlm convert FOLDER --out DIR`."
        raise UserError(f"this repository has no {what}{beside}.", where=str(source), cure=pickled if beside else "")
    return found + (weights if kind == "checkpoint" else [])


def _shards(source: Source, index: File, listed: Mapping[str, Any]) -> list[str]:
    """The files that the index of this commit names."""
    where = f"{source}: {INDEX}"
    content = bytearray()
    for chunk in read(index, 0, content.clear):
        content += chunk
    digest = index.hash()
    digest.update(content)
    if digest.hexdigest() != index.digest:
        raise ArtifactError("its content is not what the hub announced.", where=where)
    try:
        names = set(json.loads(content)["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ArtifactError("weight_map must name a file for each tensor.", where=where) from None
    for name in names:
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise ArtifactError(f"{str(name)[:100]!a} is not the name of a safetensors file beside it.", where=where)
        if name not in listed:
            raise ArtifactError(f"{name} is not in the repository.", where=where)
    return sorted(names)


def _file(source: Source, commit: str, listed: Any) -> File:
    """A file as the hub describes it, checked: a size that can be, and a hash to hold it against."""
    lfs, blob = listed.lfs, listed.blob_id
    bytes = lfs.size if lfs else listed.size
    most = SMALL_BYTES if listed.rfilename in (*BESIDE, INDEX) else FILE_BYTES
    if type(bytes) is not int or not 0 <= bytes <= most:
        raise UserError(f"{listed.rfilename} has a size of {str(bytes)[:40]}.", where=str(source))
    sha256 = lfs.sha256 if lfs and isinstance(lfs.sha256, str) and SHA256.fullmatch(lfs.sha256) else None
    git = blob if isinstance(blob, str) and COMMIT.fullmatch(blob) and not lfs else None
    if not sha256 and not git:
        raise UserError(f"the hub names no checksum of {listed.rfilename}.", where=str(source))
    return File(repo=source.repo, commit=commit, name=listed.rfilename, bytes=bytes, sha256=sha256, git_sha1=git)
