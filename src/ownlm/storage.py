"""Files that are whole or not there, on a disk that may be full.

Every write that others may read goes through here: a temporary sibling, fsync, rename.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ownlm.errors import StorageFull
from ownlm.report import size


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


def flush(path: Path) -> None:
    """fsync a file or, where the system can, a directory, so that a rename after it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(path: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold the lock file for this process, waiting for another that holds it. The system lets go of it after kill -9."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(0.2)
        yield
