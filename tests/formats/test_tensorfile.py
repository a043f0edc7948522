"""safetensors against the reference implementation: what it reads we read the same, what it refuses we refuse."""

import gc
import json
import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ownlm.errors import ArtifactError, NotFound
from ownlm.formats.tensorfile import INDEX, Pending, read_header, read_tensors, write_shards, write_tensors

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "nothing": torch.as_strided(torch.zeros(1), (0,), (0,)),
    "one": torch.as_strided(torch.ones(1), (1,), (0,)),
    "ids": torch.arange(3),
    "mask": torch.tensor([True, False, True]),
    "odd": torch.arange(5, dtype=torch.uint8),
}


def file_of(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def read_all(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor, _ in read_tensors(path, read_header(path))}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype
        and tensor.shape == theirs[name].shape
        and content(tensor) == content(theirs[name])
        for name, tensor in ours.items()
    )


def content(tensor: torch.Tensor) -> bytes:
    dense = tensor.contiguous()
    return bytes(dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in TENSORS.items()},
        path,
        metadata={"format": "pt"},
    )
    return path.read_bytes()


# Values near those of a real entry are the ones that get far into a parser.
COUNTS = st.one_of(
    st.integers(-2, 20), st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, 2**64, -1, 1.0, True, None, "4"])
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64", "BOOL", "F8_E4M3", "F4", "f32", None, 4, ["F32"]]),
        "shape": st.one_of(st.lists(COUNTS, max_size=4), st.sampled_from([None, "12", {"0": 1}])),
        "data_offsets": st.one_of(st.lists(COUNTS, min_size=2, max_size=2), st.lists(COUNTS, max_size=3), st.none()),
        "more": st.none(),
    },
)
HEADERS = st.one_of(
    st.dictionaries(st.text(max_size=5), st.one_of(ENTRIES, ENTRIES, st.none(), st.integers(), st.text(max_size=3))),
    st.lists(ENTRIES, max_size=2),
    st.text(max_size=5),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=HEADERS, size=st.integers(0, 40))
def test_any_header_is_read_as_the_reference_does_or_refused(tmp_path: Path, header: Any, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(header, bytes(range(size))))
    compare(path)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_read_as_the_reference_does_or_refused(tmp_path: Path, good: bytes, data: st.DataObject) -> None:
    raw = bytearray(good)
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        match data.draw(st.sampled_from(["set", "cut", "insert", "swap"])):
            case "set" if raw:
                raw[data.draw(st.integers(0, min(len(raw), header) - 1))] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[data.draw(st.integers(0, len(raw))) :]
            case "insert":
                at = data.draw(st.integers(0, len(raw)))
                raw[at:at] = data.draw(st.binary(max_size=9))
            case "swap":
                old = data.draw(st.sampled_from([b"F32", b"BF16", b"[3,4]", b"[0,4]", b'"b"', b"0,", b"{", b"]"]))
                raw = raw.replace(
                    old, data.draw(st.sampled_from([b"F64", b"[4,3]", b"[12]", b'"ids"', b"9,", b"", b"}"])), 1
                )
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    compare(path)


def compare(path: Path) -> None:
    """We refuse with one short sentence, or both read the same. Refusing more than the reference does is fine."""
    try:
        ours = read_all(path)
    except ArtifactError as fault:
        refusal = str(fault)
    else:
        assert same(ours, load_file(path))
        return
    assert refusal.isprintable()
    assert len(refusal) < 500 + len(str(path))


def test_what_the_reference_writes_is_read(tmp_path: Path, good: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(good)
    assert same(read_all(tmp_path / "x.safetensors"), TENSORS)


def test_every_cut_is_refused(tmp_path: Path, good: bytes) -> None:
    for length in range(len(good)):
        (tmp_path / "x.safetensors").write_bytes(good[:length])
        with pytest.raises(ArtifactError):
            read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.complex64])
def test_dtypes_of_newer_files(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    made = (torch.arange(6, dtype=torch.float32) / 4).to(dtype)
    save_file({"x": made, "y": torch.zeros(1)}, path)
    assert same(read_all(path), {"x": made, "y": torch.zeros(1)})
    write_tensors(path, [("x", made)])
    assert same(load_file(path), {"x": made})


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE: dict[str, tuple[Any, str]] = {
    "a header of its own encoding": (json.dumps({"a": TENSOR}).encode("utf-16"), "doesn't begin"),
    "space before the header": (b" " + json.dumps({"a": TENSOR}).encode(), "doesn't begin"),
    "not UTF-8": (b'{"\xff": 1}', "utf-8"),
    "an escape sequence in a name": ({"\x1b[2J": TENSOR}, "can't be the name"),
    "half a character in a name": (b'{"\\ud800":' + json.dumps(TENSOR).encode() + b"}", "can't be the name"),
    "a name without end": ({"a" * 10**6: TENSOR}, "can't be the name"),
    "metadata that is no text": ({"__metadata__": {"a": 1}, "a": TENSOR}, "__metadata__"),
    "metadata that is a list": ({"__metadata__": [], "a": TENSOR}, "__metadata__"),
    "names twice": (b'{"a":' + json.dumps(TENSOR).encode() + b',"a":' + json.dumps(TENSOR).encode() + b"}", "appears twice"),
    "a million values": (b'{"a":[' + b"[]," * 10**6 + b"[]]}", "more than 1000000 values"),
    "a million names": (b"{" + b",".join(b'"%d":{}' % i for i in range(450_000)) + b"}", "tensor 0 has no"),
    "a million names, the last twice": (
        b"{" + b",".join(b'"%d":{}' % i for i in [*range(450_000), 449_999]) + b"}", "appears twice",
    ),
    "a number without end": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,8]}}', "digits"),
    "a thousand large dimensions": ({"a": TENSOR | {"shape": [2**62] * 1000}}, "not counts"),
    "a product beyond 64 bits": ({"a": TENSOR | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, "doesn't fill"),
    "a product that wraps to the right size": ({"a": TENSOR | {"shape": [2**33, 2**31 + 1, 2]}}, "doesn't fill"),
    "offsets backwards": ({"a": TENSOR | {"data_offsets": [8, 0]}}, "doesn't fill"),
    "true for one": ({"a": TENSOR | {"shape": [True, 2]}}, "not counts"),
    "nested deep": (b'{"a":' + b"[" * 10**5, "recursion"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    header, message = HOSTILE[name]
    (tmp_path / "x.safetensors").write_bytes(file_of(header, bytes(8)))
    with pytest.raises(ArtifactError, match=message) as caught:
        read_header(tmp_path / "x.safetensors")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_the_memory_of_a_header_bomb_is_bounded(tmp_path: Path) -> None:
    """The dearest header we know of: as many objects of nothing as the limit lets in."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(b"{" + b",".join(b'"%d":{}' % i for i in range(499_000)) + b"}"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
    before = peak_bytes()
    with pytest.raises(ArtifactError):
        read_header(path)
    assert peak_bytes() - before < 500e6


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ArtifactError, match="not a file"):
            read_header(tmp_path / f"{name}.safetensors")
    with pytest.raises(NotFound):
        read_header(tmp_path / "none.safetensors")


def test_a_file_that_shrinks_between_header_and_data(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS.items())
    entries = read_header(path)
    for length in (path.stat().st_size - 1, 0):
        os.truncate(path, length)
        with pytest.raises(ArtifactError, match="cut short after"):
            next(read_tensors(path, entries))


# ── Shards ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    files = write_shards(tmp_path, TENSORS, max_bytes=30)
    assert [file.name for file in files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"].keys() == TENSORS.keys()
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert same(found, TENSORS)
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118


def test_a_model_that_fits_is_one_file(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, max_bytes=30)
    assert write_shards(tmp_path, TENSORS, max_bytes=10**6) == [tmp_path / "model.safetensors"]
    assert not (tmp_path / INDEX).exists()
    assert same(load_file(tmp_path / "model.safetensors"), TENSORS)


def test_one_pending_tensor_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def make(value: float) -> torch.Tensor:
        nonlocal most
        tensor = torch.full((4,), value)
        made.append(weakref.ref(tensor))
        most = max(most, sum(one() is not None for one in made))
        return tensor

    tensors = {f"t{n}": Pending(torch.float32, (4,), lambda n=n: make(float(n))) for n in range(6)}
    write_shards(tmp_path, tensors, max_bytes=40)
    assert most == 1
    found = dict(every(tmp_path))
    assert same(found, {f"t{n}": torch.full((4,), float(n)) for n in range(6)})


def every(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in folder.glob("*.safetensors"):
        yield from load_file(file).items()


def test_a_pending_tensor_that_is_not_as_announced(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a"):
        write_tensors(tmp_path / "x.safetensors", [("a", Pending(torch.float32, (2,), lambda: torch.zeros(3)))])
    assert not list(tmp_path.iterdir())
