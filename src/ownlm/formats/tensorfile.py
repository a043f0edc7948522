"""safetensors files, checked before a byte of them is used.

    8 bytes: length n of the header │ n bytes of JSON: {name: {dtype, shape, data_offsets}} │ the tensors, back to back

The format carries no checksum (artifacts hash the whole file); what can be checked here is: the header is small, sane
and free of duplicate names, and the tensors fill the file exactly. Format: github.com/huggingface/safetensors, README.
"""

import errno
import json
import math
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ownlm.errors import ArtifactError, NotFound, StorageFull

INDEX = "model.safetensors.index.json"
HEADER_BYTES = 25_000_000  # the hub's limit; the largest mixtures of experts need a tenth
HEADER_VALUES = 1_000_000  # JSON values of a header: 100,000 tensors and more; bounds what parsing it may cost
NAME_CHARACTERS, DIMENSIONS, COUNT = 512, 64, 2**63
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor within its file; `start` and `end` in bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A tensor that is made when its turn to be written comes, and let go of after."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of the file by name. ArtifactError says what is wrong with the file."""
    try:
        # A pipe or a device would be waited for before anything could be known of it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ArtifactError("this is not a file.", where=str(path))
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ArtifactError(f"the file is cut short ({size} bytes) or not safetensors.", where=str(path))
            if length > HEADER_BYTES:
                raise ArtifactError(f"its header claims {length} bytes, {HEADER_BYTES} at most.", where=str(path))
            raw = file.read(length)
    except FileNotFoundError:
        raise NotFound("there is no such file.", where=str(path)) from None
    except OSError as fault:
        raise ArtifactError(f"the file can't be read ({fault.strerror}).", where=str(path)) from None
    try:
        entries = _entries(raw)
    except (ValueError, TypeError, RecursionError) as fault:
        # What the file says may hold escape sequences for the terminal that shows this.
        said = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in str(fault)[:200])
        raise ArtifactError(f"the header can't be read: {said}.", where=str(path)) from None
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise ArtifactError(f"tensor {name} doesn't follow the one before it.", where=str(path))
        at = entry.end
    if at != size:
        raise ArtifactError(f"the file has {size} bytes, its tensors need {at}: it is cut short.", where=str(path))
    return entries


def _entries(raw: bytes) -> dict[str, Entry]:
    """The tensors of a header. ValueError, TypeError or RecursionError for anything but a header."""
    if not raw.startswith(b"{"):
        raise ValueError("it doesn't begin with {")
    # As many values as commas and opening brackets: a bound on time and memory before any of them is made.
    if sum(map(raw.count, (b",", b"[", b"{"))) > HEADER_VALUES:
        raise ValueError(f"it holds more than {HEADER_VALUES} values")
    header = json.loads(raw.decode(), object_pairs_hook=_no_duplicates)
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("__metadata__ must hold texts")
    return {name: _entry(name, value, 8 + len(raw)) for name, value in header.items()}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name[:40]!a} appears twice")
        found[name] = value
    return found


def _entry(name: str, value: Any, base: int) -> Entry:
    if not name.isprintable() or len(name) > NAME_CHARACTERS:
        raise ValueError(f"{name[:40]!a} can't be the name of a tensor")
    if not isinstance(value, dict):
        raise ValueError(f"tensor {name} is not described by an object")
    if missing := {"dtype", "shape", "data_offsets"} - value.keys():
        raise ValueError(f"tensor {name} has no {', '.join(sorted(missing))}")
    shape, (start, end) = tuple(value["shape"]), value["data_offsets"]
    if value["dtype"] not in DTYPES:
        raise ValueError(f"dtype {value['dtype']} is not supported")
    if not all(type(n) is int and 0 <= n < COUNT for n in (*shape, start, end)) or len(shape) > DIMENSIONS:
        raise ValueError(f"shape {shape[:4]} or offsets {start}, {end} are not counts")
    dtype = DTYPES[value["dtype"]]
    if math.prod(shape) * dtype.itemsize != end - start or math.prod(n or 1 for n in shape) >= COUNT:
        raise ValueError(f"a tensor of shape {shape[:4]} doesn't fill {end - start} bytes")
    return Entry(dtype, shape, base + start, base + end)


class Mapped:
    """A file of tensors as a part of memory: its bytes are read when they are first looked at, and the file must stay as it is for as
    long as a tensor lives."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.entries, self._map = entries, _map(path, entries)

    def tensor(self, name: str) -> Tensor:
        """A view of the file. What is written to it stays in this process."""
        return _view(self._map, self.entries[name])

    def give_back(self, start: int = 0, end: int | None = None) -> None:
        """Whole pages of these bytes (of all), so that the file does not stay in memory beside what was made of it. What was written
        to them is lost."""
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, len(self._map) if end is None else end // page * page
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def stream(self) -> Iterator[tuple[str, Tensor, Callable[[int], None]]]:
        """(name, tensor, give_back) in file order: use (copy) the tensor before asking for the next. `give_back(rows)` says that so
        many of its rows were copied, so that a large one is never in memory twice."""
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].start):

            def give_back(rows: int, entry: Entry = entry) -> None:
                size, count = entry.end - entry.start, entry.shape[0]
                self.give_back(entry.start, entry.start + size * min(rows, count) // count)

            yield name, self.tensor(name), give_back
            self.give_back(entry.start, entry.end)


def read_tensors(path: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor, Callable[[int], None]]]:
    """`Mapped.stream` of a file."""
    return Mapped(path, entries).stream()


def _map(path: Path, entries: Mapping[str, Entry]) -> mmap.mmap:
    with path.open("rb") as file:
        # Beyond the end of a file there is no memory: touching it would end the process (SIGBUS). A file that is cut short from
        # here on still does that; no check could come in time, and a handler in Python would never run.
        if os.fstat(file.fileno()).st_size < max((entry.end for entry in entries.values()), default=1):
            raise ArtifactError("the file was cut short after its header was read.", where=str(path))
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _view(mapped: mmap.mmap, entry: Entry) -> Tensor:
    if not math.prod(entry.shape):
        return torch.empty(entry.shape, dtype=entry.dtype)
    # As bytes first: the reference writer aligns nothing but the header.
    data = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start)
    aligned = entry.start % entry.dtype.itemsize == 0
    return (data if aligned else data.clone()).view(entry.dtype).view(entry.shape)


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor | Pending]]) -> None:
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
            for name, tensor in ordered:
                whole = tensor.make() if isinstance(tensor, Pending) else tensor
                assert (whole.dtype, whole.shape) == (tensor.dtype, tensor.shape), name
                dense = whole.detach().cpu().contiguous()
                # Not view(-1): one value or none may keep a stride of 0, and can't be seen as bytes then.
                file.write(dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data)
                del whole, dense
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageFull("no space left on the disk.", where=str(path), cure="Free some and run again.") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_shards(directory: Path, tensors: Mapping[str, Tensor | Pending], max_bytes: int) -> list[Path]:
    """Write model.safetensors, or model-00001-of-0000N.safetensors and their index where that would exceed `max_bytes`.

    Tensors keep their order; one larger than `max_bytes` has a shard of its own. Only one Pending exists at a time.
    Returns the safetensors files. The index is written last, when all that it names is there.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    paths = [directory / shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    for path, names in zip(paths, shards, strict=True):
        write_tensors(path, [(name, tensors[name]) for name in names])
    if len(shards) == 1:
        (directory / INDEX).unlink(missing_ok=True)  # of what was here before: it would be read first
    else:
        where = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
        write_index(directory, where, sum(tensor.nbytes for tensor in tensors.values()))
    return paths


def shard_name(number: int, count: int) -> str:
    """shard_name(1, 1) == "model.safetensors", shard_name(2, 3) == "model-00002-of-00003.safetensors"."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(directory: Path, where: Mapping[str, str], total_bytes: int) -> None:
    """Say which file beside the index holds each tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(where)}
    temporary = directory / f".{INDEX}.{os.getpid()}"
    temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / INDEX)
