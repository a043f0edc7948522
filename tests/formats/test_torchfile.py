"""Files of torch.save, read without unpickling: the same tensors as torch.load's, and nothing that a pickle asks for."""

import io
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch.storage import UntypedStorage

from ownlm.formats import statedict
from ownlm.formats.statedict import Machine
from ownlm.formats.torchfile import convert
from ownlm.sandbox import Refused

GENERATOR = torch.Generator().manual_seed(0)
BASE = torch.randn(12, 10, generator=GENERATOR)
TENSORS: dict[str, torch.Tensor] = OrderedDict(
    plain=BASE,
    tied=BASE,
    transposed=BASE.T,
    row=BASE[3],
    column=BASE[:, 2],
    steps=BASE[::2, 1::3],
    part=BASE.view(-1)[7:19],
    expanded=torch.ones(1).expand(5, 7),
    permuted=torch.randn(3, 4, 5, 6, generator=GENERATOR).permute(2, 0, 3, 1),
    parameter=torch.nn.Parameter(BASE[:2]),
    scalar=torch.tensor(3),
    empty=torch.zeros(0, 3),
    half=BASE.half(),
    brain=BASE.bfloat16().T,
    double=BASE.double(),
    complex=BASE.to(torch.complex64),
    flags=torch.tensor([True, False]),
    bytes=torch.arange(7, dtype=torch.uint8),
    small=torch.arange(-3, 4, dtype=torch.int8),
    short=torch.arange(7, dtype=torch.int16),
    int=torch.arange(7, dtype=torch.int32),
)
NEWER = {
    "eight": BASE.to(torch.float8_e4m3fn),
    "eight2": BASE[:4].to(torch.float8_e5m2).T,
    "unsigned": torch.arange(4).to(torch.uint16),
    "unsigned4": torch.arange(4).to(torch.uint32),
}


def saved(value: Any, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def converted(raw: bytes) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors that the child would write, and what it would leave out."""
    with tempfile.TemporaryFile() as target:
        report = convert(memoryview(raw), target.fileno())
        target.seek(0)
        tensors = load(target.read())
    assert report["tensors"] == len(tensors)
    return tensors, report["left_out"]


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape and content(ours[name]) == content(tensor)
        for name, tensor in theirs.items()
    )


def content(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach().contiguous()
    return bytes(dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_same_tensors_as_torch_load(legacy: bool) -> None:
    raw = saved(TENSORS if legacy else TENSORS | NEWER, legacy=legacy)
    tensors, left_out = converted(raw)
    assert left_out == []
    assert same(tensors, torch.load(io.BytesIO(raw), weights_only=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(protocol: int) -> None:
    file = io.BytesIO()
    torch.save(TENSORS, file, pickle_protocol=protocol)
    assert same(converted(file.getvalue())[0], TENSORS)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_module_with_tied_weights_and_what_lies_beside(legacy: bool) -> None:
    module = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=24)
    module.tied = module.linear1  # type: ignore[assignment]
    state = module.state_dict()
    assert same(converted(saved(state, legacy=legacy))[0], dict(state))
    for name in ("state_dict", "model", "module", "model_state_dict"):
        wrapped = {"epoch": 3, name: state, "optimizer": {"lr": [0.1], "betas": (0.9, 0.99)}}
        assert same(converted(saved(wrapped, legacy=legacy))[0], dict(state))
    tensors, left_out = converted(saved({**state, "version": 1.5, "notes": None, 7: "x"}, legacy=legacy))
    assert same(tensors, dict(state))
    assert left_out == ["'version'", "'notes'", "7"]


def test_a_parameter_with_attributes_of_its_own() -> None:
    parameter = torch.nn.Parameter(BASE.clone())
    parameter.note = "kept by torch, not part of the weights"  # type: ignore[attr-defined]
    assert same(converted(saved({"x": parameter}))[0], {"x": BASE})


@st.composite
def layouts(draw: st.DrawFn) -> torch.Tensor:
    """A tensor that lies in its storage in any way that torch can make without copying."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    tensor = torch.arange(720).to(dtype)[draw(st.integers(0, 3)) :]
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    strides = tuple(draw(st.lists(st.integers(0, 30), min_size=len(shape), max_size=len(shape))))
    return torch.as_strided(tensor, shape, strides)


@settings(max_examples=300)
@given(tensor=layouts(), legacy=st.booleans())
def test_any_layout(tensor: torch.Tensor, legacy: bool) -> None:
    assert same(converted(saved({"x": tensor}, legacy=legacy))[0], {"x": tensor})


# ── Pickles that want more ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Calls:
    """Pickles as a call of `function`, whatever it is."""

    function: Any
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            (self.function, self.arguments, self.state) if self.state is not None else (self.function, self.arguments)
        )


MARKER = "{marker}"
TOUCH = f"touch {MARKER}"
PYTHON = f"open({MARKER!r}, 'w').close()"
# Pickles by hand; each writes the marker when it is really unpickled.
ASSEMBLED: dict[str, tuple[Callable[[str], bytes], str]] = {
    "posix.system, protocol 0": (lambda m: b"cposix\nsystem\n(Vtouch %s\ntR." % m.encode(), "posix.system"),
    "INST": (lambda m: b"(Vtouch %s\niposix\nsystem\n." % m.encode(), "instruction"),
    "OBJ": (lambda m: b"(cposix\nsystem\nVtouch %s\no." % m.encode(), "posix.system"),
    "STACK_GLOBAL": (
        lambda m: b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c%c%s\x85R." % (len(f"touch {m}"), f"touch {m}".encode()),
        "posix.system",
    ),
    "a name with dots": (
        lambda m: b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93\x8c%c%s\x85R." % (len(f"touch {m}"), f"touch {m}".encode()),
        "os.path.os.system",
    ),
    "builtins.eval": (
        lambda m: b"cbuiltins\neval\n(Vopen(%s, 'w').close()\ntR." % repr(m).encode(), "builtins.eval",
    ),
    "builtins.getattr": (
        lambda m: b"cbuiltins\ngetattr\n(c__builtin__\n__import__\n(Vos\ntRVsystem\ntR(Vtouch %s\ntR." % m.encode(),
        "builtins.getattr",
    ),
}  # fmt: skip
REDUCED: dict[str, tuple[Callable[[str], Any], str]] = {
    "os.system": (lambda m: Calls(os.system, (f"touch {m}",)), "posix.system"),
    "exec": (lambda m: Calls(exec, (f"open({m!r}, 'w').close()",)), r"builtin(s|__)\.exec"),
    "subprocess": (lambda m: Calls(__import__("subprocess").call, (["touch", m],)), r"(subprocess|commands)\.call"),
    "runpy": (lambda m: Calls(__import__("runpy").run_path, (f"{m}.py",)), "runpy.run_path"),
    "a getattr chain": (lambda m: Calls(getattr, (Calls(__import__, ("os",)), "system")), r"builtin(s|__)\.getattr"),
    "io.open": (lambda m: Calls(open, (m, "w")), "io.open"),
    "functools.partial": (lambda m: Calls(Calls, (os.system,)), "test_torchfile.Calls"),
    "torch.load": (lambda m: Calls(torch.load, (m,)), "torch.serialization.load"),
    "torch.hub.load": (lambda m: Calls(torch.hub.load, ("a/b", "c")), "torch.hub.load"),
    "an own setstate": (lambda m: Calls(torch.nn.Linear, (2, 2), {"training": True}), "torch.nn.modules.linear.Linear"),
    "numpy": (lambda m: __import__("numpy").arange(3), "numpy"),
    "a namespace of arguments": (lambda m: __import__("argparse").Namespace(lr=1), "argparse.Namespace"),
    "a bound method": (lambda m: Calls("a".join, (["b"],)), r"builtin(s|__)\.getattr"),
    "a view of the machine itself": (lambda m: Calls(Machine, (b"",)), "ownlm.formats.statedict.Machine"),
}


def archive(pickled: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    """A zip archive as torch.save's, around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **more}.items():
            zipped.writestr(f"archive/{name}", data)
        for key, data in (storages or {}).items():
            zipped.writestr(f"archive/data/{key}", data)
    return file.getvalue()


def legacies(pickled: bytes) -> Iterator[bytes]:
    """The same pickle in each of the places of a legacy file."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, [])]
    for place in range(5):
        yield b"".join([*parts[:place], pickled, *parts[place + 1 :]])


def gadgets(marker: str) -> Iterator[tuple[str, bytes, str]]:
    for name, (assemble, message) in ASSEMBLED.items():
        yield name, assemble(marker), message
    for name, (make, message) in REDUCED.items():
        yield name, pickle.dumps({"weight": make(marker)}, 2), message
        yield f"{name}, protocol 4", pickle.dumps({"weight": make(marker)}, 4), message


NAMES_OF_GADGETS = [name for name, _, _ in gadgets("x")]


@pytest.mark.parametrize("name", NAMES_OF_GADGETS)
def test_what_a_pickle_asks_for_is_named_and_not_done(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "marker.py").write_text(f"open({str(marker)!r}, 'w').close()")
    ((pickled, message),) = [(raw, message) for one, raw, message in gadgets(str(marker)) if one == name]
    with pytest.raises(Refused, match=message):
        convert(memoryview(archive(pickled)), -1)
    for raw in legacies(pickled):
        with pytest.raises(Refused):
            convert(memoryview(raw), -1)
    assert not marker.exists()


@pytest.mark.parametrize("name", [*ASSEMBLED, "os.system", "exec", "subprocess", "runpy"])
def test_the_gadgets_are_live(name: str, tmp_path: Path) -> None:
    """pickle itself does what they ask, so that the test above can fail."""
    marker = tmp_path / "marker"
    (tmp_path / "marker.py").write_text(f"open({str(marker)!r}, 'w').close()")
    (pickled,) = [raw for one, raw, _ in gadgets(str(marker)) if one == name]
    pickle.loads(pickled)  # noqa: S301
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_every_known_name_is_torchs() -> None:
    """The closed set: each name exists in torch, and none can do more than make a tensor, a size or a dict."""
    callable_names = {f"{module}.{name}" for (module, name), call in statedict.NAMES.items() if call is not None}
    assert callable_names == {
        "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2",
        "collections.OrderedDict", "torch.Size",
    }  # fmt: skip
    for name, size in {name: size for name, (_, size) in statedict.TYPES.items()}.items():
        assert getattr(torch, name).itemsize == size
    for storage, type in statedict.STORAGES.items():
        if storage != "UntypedStorage":
            assert getattr(torch, storage).dtype == getattr(torch, type)
    assert UntypedStorage(3).nbytes() == 3


# ── Damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Stored:
    """A storage in a pickle; `description` is what torch would be told of it."""

    def __init__(self, *description: Any) -> None:
        self.description = description


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.description if isinstance(value, Stored) else None


def described(*arguments: Any, function: Any = torch._utils._rebuild_tensor_v2) -> bytes:
    """The pickle of one tensor, described as one likes."""
    file = io.BytesIO()
    Pickler(file, 2).dump({"x": Calls(function, arguments)})
    return file.getvalue()


FLOATS = Stored("storage", torch.FloatStorage, "0", "cpu", 6)
SIX = {"0": struct.pack("<6f", *range(6))}


def tensor(*, storage: Any = FLOATS, offset: Any = 0, shape: Any = (2, 3), stride: Any = (3, 1)) -> bytes:
    return described(storage, offset, shape, stride, False, OrderedDict())


MEGABYTE = b"B\x40\x42\x0f\x00" + bytes(10**6) + b"0"
LAUGHS = (
    b"\x80\x02" + b")" + b"".join(b"q\x00h\x00h\x00\x86" for _ in range(100))
)  # a tuple of two of a tuple of two of …
DAMAGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "not a file of torch": (lambda: b"hello, world", "not a file that torch.save wrote"),
    "a zip of something else": (lambda: archive(b"").replace(b"data.pkl", b"data.txt"), "no data.pkl"),
    "a TorchScript program": (lambda: archive(tensor(), SIX, **{"code/a.py": b""}), "TorchScript"),
    "big-endian": (lambda: archive(tensor(), SIX, byteorder=b"big"), "big-endian"),
    "no storage": (lambda: archive(tensor()), "has no 'archive/data/0'"),
    "a storage too short": (lambda: archive(tensor(), {"0": SIX["0"][:-1]}), "23 bytes instead of 24"),
    "a storage too long": (lambda: archive(tensor(), {"0": SIX["0"] + b"x"}), "25 bytes instead of 24"),
    "a key that climbs": (
        lambda: archive(tensor(storage=Stored("storage", torch.FloatStorage, "../../../etc/passwd", "cpu", 6)), SIX), "has no",
    ),
    "beyond the storage": (lambda: archive(tensor(offset=1), SIX), "beyond its storage"),
    "far beyond": (lambda: archive(tensor(shape=(2**40, 2**40)), SIX), "beyond its storage"),
    "negative offset": (lambda: archive(tensor(offset=-1), SIX), "can't be"),
    "negative stride": (lambda: archive(tensor(stride=(3, -1)), SIX), "can't be"),
    "negative size": (lambda: archive(tensor(shape=(-2, 3)), SIX), "can't be"),
    "more strides than sizes": (lambda: archive(tensor(stride=(3, 1, 1)), SIX), "can't be"),
    "a hundred axes": (lambda: archive(tensor(shape=(1,) * 100, stride=(1,) * 100), SIX), "can't be"),
    "sizes that are no numbers": (lambda: archive(tensor(shape=("2", 3.0)), SIX), "can't be"),
    "one value, endlessly often": (lambda: archive(tensor(shape=(10**6, 10**6), stride=(0, 0)), SIX), "share storages"),
    "the same storage, endlessly often": (
        lambda: archive(pickle_of_many(tensors=2000, count=100_000), {"0": bytes(400_000)}), "share storages",
    ),
    "no storage at all": (lambda: archive(tensor(storage=7), SIX), "would not know"),
    "a storage of an unknown type": (
        lambda: archive(tensor(storage=Stored("storage", OrderedDict, "0", "cpu", 6)), SIX), "would not know",
    ),
    "a storage of a negative size": (
        lambda: archive(tensor(storage=Stored("storage", torch.FloatStorage, "0", "cpu", -6)), SIX), "would not know",
    ),
    "a persistent id of another kind": (lambda: archive(tensor(storage=Stored("file", "/etc/passwd")), SIX), "damaged"),
    "a tensor of a tuple": (lambda: archive(described((), function=torch._utils._rebuild_parameter), SIX), "parameter of"),
    "a dtype that is no type": (
        lambda: archive(described(FLOATS, 0, (2,), (1,), False, {}, torch.Size, function=torch._utils._rebuild_tensor_v3), SIX),
        "would not know",
    ),
    "a size that is called": (lambda: archive(b"\x80\x02ctorch\nSize\n(K\x01t\x81."), "damaged"),
    "a type that is called": (lambda: archive(b"\x80\x02ctorch\nFloatStorage\n)R."), "makes no tensor"),
    "no dict": (lambda: archive(pickle.dumps([1, 2], 2)), "not hold a dict"),
    "no tensor": (lambda: archive(pickle.dumps({"a": 1}, 2)), "no tensor in it"),
    "a name that breaks a terminal": (lambda: saved({"\x1b[2J": BASE}), "can't be the name"),
    "a name without end": (lambda: saved({"a" * 10**6: BASE}), "can't be the name"),
    "a tuple for a name": (lambda: saved({("a",): BASE}), "neither text nor number"),
    "a pickle without an end": (lambda: archive(tensor()[:-1], SIX), "cut short"),
    "a pickle of nothing": (lambda: archive(b"."), "damaged"),
    "a stack that is empty": (lambda: archive(b"\x80\x02R."), "damaged"),
    "a mark that is missing": (lambda: archive(b"\x80\x02u."), "damaged"),
    "a memory that was not written": (lambda: archive(b"\x80\x02h\x07."), "damaged"),
    "an unknown instruction": (lambda: archive(b"\x80\x02\xff."), "instruction b'.xff'"),
    "an extension": (lambda: archive(b"\x80\x02\x82\x01."), "instruction"),
    "a text of four gigabytes": (lambda: archive(b"\x80\x02X\xff\xff\xff\xff."), "cut short"),
    "a text of many exabytes": (lambda: archive(b"\x80\x04\x8d" + b"\xff" * 8 + b"."), "cut short"),
    "a memory place far away": (lambda: archive(b"\x80\x02Nr\xff\xff\xff\xff."), "not hold a dict"),
    "a billion laughs": (lambda: archive(LAUGHS + b"."), "not hold a dict"),
    "a billion laughs for a shape": (
        lambda: archive(tensor(shape=(7, 7, 7)).replace(b"K\x07K\x07K\x07\x87", LAUGHS.removeprefix(b"\x80\x02")), SIX), "can't be",
    ),
    "a billion laughs for a name": (
        lambda: archive(b"\x80\x04" + LAUGHS.removeprefix(b"\x80\x02") + b"\x8c\x01a\x93."), "damaged",
    ),
    "a name without end for a global": (lambda: archive(b"\x80\x02c" + b"a" * 2000), "name without end"),
    "a pickle of forty megabytes": (lambda: archive(b"\x80\x02" + MEGABYTE * 40), "more than 32000000 bytes"),
}  # fmt: skip


def pickle_of_many(*, tensors: int, count: int) -> bytes:
    storage = Stored("storage", torch.FloatStorage, "0", "cpu", count)
    file = io.BytesIO()
    one = Calls(torch._utils._rebuild_tensor_v2, (storage, 0, (count,), (1,), False, OrderedDict()))
    Pickler(file, 2).dump({f"x{n}": one for n in range(tensors)})
    return file.getvalue()


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_error(name: str) -> None:
    make, message = DAMAGE[name]
    with tempfile.TemporaryFile() as target, pytest.raises(Refused, match=message) as caught:
        convert(memoryview(make()), target.fileno())
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_the_hand_made_archive_is_good() -> None:
    """What the damage above is done to."""
    raw = archive(tensor(), SIX)
    assert same(converted(raw)[0], {"x": torch.arange(6.0).view(2, 3)})
    assert same(converted(archive(tensor(shape=(3, 2), stride=(1, 3)), SIX))[0], {"x": torch.arange(6.0).view(2, 3).T})


def test_a_compressed_entry_is_refused() -> None:
    """So a zip bomb does not even begin."""
    for bomb in ("archive/data.pkl", "archive/data/0"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as zipped:
            for name, data in {"archive/data.pkl": tensor(), "archive/data/0": SIX["0"]}.items():
                compression = zipfile.ZIP_DEFLATED if name == bomb else zipfile.ZIP_STORED
                zipped.writestr(name, bytes(100_000_000) if name == bomb else data, compression)
        with pytest.raises(Refused, match=r"compressed"), tempfile.TemporaryFile() as target:
            convert(memoryview(file.getvalue()), target.fileno())


def test_a_name_twice_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name in ("archive/data.pkl", "archive/data.pk1"):
            zipped.writestr(name, tensor())
    with pytest.raises(Refused, match="a name twice"):
        convert(memoryview(file.getvalue().replace(b"data.pk1", b"data.pkl")), -1)


@pytest.mark.parametrize("legacy", [False, True])
def test_every_cut_is_refused(legacy: bool) -> None:
    raw = saved({"a": BASE[:2].clone(), "b": torch.arange(3)}, legacy=legacy)
    for length in range(0, len(raw), 7):
        with tempfile.TemporaryFile() as target, pytest.raises(Refused):
            convert(memoryview(raw[:length]), target.fileno())


def test_a_flipped_bit_is_refused() -> None:
    """torch.load takes it; the zip has a checksum of every entry."""
    state = {"a": BASE[:2].clone(), "b": torch.arange(3)}
    raw = saved(state)
    for value in state.values():
        at = raw.index(content(value))
        for bit in range(0, 8 * value.nbytes, 13):
            damaged = bytearray(raw)
            damaged[at + bit // 8] ^= 1 << bit % 8
            with tempfile.TemporaryFile() as target, pytest.raises(Refused, match="does not match its checksum"):
                convert(memoryview(bytes(damaged)), target.fileno())
            assert not same(torch.load(io.BytesIO(damaged), weights_only=True), state)


@settings(max_examples=400)
@given(data=st.data(), legacy=st.booleans())
def test_any_damage_is_refused_or_harmless(data: st.DataObject, legacy: bool) -> None:
    """Bytes changed anywhere: refused in one sentence, or tensors that torch.load reads the same."""
    state = {"a": BASE[:2].clone(), "b": BASE.T, "c": {"d": 1}}
    raw = bytearray(saved(state, legacy=legacy))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        tensors, _ = converted(bytes(raw))
    except Refused as fault:
        said = str(fault)
    else:
        assert same(tensors, expected(bytes(raw), tensors if legacy else state))
        return
    assert said.isprintable()
    assert len(said) < 400


def expected(raw: bytes, otherwise: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What torch reads from it. Where its zip reader is the stricter one: what was saved, for data has a checksum there."""
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = torch.load(io.BytesIO(raw), weights_only=True)
    except Exception:  # noqa: BLE001
        loaded = otherwise
    return {name: one for name, one in loaded.items() if isinstance(one, torch.Tensor)}
