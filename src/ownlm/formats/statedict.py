"""A pickled state dict, read without unpickling.

A pickle is a program for a small machine. This one knows the instructions that state dicts are made of, and for it a
global is a name, never an object: nothing is imported, and nothing can be called but the few ways to make a tensor or a dict
below. The first name that is not in NAMES ends the reading. Sources: docs.python.org/3/library/pickletools, torch/_utils.py
and torch/serialization.py. Runs in the confined child of `ownlm convert`: standard library only.
"""

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ownlm.sandbox import Refused

PICKLE_BYTES = 32_000_000  # 100,000 tensors take 20
DIMENSIONS, COUNT = 64, 2**63
# torch's names of types: that of safetensors, and the bytes of a value.
TYPES = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "complex64": ("C64", 8),
    "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1), "uint64": ("U64", 8), "uint32": ("U32", 4),
    "uint16": ("U16", 2), "uint8": ("U8", 1), "bool": ("BOOL", 1), "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a pickle. It stands for itself; there is nothing behind it."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A stretch of bytes by its key; `type` is the torch type of its values ("uint8" where views say their own)."""

    key: str
    type: str
    bytes: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: how to walk through a storage, in values."""

    storage: Storage
    type: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return TYPES[self.type][1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(slots=True)
class Ordered:
    """An OrderedDict, or a dict: what matters of either."""

    items: dict[Any, Any] = field(default_factory=dict)


# ── The machine that reads pickles ───────────────────────────────────────────────────────────────────────────────────

MARK = object()


class Machine:
    """Reads one pickle after another from `data`; `at` is where it stands."""

    def __init__(self, data: memoryview, at: int = 0) -> None:
        self.data, self.at = data, at
        self.end = min(len(data), at + PICKLE_BYTES)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The value of the pickle that begins here."""
        self.stack, self.memo = [], {}
        try:
            while (code := self.take(1)) != b".":
                if code not in INSTRUCTIONS:
                    raise Refused(f"its pickle uses instruction {code!r}, which weights never need")
                INSTRUCTIONS[code](self)
            return self.pop()
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as fault:
            if isinstance(fault, Refused):
                raise
            raise Refused(f"its pickle is damaged at byte {self.at} ({type(fault).__name__})") from None

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.end - self.at:
            whole = self.end == len(self.data)
            raise Refused("its pickle is cut short" if whole else f"its pickle has more than {PICKLE_BYTES} bytes")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def number(self, format: str) -> Any:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def line(self) -> str:
        length = bytes(self.data[self.at : min(self.at + 1000, self.end)]).find(b"\n")
        if length < 0:
            raise Refused("its pickle is damaged: a name without end")
        return self.take(length + 1)[:-1].decode()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise ValueError("mark")
        return value

    def to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise IndexError("no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def find(self, module: str, name: str) -> None:
        if (module, name) not in NAMES:
            wanted = ascii(f"{module}.{name}"[:200])[1:-1]
            raise Refused(
                f"its pickle asks for {wanted}, which weights never need; it was not looked up, nothing was run"
            )
        self.push(Global(module, name))

    def find_on_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("no name")
        self.find(module, name)

    def make(self) -> None:
        arguments, maker = self.pop(), self.pop()
        if not isinstance(maker, Global) or not isinstance(arguments, tuple):
            raise Refused("its pickle calls something that is not a way to make a tensor")
        call = NAMES[maker.module, maker.name]
        if call is None:
            raise Refused(f"its pickle calls {maker.module}.{maker.name}, which makes no tensor")
        self.push(call(*arguments))

    def build(self) -> None:
        self.pop()
        # A state dict carries `_metadata`, a tensor perhaps attributes: neither is part of the weights.
        if not isinstance(self.stack[-1], Ordered | View):
            raise Refused("its pickle sets the state of something that has none")

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Ordered) or len(values) % 2:
            raise ValueError("not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise Refused(f"its pickle has a dict whose key is neither text nor number ({type(key).__name__})")
            target.items[key] = value

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("not a list")
        self.stack[-1].extend(values)

    def persistent(self) -> None:
        """A storage: ("storage", its type, its key, the device it was on, its number of values[, a view of another])."""
        what, kind, key, _, count, *view = self.pop()
        if what != "storage" or not isinstance(kind, Global) or kind.name not in STORAGES or not is_count(count):
            raise Refused("its pickle describes a storage that torch would not know")
        if any(view) or not isinstance(key, str):
            raise Refused("its pickle describes a storage within a storage, as torch wrote before 0.4")
        type = STORAGES[kind.name]
        self.push(Storage(key, type, count * TYPES[type][1]))

    def long(self) -> None:
        self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def put(self, at: int) -> None:
        self.memo[at] = self.stack[-1]


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < COUNT


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> View:
    return _view(storage, storage.type if isinstance(storage, Storage) else "", offset, shape, stride)


def _tensor_with_type(
    storage: Any, offset: Any, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any
) -> View:
    return _view(storage, dtype.name if isinstance(dtype, Global) else "", offset, shape, stride)


def _view(storage: Any, type: str, offset: Any, shape: Any, stride: Any) -> View:
    if (
        not isinstance(storage, Storage)
        or type not in TYPES
        or not isinstance(shape, tuple)
        or not isinstance(stride, tuple)
    ):
        raise Refused("its pickle describes a tensor that torch would not know")
    # Nothing of it may be shown before it is known to be numbers: nested tuples can be endless as text.
    if len(shape) != len(stride) or len(shape) > DIMENSIONS or not all(map(is_count, (offset, *shape, *stride))):
        raise Refused("its pickle describes a tensor whose shape, strides or offset can't be")
    view = View(storage, type, offset, shape, stride)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    if all(shape) and last * view.itemsize > storage.bytes:
        raise Refused(f"a tensor of shape {shape[:4]} reaches beyond its storage of {storage.bytes} bytes")
    return view


def _parameter(data: Any, *_: Any) -> View:
    if not isinstance(data, View):
        raise Refused("its pickle makes a parameter of something that is not a tensor")
    return data


def _typed(function: Any, _: Any, arguments: Any, *__: Any) -> View:
    """A tensor with attributes of its own, which are left out."""
    if (
        not isinstance(function, Global)
        or NAMES[function.module, function.name] not in TENSORS
        or not isinstance(arguments, tuple)
    ):
        raise Refused("its pickle makes a tensor by something that makes none")
    made: View = NAMES[function.module, function.name](*arguments)  # type: ignore[misc]
    return made


def _ordered(*arguments: Any) -> Ordered:
    if arguments:
        raise Refused("its pickle makes a dict of something")
    return Ordered()


TENSORS: tuple[Callable[..., View], ...] = (_tensor, _tensor_with_type, _parameter)
# Every name a pickle may use, and what calling it makes; None: it can't be called.
NAMES: dict[tuple[str, str], Callable[..., Any] | None] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_type,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    ("collections", "OrderedDict"): _ordered,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch", "Tensor"): None,
    ("torch.nn.parameter", "Parameter"): None,
    **{("torch", name): None for name in (*STORAGES, *TYPES)},
    **{("torch.storage", name): None for name in STORAGES},
}
INSTRUCTIONS: dict[bytes, Callable[[Machine], object]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.push(MARK),
    b"0": lambda m: m.pop(),
    b"1": lambda m: m.to_mark(),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": Machine.long,
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(m.take(m.number("<I")).decode()),
    b"\x8c": lambda m: m.push(m.take(m.number("<B")).decode()),
    b"\x8d": lambda m: m.push(m.take(m.number("<Q")).decode()),
    b"T": lambda m: m.push(m.take(m.number("<I")).decode()),  # texts of Python 2
    b"U": lambda m: m.push(m.take(m.number("<B")).decode()),
    b"B": lambda m: m.push(m.take(m.number("<I"))),
    b"C": lambda m: m.push(m.take(m.number("<B"))),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.to_mark())),
    b"\x85": lambda m: m.push((m.pop(),)),
    b"\x86": lambda m: m.push((m.pop(), m.pop())[::-1]),
    b"\x87": lambda m: m.push((m.pop(), m.pop(), m.pop())[::-1]),
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.extend([m.pop()]),
    b"e": lambda m: m.extend(m.to_mark()),
    b"}": lambda m: m.push(Ordered()),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.to_mark()),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"c": lambda m: m.find(m.line(), m.line()),
    b"\x93": Machine.find_on_stack,
    b"R": Machine.make,
    b"\x81": Machine.make,
    b"b": Machine.build,
    b"Q": Machine.persistent,
}


def views(value: Any) -> Iterator[View]:
    """Every tensor in dicts within dicts."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, View):
            yield one
        elif isinstance(one, Ordered | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            waiting += one.items.values() if isinstance(one, Ordered) else one
