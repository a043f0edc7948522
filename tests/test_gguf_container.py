"""The GGUF container: llama.cpp's own writer and reader agree with ours, real files come back bit for bit, and no bytes
whatever get more than one clear error out of the reader."""

import errno
import os
import struct
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ownlm import gguf
from ownlm.errors import ArtifactError, NotFound, StorageFull

VOCABULARIES = Path(__file__).parents[2] / "shared" / "vectors" / "llama.cpp-vocab" / "models"
METADATA: dict[str, gguf.Value] = {
    "general.architecture": "llama",
    "general.alignment": np.uint32(64),
    "u8": np.uint8(255), "i8": np.int8(-128), "u16": np.uint16(65535), "i16": np.int16(-2), "u32": np.uint32(2**32 - 1),
    "i32": np.int32(-3), "u64": np.uint64(2**64 - 1), "i64": np.int64(-(2**63)), "f32": np.float32(1e-5), "f64": np.float64(0.1),
    "yes": np.bool_(True), "text": "ĠHellö\n", "empty": "",
    "texts": ["a", "", "日本"], "numbers": np.array([1.5, -2.0], np.float32), "flags": np.array([True, False]),
    "nothing": np.array([], np.int32), "nested": [np.array([1, 2], np.uint8), np.array([], np.uint8)], "deeper": [["a"], ["b", "c"]],
}  # fmt: skip


def source(
    name: str, array: np.ndarray[Any, Any], type: str, shape: tuple[int, ...] | None = None
) -> gguf.TensorSource:
    raw = array.reshape(-1).view(np.uint8)
    pieces: Callable[[], Iterable[np.ndarray[Any, Any]]] = lambda: (raw[at : at + 7] for at in range(0, len(raw), 7))
    return gguf.TensorSource(name=name, type=type, shape=shape or array.shape, pieces=pieces)


ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)
BLOCKS = np.random.default_rng(0).integers(0, 256, 2 * 34, np.uint8)
TENSORS = [
    source("a.weight", ROWS, "F32"),
    source("b", BLOCKS, "Q8_0", (1, 2, 32)),
    source("c", np.float16([1, 2]), "F16"),
]


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return (
        type(ours) is type(theirs)
        and np.array_equal(ours, theirs)
        and getattr(ours, "dtype", 0) == getattr(theirs, "dtype", 0)
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    gguf.write(tmp_path / "a.gguf", METADATA, TENSORS)
    found = gguf.read(tmp_path / "a.gguf")
    assert list(found.metadata) == list(METADATA)
    assert all(same(found.metadata[key], value) for key, value in METADATA.items())
    assert [(name, tensor.type, tensor.shape) for name, tensor in found.tensors.items()] == [
        ("a.weight", "F32", (2, 3)), ("b", "Q8_0", (1, 2, 32)), ("c", "F16", (2,)),
    ]  # fmt: skip
    data = {name: raw for name, raw, _ in gguf.stream(found)}
    assert np.array_equal(data["a.weight"].view(np.float32).reshape(2, 3), ROWS)
    assert np.array_equal(data["b"], BLOCKS)
    assert all(tensor.start % 64 == 0 for tensor in found.tensors.values())
    gguf.write(tmp_path / "b.gguf", found.metadata, TENSORS)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "b.gguf"]


def test_the_reference_reads_what_we_write(tmp_path: Path) -> None:
    plain = {key: value for key, value in METADATA.items() if key not in ("nested", "deeper", "nothing")}
    gguf.write(tmp_path / "a.gguf", plain, TENSORS)
    theirs = reference.GGUFReader(tmp_path / "a.gguf")
    for key, value in plain.items():
        expected = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
        assert theirs.fields[key].contents() == expected, key
    assert [tensor.name for tensor in theirs.tensors] == ["a.weight", "b", "c"]
    assert np.array_equal(theirs.tensors[0].data, ROWS)
    assert np.array_equal(theirs.tensors[1].data.reshape(-1), BLOCKS)


def test_we_read_what_the_reference_writes(tmp_path: Path) -> None:
    writer = reference.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("eps", 1e-6)
    writer.add_bool("flag", False)
    writer.add_array("texts", ["a", "b"])
    writer.add_array("ints", [1, -2])
    writer.add_tensor("rows", ROWS)
    writer.add_tensor("blocks", BLOCKS.reshape(2, 34), raw_dtype=reference.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf.read(tmp_path / "a.gguf")
    assert found.metadata["llama.block_count"] == 2
    assert found.metadata["texts"] == ["a", "b"]
    assert found.metadata["ints"].tolist() == [1, -2]  # type: ignore[union-attr]
    assert found.metadata["flag"] == np.False_
    assert found.tensors["blocks"].shape == (2, 32)
    data = {name: raw for name, raw, _ in gguf.stream(found)}
    assert np.array_equal(data["rows"].view(np.float32).reshape(2, 3), ROWS)


def test_layouts_are_those_of_the_reference() -> None:
    for theirs, (block, size) in reference.GGML_QUANT_SIZES.items():
        if theirs.name not in ("Q8_1", "Q8_K"):  # in memory only
            assert gguf.LAYOUTS[theirs.name] == gguf.Layout(theirs.value, block, size)


@pytest.mark.skipif(not VOCABULARIES.is_dir(), reason="needs ../shared/vectors/llama.cpp-vocab")
@pytest.mark.parametrize("name", ["bert-bge", "gpt-2", "llama-bpe", "llama-spm"])
def test_real_files_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    theirs = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    found = gguf.read(theirs)
    assert len(found.metadata["tokenizer.ggml.tokens"]) > 30_000  # type: ignore[arg-type]
    gguf.write(tmp_path / "again.gguf", found.metadata, [])
    assert (tmp_path / "again.gguf").read_bytes() == theirs.read_bytes()


# ── Damage and malice ────────────────────────────────────────────────────────────────────────────────────────────────

u32, u64 = (lambda n: struct.pack("<I", n)), (lambda n: struct.pack("<Q", n))


def text(value: bytes) -> bytes:
    return u64(len(value)) + value


def head(
    keys: bytes = b"", tensors: bytes = b"", *, num_keys: int = 0, num_tensors: int = 0, version: int = 3
) -> bytes:
    return b"GGUF" + u32(version) + u64(num_tensors) + u64(num_keys) + keys + tensors


def tensor(name: bytes = b"t", dims: tuple[int, ...] = (4,), type: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(type) + u64(offset)


def padded(data: bytes, more: int) -> bytes:
    return data + b"\0" * (-len(data) % 32 + more)


DEEP = text(b"k") + u32(9) + b"".join(u32(9) + u64(1) for _ in range(100_000))
HOSTILE = {
    "cut short": (head()[:20], "cut short"),
    "another file": (b"PK\x03\x04" + b"\0" * 60, "it is not GGUF"),
    "version 1": (head(version=1), "of version 1; ownlm reads versions 2 and 3"),
    "version 4": (head(version=4), "of version 4"),
    "big-endian": (head(version=3 << 24), "written for big-endian machines"),
    "more tensors than bytes": (head(num_tensors=2**60), "claims 1152921504606846976 tensors"),
    "more keys than bytes": (head(num_keys=2**63), "claims 9223372036854775808 keys"),
    "a string beyond the end": (head(u64(2**62) + b"k" * 40, num_keys=1), "claims 4611686018427387904 bytes where 40 are left"),
    "a string of 2^64-1": (head(u64(2**64 - 1) + b"k" * 40, num_keys=1), "claims 18446744073709551615 bytes"),
    "an array bomb": (head(text(b"k") + u32(9) + u32(10) + u64(2**61), num_keys=1), "header ends too early or claims"),
    "a string array bomb": (head(text(b"k") + u32(9) + u32(8) + u64(2**61) + b"x" * 99, num_keys=1), "values of type 8, which don't fit"),
    "a nesting bomb": (head(DEEP, num_keys=1), "k is nested too deep"),
    "an unknown value type": (head(text(b"k") + u32(13) + u64(0), num_keys=1), "k has type 13"),
    "a byte that is no truth": (head(text(b"k") + u32(7) + b"\2", num_keys=1), "neither true nor false"),
    "no UTF-8": (head(text(b"\xff\xfe") + u32(0) + b"\0", num_keys=1), "a key is not UTF-8"),
    "a key twice": (head((text(b"k") + u32(0) + b"\0") * 2, num_keys=2), "the key 'k' appears twice"),
    "an empty key": (head(text(b"") + u32(0) + b"\0", num_keys=1), "a key is empty"),
    "an odd alignment": (head(text(b"general.alignment") + u32(4) + u32(48), num_keys=1), "no"),
    "no alignment": (head(text(b"general.alignment") + u32(4) + u32(0), num_keys=1), "general.alignment"),
    "an alignment of another type": (head(text(b"general.alignment") + u32(8) + text(b"32"), num_keys=1), "general.alignment"),
    "a tensor twice": (padded(head(tensors=tensor() + tensor(offset=32), num_tensors=2), 64), "the tensor 't' appears twice"),
    "no name": (padded(head(tensors=tensor(b""), num_tensors=1), 64), "a tensor has no name"),
    "dimensions that overflow": (padded(head(tensors=tensor(dims=(2**32, 2**32, 2**32)), num_tensors=1), 64), "it is cut short"),
    "five dimensions": (padded(head(tensors=tensor(dims=(1,) * 5), num_tensors=1), 64), "t has 5 dimensions"),
    "four billion dimensions": (padded(head(tensors=text(b"t") + u32(2**32 - 1), num_tensors=1), 64), "t has 4294967295 dimensions"),
    "a dimension of zero": (padded(head(tensors=tensor(dims=(4, 0)), num_tensors=1), 64), "shape (0, 4)"),
    "half a block": (padded(head(tensors=tensor(dims=(48,), type=8), num_tensors=1), 64), "no rows of whole 32-blocks"),
    "an unknown tensor type": (padded(head(tensors=tensor(type=4), num_tensors=1), 64), "t has type 4"),
    "an offset beyond the end": (padded(head(tensors=tensor(offset=2**63), num_tensors=1), 64), "it is cut short"),
    "an offset in between": (padded(head(tensors=tensor(offset=8), num_tensors=1), 64), "no multiple of 32"),
    "overlap": (padded(head(tensors=tensor(b"t", (16,)) + tensor(b"u", (4,), 0, 32), num_tensors=2), 99), "tensors t and u overlap"),
    "tensors cut short": (padded(head(tensors=tensor(dims=(16,)), num_tensors=1), 63), "it is cut short"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_one_clear_error(name: str, tmp_path: Path) -> None:
    data, told = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ArtifactError) as raised:
        gguf.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(raised.value).startswith(f"{path}: ")
    assert told in str(raised.value)
    assert peak < 2**20 + 2 * len(data)


def test_a_header_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "HEADER_BYTES", 1000)
    path = tmp_path / "a.gguf"
    gguf.write(path, {"texts": ["x" * 50] * 40}, [])
    with pytest.raises(ArtifactError, match="its header takes more than 1000 bytes"):
        gguf.read(path)
    monkeypatch.undo()
    monkeypatch.setattr(gguf, "MAX_ITEMS", 39)
    with pytest.raises(ArtifactError, match="texts claims 40 values"):
        gguf.read(path)


def test_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.gguf", tmp_path, tmp_path / "pipe"):
        with pytest.raises(NotFound, match="there is no such file"):
            gguf.read(path)


def small() -> bytes:
    keys = {key: value for key, value in METADATA.items() if key != "general.alignment"}
    pieces = bytearray(head(num_keys=len(keys), num_tensors=2))
    for key, value in keys.items():
        pieces += text(key.encode()) + gguf._value(value)
    pieces += tensor(b"a", (3, 2)) + tensor(b"b", (32, 2), 8, 32)
    return padded(bytes(pieces), 32 + 68)


SMALL = small()
NUMBERS = [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, len(SMALL))]
EDITS = st.lists(
    st.tuples(
        st.integers(0, len(SMALL)),
        st.one_of(
            st.binary(max_size=12), st.sampled_from(NUMBERS), st.integers(0, 9).map(lambda n: u32(n) + u64(2**40 + n))
        ),
        st.sampled_from(["replace", "insert", "cut"]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_no_bytes_do_harm(edits: list[tuple[int, bytes, str]], tmp_path: Path) -> None:
    """Either one clear error, or a file whose tensors all lie inside it; never more memory than a small multiple of the file."""
    data = SMALL
    for at, new, how in edits:
        data = data[:at] + (new if how != "cut" else b"") + data[at + (len(new) if how != "insert" else 0) :]
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    fault = ""
    try:
        found = gguf.read(path)
        for name, raw, give_back in gguf.stream(found):
            give_back(len(raw) // 2)
            assert len(raw) == gguf.byte_size(found.tensors[name].type, found.tensors[name].shape)
            assert raw.sum(dtype=np.int64) >= 0
    except ArtifactError as error:
        fault = str(error)
    assert not fault or fault.startswith(f"{path}: ")
    assert len(fault) < 400 + len(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("data", [SMALL[:at] for at in range(0, len(SMALL), 7)])
def test_every_cut_is_noticed(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        gguf.read(path)


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    gguf.write(path, METADATA, TENSORS)
    before = path.read_bytes()

    def full() -> Iterable[np.ndarray[Any, Any]]:
        yield BLOCKS[:34]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageFull, match="the disk is full"):
        gguf.write(path, METADATA, [gguf.TensorSource(name="b", type="Q8_0", shape=(2, 32), pieces=full)])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_a_disk_too_small_is_noticed_first(tmp_path: Path) -> None:
    shape = (2**20, 2**30)
    with pytest.raises(StorageFull, match="are needed"):
        gguf.write(tmp_path / "a.gguf", {}, [gguf.TensorSource(name="t", type="F32", shape=shape, pieces=lambda: ())])
    assert not os.listdir(tmp_path)
