"""safetensors files, checked before a byte of them is used.

    8 bytes: length n of the header │ n bytes of JSON: {name: {dtype, shape, data_offsets}} │ the tensors, back to back

The format carries no checksum (artifacts hash the whole file); what can be checked here is: the header is small, sane
and free of duplicate names, and the tensors fill the file exactly. Format: github.com/huggingface/safetensors, README.
"""

import contextlib
import errno
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ownlm.errors import ArtifactError, NotFound, StorageFull

HEADER_BYTES = 100_000_000  # the limit of the reference implementation
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor within its file; `start` and `end` in bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of the file by name. ArtifactError says what is wrong with the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ArtifactError(f"the file is cut short ({size} bytes) or not safetensors.", where=str(path))
            if length > HEADER_BYTES:
                raise ArtifactError(f"its header claims {length} bytes.", where=str(path))
            raw = file.read(length)
    except FileNotFoundError:
        raise NotFound("there is no such file.", where=str(path)) from None
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        entries = {name: _entry(value, 8 + length) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"the header can't be read: {error}.", where=str(path)) from None
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise ArtifactError(f"tensor {name} doesn't follow the one before it.", where=str(path))
        at = entry.end
    if at != size:
        raise ArtifactError(f"the file has {size} bytes, its tensors need {at}: it is cut short.", where=str(path))
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)} appears twice")
    return found


def _entry(value: Mapping[str, Any], base: int) -> Entry:
    shape, (start, end) = tuple(value["shape"]), value["data_offsets"]
    if value["dtype"] not in DTYPES:
        raise ValueError(f"dtype {value['dtype']} is not supported")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"shape {shape} or offsets {start}, {end} are not counts")
    dtype = DTYPES[value["dtype"]]
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"a tensor of shape {shape} doesn't fill {end - start} bytes")
    return Entry(dtype, shape, base + start, base + end)


def read_tensors(path: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor as a view of the mapped file, in file order; use (copy) it before asking for the next."""
    with path.open("rb") as file, contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)) as mapped:
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            count = math.prod(entry.shape)
            flat = torch.empty(0, dtype=entry.dtype)
            if count:
                # As bytes first: the reference writer aligns nothing but the header.
                data = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start)
                aligned = entry.start % entry.dtype.itemsize == 0
                flat = (data if aligned else data.clone()).view(entry.dtype)
                del data
            yield name, flat.view(entry.shape)
            del flat
            # Give the pages back, so that the file does not stay in memory beside its copy.
            page = mmap.PAGESIZE
            first, last = -(-entry.start // page) * page, entry.end // page * page
            if last > first and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file whole or not at all (temporary sibling, fsync, rename). StorageFull when the disk is."""
    ordered = sorted(tensors, key=lambda item: (-item[1].dtype.itemsize, item[0]))  # widest first keeps all aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes],
        }  # fmt: skip
        at += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for _, tensor in ordered:
                flat = tensor.detach().cpu().contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageFull("no space left on the disk.", where=str(path), cure="Free some and run again.") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
