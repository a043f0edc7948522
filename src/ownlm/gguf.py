"""GGUF files, versions 2 and 3: llama.cpp's one-file form of a model. Read with every claim checked, written whole or not at all.

    "GGUF" │ version │ tensor and key counts │ key: value … │ name, shape, type, offset … │ padding │ tensor │ padding │ tensor …

A value of the metadata carries its own type, so that what was read can be written again bit for bit: numpy scalars and
one-dimensional numpy arrays for numbers and booleans, `str`, and lists for arrays of strings and arrays of arrays.
Nothing in a file is believed before it was compared with the file's size. What the blocks of a quantised tensor mean is
told in `formats/ggml.py`. Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

import math
import mmap
import os
import re
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ownlm.errors import ArtifactError, NotFound
from ownlm.storage import flush, require_space, storage

Value: TypeAlias = "str | np.generic | NDArray[Any] | list[Any]"

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32
# The largest header of a real model (a vocabulary of 262,144 tokens with its merges) is below 20 MB.
HEADER_BYTES = 64 * 2**20
MAX_ITEMS = 2**22  # strings and nested arrays in one header: each costs far more memory than bytes in the file
MAX_TENSORS = MAX_KEYS = 2**16
MAX_DEPTH = 4  # of arrays in arrays; llama.cpp itself reads none
MAX_DIMS = 4
MAX_NAME = 63  # bytes; llama.cpp reads no longer tensor names
PART, MAX_PARTS = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf"), 1000

STRING, ARRAY = 8, 9
NUMBERS: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {
        0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8",
    }.items()
}  # fmt: skip
CODES = {dtype: code for code, dtype in NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor type is stored: `block` numbers of a row in `size` bytes; `code` stands for it in files."""

    code: int
    block: int
    size: int


LAYOUTS: dict[str, Layout] = {
    "F32": Layout(0, 1, 4), "F16": Layout(1, 1, 2), "BF16": Layout(30, 1, 2), "F64": Layout(28, 1, 8),
    "I8": Layout(24, 1, 1), "I16": Layout(25, 1, 2), "I32": Layout(26, 1, 4), "I64": Layout(27, 1, 8),
    "Q4_0": Layout(2, 32, 18), "Q4_1": Layout(3, 32, 20), "Q5_0": Layout(6, 32, 22), "Q5_1": Layout(7, 32, 24),
    "Q8_0": Layout(8, 32, 34), "Q2_K": Layout(10, 256, 84), "Q3_K": Layout(11, 256, 110), "Q4_K": Layout(12, 256, 144),
    "Q5_K": Layout(13, 256, 176), "Q6_K": Layout(14, 256, 210),
    "IQ2_XXS": Layout(16, 256, 66), "IQ2_XS": Layout(17, 256, 74), "IQ3_XXS": Layout(18, 256, 98), "IQ1_S": Layout(19, 256, 50),
    "IQ4_NL": Layout(20, 32, 18), "IQ3_S": Layout(21, 256, 110), "IQ2_S": Layout(22, 256, 82), "IQ4_XS": Layout(23, 256, 136),
    "IQ1_M": Layout(29, 256, 56), "TQ1_0": Layout(34, 256, 54), "TQ2_0": Layout(35, 256, 66),
    "MXFP4": Layout(39, 32, 17), "NVFP4": Layout(40, 64, 36), "Q1_0": Layout(41, 128, 18), "Q2_0": Layout(42, 64, 18),
}  # fmt: skip
TYPES = {layout.code: name for name, layout in LAYOUTS.items()}


def byte_size(type: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor whose rows (the last dimension) are whole blocks."""
    layout = LAYOUTS[type]
    return math.prod(shape) // layout.block * layout.size


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor within its file: `shape` with the row last, as numpy has it; bytes `start` to `end` of the file."""

    type: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class File:
    """The checked header of a file."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def read(path: Path | str) -> File:
    """The metadata and the places of all tensors. Raises NotFound, or ArtifactError that says what is wrong."""
    path = Path(path)
    if not path.is_file():  # a pipe would keep us waiting for ever
        raise NotFound("there is no such file.", where=str(path))
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise ArtifactError(f"the file is cut short ({size} bytes) or not GGUF.", where=str(path))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            return _Header(path, view).read()


def parts(path: Path) -> list[Path]:
    """The files of a model, by the name of one: all parts of a split one, the first one first; else the file itself."""
    named = PART.fullmatch(path.name)
    if named is None or not 1 <= int(named[3]) <= MAX_PARTS:
        return [path]
    return [path.with_name(f"{named[1]}-{at:05}-of-{named[3]}.gguf") for at in range(1, int(named[3]) + 1)]


class Mapped:
    """The tensors of a file as a part of memory: bytes are read when they are first looked at."""

    def __init__(self, file: File) -> None:
        self.file = file
        with file.path.open("rb") as opened:
            # Beyond the end of a file there is no memory: touching it would end the process.
            if os.fstat(opened.fileno()).st_size < max((tensor.end for tensor in file.tensors.values()), default=1):
                raise ArtifactError("the file was cut short after its header was read.", where=str(file.path))
            # Private and writable, because torch accepts no read-only memory; nobody writes to it.
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)

    def bytes(self, name: str) -> NDArray[np.uint8]:
        """A view of the file."""
        tensor = self.file.tensors[name]
        return np.frombuffer(self._map, np.uint8, tensor.end - tensor.start, tensor.start)

    def give_back(self, start: int = 0, end: int | None = None) -> None:
        """Whole pages of these bytes (of all), so that the file doesn't stay in memory beside what was made of it."""
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, len(self._map) if end is None else end // page * page
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def stream(self) -> Iterator[tuple[str, NDArray[np.uint8], Callable[[int], None]]]:
        """(name, bytes, give_back) of each tensor in file order: the bytes are to be used before the next are asked for.
        `give_back(bytes)` says how many were."""
        for name, tensor in sorted(self.file.tensors.items(), key=lambda item: item[1].start):

            def give_back(done: int, tensor: TensorInfo = tensor) -> None:
                self.give_back(tensor.start, tensor.start + done)

            yield name, self.bytes(name), give_back
            give_back(tensor.end - tensor.start)


def stream(file: File) -> Iterator[tuple[str, NDArray[np.uint8], Callable[[int], None]]]:
    """`Mapped.stream` of a file."""
    return Mapped(file).stream()


class _Header:
    """Reads a header from its first byte to its last; `at` is the position."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path, self.view = path, view
        self.at, self.size, self.end = 0, len(view), min(len(view), HEADER_BYTES)
        self.items = MAX_ITEMS

    def read(self) -> File:
        if self.take(4) != MAGIC:
            self.fail("it is not GGUF: it begins with other bytes.")
        version = self.number("<I")
        if version not in (2, 3):
            kind = "written for big-endian machines" if version & 0xFFFF == 0 else f"of version {version}"
            self.fail(f"the file is {kind}; ownlm reads versions 2 and 3.", cure="Convert it with llama.cpp's tools.")
        num_tensors, num_keys = self.number("<Q"), self.number("<Q")
        # A tensor takes at least 24 bytes, a key at least 13.
        for what, count, most, least in (("tensors", num_tensors, MAX_TENSORS, 24), ("keys", num_keys, MAX_KEYS, 13)):
            if count > most or count * least > self.end - self.at:
                self.fail(f"it claims {count} {what}, which don't fit.")
        metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self.text("a key")
            if not key or key in metadata:
                self.fail(f"the key {key!r} appears twice." if key else "a key is empty.")
            metadata[key] = self.value(key, self.number("<I"))
        alignment = metadata.get("general.alignment", np.uint32(ALIGNMENT))
        if not isinstance(alignment, np.uint32) or int(alignment).bit_count() != 1:
            self.fail(f"general.alignment {alignment!r} is not a power of two.")
        claimed: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in range(num_tensors):
            name = self.text("a tensor's name")
            if not name or name in claimed:
                self.fail(f"the tensor {name!r} appears twice." if name else "a tensor has no name.")
            claimed[name] = self.tensor(name)
        return File(
            self.path, metadata, self.places(claimed, -(-self.at // int(alignment)) * int(alignment), int(alignment))
        )

    def places(
        self, claimed: Mapping[str, tuple[str, tuple[int, ...], int]], base: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """Offsets from the beginning of the file: aligned, inside it, and none within another tensor."""
        tensors = {}
        for name, (type, shape, offset) in claimed.items():
            start = base + offset
            end = start + byte_size(type, shape)
            if offset % alignment:
                self.fail(f"tensor {name} begins at {offset}, which is no multiple of {alignment}.")
            if end > self.size:
                self.fail(f"tensor {name} ends at byte {end} of a file of {self.size}: it is cut short.")
            tensors[name] = TensorInfo(type, shape, start, end)
        ordered = sorted(tensors, key=lambda name: (tensors[name].start, tensors[name].end))
        for name, following in pairwise(ordered):
            if tensors[following].start < tensors[name].end:
                self.fail(f"tensors {name} and {following} overlap.")
        return tensors

    def tensor(self, name: str) -> tuple[str, tuple[int, ...], int]:
        """(type, shape, offset) of the next tensor, its shape sane."""
        dims = self.number("<I")
        if not 1 <= dims <= MAX_DIMS:
            self.fail(f"tensor {name} has {dims} dimensions.")
        shape = tuple(self.number("<Q") for _ in range(dims))[::-1]  # the file has the row first
        code = self.number("<I")
        if code not in TYPES:
            self.fail(f"tensor {name} has type {code}, which ownlm doesn't know.")
        layout = LAYOUTS[TYPES[code]]
        if 0 in shape or shape[-1] % layout.block:
            self.fail(f"tensor {name} of type {TYPES[code]} has shape {shape}: no rows of whole {layout.block}-blocks.")
        return TYPES[code], shape, self.number("<Q")

    def value(self, key: str, code: int, depth: int = 0) -> Value:
        if code == STRING:
            return self.text(key)
        if code in NUMBERS:
            return self.array(key, NUMBERS[code], 1)[0]  # type: ignore[no-any-return]
        if code != ARRAY or depth == MAX_DEPTH:
            self.fail(f"{key} has type {code}, which doesn't exist." if code != ARRAY else f"{key} is nested too deep.")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in NUMBERS:
            return self.array(key, NUMBERS[inner], count)
        # A string takes at least 8 bytes, an array 12.
        if inner not in (STRING, ARRAY) or count * 8 > self.end - self.at or count > self.items:
            self.fail(f"{key} claims {count} values of type {inner}, which don't fit.")
        self.items -= count
        if inner == STRING:
            return [self.text(key) for _ in range(count)]
        return [self.value(key, ARRAY, depth + 1) for _ in range(count)]

    def array(self, key: str, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        raw = self.take(count * dtype.itemsize)
        if dtype.kind == "b" and not set(raw) <= {0, 1}:
            self.fail(f"{key} holds a byte that is neither true nor false.")
        return np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="))

    def text(self, what: str) -> str:
        raw = self.take(self.number("<Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8.")

    def number(self, form: str) -> int:
        (found,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(found)

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            short = self.end == self.size
            self.fail(
                f"its header ends too early or claims {count} bytes where {self.end - self.at} are left."
                if short
                else f"its header takes more than {HEADER_BYTES} bytes."
            )
        found = bytes(self.view[self.at : self.at + count])
        self.at += count
        return found

    def fail(self, what: str, cure: str = "") -> NoReturn:
        raise ArtifactError(what, where=str(self.path), cure=cure)


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """A tensor to write: `pieces` yields its bytes in order when its turn comes, so that one is in memory at a time."""

    name: str
    type: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[NDArray[np.uint8]]]


def write(path: Path | str, metadata: Mapping[str, Value], tensors: Sequence[TensorSource]) -> None:
    """Write a file of version 3, whole or not at all (temporary sibling, fsync, rename), keys and tensors in the order given:
    equal arguments give equal bytes. Raises StorageFull."""
    path = Path(path)
    alignment = int(np.uint32(metadata.get("general.alignment", ALIGNMENT)))  # type: ignore[arg-type]
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _value(value)
    offset = 0
    assert len({tensor.name for tensor in tensors}) == len(tensors), "a tensor's name appears twice"
    for tensor in tensors:
        layout = LAYOUTS[tensor.type]
        assert len(tensor.name.encode()) <= MAX_NAME, tensor.name
        assert 1 <= len(tensor.shape) <= MAX_DIMS, (tensor.name, tensor.shape)
        assert tensor.shape[-1] % layout.block == 0, (tensor.name, tensor.shape, tensor.type)
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        header += _text(tensor.name) + dims + struct.pack("<IQ", layout.code, offset)
        offset += byte_size(tensor.type, tensor.shape)
        offset += -offset % alignment
    if tensors:
        header += b"\0" * (-len(header) % alignment)
    require_space(path.parent, len(header) + offset)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with storage(path.parent):
        try:
            with temporary.open("wb") as file:
                file.write(header)
                for tensor in tensors:
                    written = sum(file.write(piece.data) for piece in tensor.pieces())
                    assert written == byte_size(tensor.type, tensor.shape), (tensor.name, written)
                    file.write(b"\0" * (-written % alignment))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    """The type of a value and the value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, np.generic):
        dtype = value.dtype.newbyteorder("<")
        return struct.pack("<I", CODES[dtype]) + value.astype(dtype).tobytes()
    if isinstance(value, np.ndarray):
        assert value.ndim == 1, value.shape
        dtype = value.dtype.newbyteorder("<")
        return struct.pack("<IIQ", ARRAY, CODES[dtype], len(value)) + value.astype(dtype).tobytes()
    assert isinstance(value, list), f"{value!r} doesn't say its type: use a numpy scalar, a string or a list of them"
    texts = all(isinstance(item, str) for item in value)
    items = [_text(item) for item in value] if texts else [_value(item)[4:] for item in value]
    return struct.pack("<IIQ", ARRAY, STRING if texts else ARRAY, len(value)) + b"".join(items)
