"""States of a run on disk, from which it goes on bit for bit.

    runs/<name>-<fingerprint>/lock                  held while a process trains
                              metrics.jsonl         a row per logged step
                              state-00000200/tensors.safetensors   fp32 weights, moments, RNG
                                             state.json            step, counters, sha256 of the tensors, seal

A state is written beside, flushed, renamed, and only then is the oldest deleted: at any moment, also after a power cut
or on a full disk, there is a whole one. A state whose hashes don't match is passed over for the one before it.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ownlm.errors import ArtifactError, Busy, NotFound
from ownlm.formats.tensorfile import read_header, read_tensors, write_tensors
from ownlm.report import Reporter
from ownlm.storage import flush, require_space, sha256, storage, write_atomic

KEEP = 2
TENSORS, RECORD = "tensors.safetensors", "state.json"


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What a run needs to go on: `step` updates are done; `record` holds JSON values, `tensors` copies."""

    step: int
    tensors: dict[str, Tensor]
    record: dict[str, Any]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run for this process; the system lets go of it even after kill -9. Raises Busy."""
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cure = "Wait for it, stop it, or give this run another name."
            raise Busy("another process is training this run.", where=str(folder), cure=cure) from None
        yield


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Make the state of `step` durable, then delete all but the newest two. Raises StorageFull, and nothing is lost."""
    draft = folder / f".state-{step:08d}"
    with storage(folder):
        require_space(folder, sum(tensor.nbytes for tensor in tensors.values()) + (1 << 20))
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            write_tensors(draft / TENSORS, tensors.items())
            content = {"step": step, "sha256": sha256(draft / TENSORS), "record": dict(record)}
            write_atomic(draft / RECORD, json.dumps({**content, "seal": _seal(content)}))
            target = folder / draft.name.removeprefix(".")
            shutil.rmtree(target, ignore_errors=True)  # one of this step is there only if it was found to be damaged
            draft.rename(target)
            flush(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    for old in _states(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, reporter: Reporter) -> State | None:
    """The newest whole state, or None. A damaged one is named in a line and passed over."""
    for draft in folder.glob(".state-*"):  # of a process that was killed while it wrote
        shutil.rmtree(draft, ignore_errors=True)
    for path in _states(folder):
        try:
            return _read(path)
        except (ArtifactError, NotFound) as fault:
            reporter.line(f"{path.name} is damaged and passed over: {fault}")
            reporter.event("state_damaged", state=path.name, fault=str(fault))
    return None


def _read(path: Path) -> State:
    try:
        content = json.loads((path / RECORD).read_text(encoding="utf-8"))
        seal = content.pop("seal")
        step, wanted, record = content["step"], content["sha256"], content["record"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ArtifactError(f"{RECORD} can't be read ({fault!r}).", where=str(path)) from None
    if seal != _seal(content):
        raise ArtifactError(f"{RECORD} does not match its seal.", where=str(path))
    if not (path / TENSORS).is_file() or sha256(path / TENSORS) != wanted:
        raise ArtifactError(f"{TENSORS} does not match its checksum.", where=str(path))
    tensors = {name: tensor.clone() for name, tensor, _ in read_tensors(path / TENSORS, read_header(path / TENSORS))}
    return State(step, tensors, record)


def _states(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("state-*"), reverse=True)


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
