"""What torch.save wrote, as safetensors: the work of the confined child of `ownlm convert`.

    zip:     NAME/data.pkl (how tensors lie in storages), NAME/data/0, NAME/data/1, … (the storages, not compressed)
    legacy:  five pickles (magic, version, machine, tensors, keys), then each storage behind its length

The file is mapped; a tensor goes from its storage to the new file without a copy in memory, unless it lies scattered.
Standard library only: no torch, no numpy.
"""

import codecs
import io
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from itertools import product
from typing import Any, Literal

from ownlm.formats.statedict import TYPES, Machine, Ordered, Storage, View, views
from ownlm.sandbox import Refused

GROWTH = 4  # tensors may share storages, and each is written whole: at most so many times the file
NAME_CHARACTERS = 512
COPY_BYTES = 16_000_000
LOCAL_HEADER = b"PK\x03\x04"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {
    1: "B",
    2: "H",
    4: "I",
    8: "Q",
}  # of a memoryview, by the bytes of a value
CONTAINERS = ("state_dict", "model_state_dict", "model", "module")  # where training scripts put the weights
codecs.lookup("cp437")  # of names in zip archives; later nothing more can be opened


def read_zip(data: memoryview) -> tuple[Any, Callable[[Storage], int]]:
    """The pickled value, and where in the file a storage begins."""
    try:
        archive = zipfile.ZipFile(_Reader(data))
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, OverflowError) as fault:
        raise Refused(f"the zip archive is damaged or cut short ({str(fault)[:100]})") from None
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise Refused("the zip archive holds a name twice")
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused("this zip archive is not what torch.save writes: it has no data.pkl, or several")
    prefix = pickles[0].removesuffix("data.pkl")
    if any(name.startswith(f"{prefix}code/") for name in entries):
        raise Refused("this is a TorchScript program, not weights")

    def place(name: str) -> tuple[int, int]:
        """Begin and end of an entry's bytes, checked against its CRC."""
        if name not in entries:
            raise Refused(f"the zip archive has no {_short(name)}")
        entry = entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise Refused("an entry of the zip archive is compressed or encrypted, which torch.save never does")
        head = bytes(data[entry.header_offset : entry.header_offset + 30])
        if len(head) < 30 or head[:4] != LOCAL_HEADER:
            raise Refused("the zip archive is damaged: an entry is not where it should be")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
        if start + entry.file_size > len(data):
            raise Refused("the zip archive is cut short")
        crc = 0
        for at in range(start, start + entry.file_size, COPY_BYTES):
            crc = zlib.crc32(data[at : min(at + COPY_BYTES, start + entry.file_size)], crc)
        if crc != entry.CRC:
            raise Refused("the zip archive is damaged: an entry does not match its checksum")
        return start, start + entry.file_size

    if f"{prefix}byteorder" in entries:
        start, end = place(f"{prefix}byteorder")
        if bytes(data[start : min(end, start + 10)]) != b"little":
            raise Refused("its numbers are in the order of a big-endian machine")
    start, end = place(pickles[0])
    value = Machine(data[:end], start).read()
    places: dict[Storage, int] = {}

    def locate(storage: Storage) -> int:
        if storage not in places:
            begin, finish = place(f"{prefix}data/{storage.key}")
            if finish - begin != storage.bytes:
                raise Refused(f"a storage has {finish - begin} bytes instead of {storage.bytes}")
            places[storage] = begin
        return places[storage]

    return value, locate


def read_legacy(data: memoryview) -> tuple[Any, Callable[[Storage], int]]:
    """The same of a file by torch before 1.6."""
    machine = Machine(data)
    try:
        known = machine.read() == MAGIC and machine.read() == PROTOCOL
    except Refused:
        known = False
    if not known:
        raise Refused("this is not a file that torch.save wrote")
    about = machine.read()
    if not isinstance(about, Ordered) or about.items.get("little_endian") is not True:
        raise Refused("its numbers are in the order of a big-endian machine, or it doesn't say")
    value = machine.read()
    keys = machine.read()
    storages: dict[str, Storage] = {}
    for view in views(value):
        if storages.setdefault(view.storage.key, view.storage).bytes != view.storage.bytes:
            raise Refused("its pickle gives a storage two sizes")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or not storages.keys() <= set(keys):
        raise Refused("the list of its storages is damaged")
    places: dict[str, int] = {}
    at = machine.at
    for key in keys:
        if key not in storages:
            raise Refused("it holds a storage that no tensor uses, whose size is not known")
        storage = storages[key]
        count = int.from_bytes(data[at : at + 8], "little")
        places[key] = at + 8
        if count * TYPES[storage.type][1] != storage.bytes or (at := at + 8 + storage.bytes) > len(data):
            raise Refused("the file is cut short, or a storage has another size than its pickle says")
    return value, lambda storage: places[storage.key]


class _Reader(io.RawIOBase):
    """The mapped file as zipfile wants it; reading it takes no open file and no copy of the whole."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, len(self.data))[whence]
        if self.at < 0:
            raise ValueError("before the beginning")
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        part = self.data[self.at : self.at + len(buffer)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)


# ── safetensors out of it ────────────────────────────────────────────────────────────────────────────────────────────


def convert(data: memoryview, target: int) -> dict[str, Any]:
    """Write the tensors of a file of torch.save into the open file `target`. Says which entries were left out."""
    if not data:
        raise Refused("the file is empty")
    value, locate = read_zip(data) if bytes(data[:4]) == LOCAL_HEADER else read_legacy(data)
    tensors, left_out = _weights(value)
    if sum(view.nbytes for view in tensors.values()) > GROWTH * len(data) + COPY_BYTES:
        raise Refused(f"its tensors share storages so much that they would take more than {GROWTH} times the file")
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, view in ordered:
        offsets = [at, at := at + view.nbytes]
        header[name] = {"dtype": TYPES[view.type][0], "shape": list(view.shape), "data_offsets": offsets}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    _write(target, memoryview(len(raw).to_bytes(8, "little") + raw))
    for _, view in ordered:
        start = locate(view.storage)
        _copy(target, view, data[start : start + view.storage.bytes])
    return {"tensors": len(ordered), "left_out": left_out[:20]}


def _weights(value: Any) -> tuple[dict[str, View], list[str]]:
    """The tensors by name, and the names of what is beside them. Looks into the dict that training scripts wrap around."""
    if isinstance(value, Ordered) and not any(isinstance(one, View) for one in value.items.values()):
        value = next((value.items[name] for name in CONTAINERS if isinstance(value.items.get(name), Ordered)), value)
    if not isinstance(value, Ordered):
        raise Refused("it does not hold a dict of tensors")
    tensors = {name: one for name, one in value.items.items() if isinstance(one, View)}
    if not tensors:
        raise Refused("there is no tensor in it")
    for name in tensors:
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or not 0 < len(name) <= NAME_CHARACTERS
            or name == "__metadata__"
        ):
            raise Refused(f"{_short(name)} can't be the name of a tensor")
    return tensors, [_short(name) for name in value.items if name not in tensors]


def _short(name: str | int) -> str:
    return ascii(name[:60] if isinstance(name, str) else name)[:200]


def _copy(target: int, view: View, storage: memoryview) -> None:
    """Write a tensor's values in order, wherever they lie in the storage."""
    if not all(view.shape):
        return
    axes = _merged(view)
    if not axes or (len(axes) == 1 and axes[0][1] == 1):
        start = view.offset * view.itemsize
        _write(target, storage[start : start + view.nbytes])
        return
    format = FORMATS[view.itemsize]
    values = storage[: len(storage) // view.itemsize * view.itemsize].cast(format)
    whole = memoryview(bytearray(view.nbytes)).cast(format)
    # The longest axis is copied at once, the others one by one. Steps in the result follow from the order of the axes.
    steps = [math.prod(size for size, _ in axes[at + 1 :]) for at in range(len(axes))]
    longest = max(range(len(axes)), key=lambda at: axes[at][0])
    count, stride, step = *axes[longest], steps[longest]
    others = [at for at in range(len(axes)) if at != longest]
    for index in product(*(range(axes[at][0]) for at in others)):
        start = view.offset + sum(i * axes[at][1] for i, at in zip(index, others, strict=True))
        into = sum(i * steps[at] for i, at in zip(index, others, strict=True))
        end = into + (count - 1) * step + 1
        if stride == 0:
            whole[into:end:step] = memoryview(bytes(values[start : start + 1]) * count).cast("B").cast(format)
        else:
            whole[into:end:step] = values[start : start + (count - 1) * stride + 1 : stride]
    _write(target, whole.cast("B"))


def _merged(view: View) -> list[tuple[int, int]]:
    """(size, stride) of the axes, those of one value left out and neighbours that lie in one row made one."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(view.shape, view.stride, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def _write(target: int, data: memoryview) -> None:
    at = 0
    while at < len(data):
        at += os.write(target, data[at : at + COPY_BYTES])
