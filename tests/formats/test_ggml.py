"""ggml's blocks: decoded bit for bit as the reference does, encoded with less error than llama.cpp's own quantiser."""

import gguf as reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ownlm.errors import UserError
from ownlm.formats import ggml
from ownlm.formats.ggml import Blocks
from ownlm.formats.ggml_encode import ENCODERS, quantize
from ownlm.gguf import LAYOUTS

Numbers = NDArray[np.float32]


def decoded_by_reference(type: str, raw: NDArray[np.uint8]) -> Numbers:
    with np.errstate(all="ignore"):
        rows = reference.dequantize(raw.reshape(-1, LAYOUTS[type].size), reference.GGMLQuantizationType[type])
    return np.asarray(rows, np.float32).reshape(-1)


def encoded(type: str, numbers: Numbers) -> NDArray[np.uint8]:
    return torch.cat(list(quantize(type, torch.from_numpy(numbers)))).numpy()


@pytest.mark.parametrize("type", ggml.DECODERS)
def test_decoding_equals_the_reference_bit_for_bit(type: str) -> None:
    """Random bytes hold every scale there is, infinite and not-a-number ones too."""
    raw = np.random.default_rng(0).integers(0, 256, (3000, LAYOUTS[type].size), np.uint8)
    shape = (3, 1000, LAYOUTS[type].block)
    ours = Blocks(type, torch.from_numpy(raw).view(-1), shape).tensor()
    assert ours.shape == shape
    theirs = torch.from_numpy(decoded_by_reference(type, raw)).view(shape)
    same = (ours.view(torch.int32) == theirs.view(torch.int32)) | (ours.isnan() & theirs.isnan())
    assert bool(same.all())
    half = Blocks(type, torch.from_numpy(raw).view(-1), shape).tensor(torch.bfloat16)
    assert torch.equal(half.nan_to_num(0.5), theirs.bfloat16().nan_to_num(0.5))


@pytest.mark.parametrize("type", ggml.PLAIN)
def test_plain_numbers(type: str) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[type]
    numbers = torch.randn(6, 4).to(dtype)
    raw = torch.cat(list(quantize(type, numbers)))
    assert torch.equal(Blocks(type, raw, (6, 4)).tensor(dtype), numbers)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), raw])[1:]  # bytes at an odd address
    assert torch.equal(Blocks(type, shifted, (6, 4)).tensor(), numbers.float())


@pytest.mark.parametrize("type", ["F16", "BF16"])
def test_plain_numbers_are_rounded_as_the_reference_rounds_them(type: str) -> None:
    numbers = np.random.default_rng(1).normal(size=4096).astype(np.float32)
    theirs = reference.quantize(numbers.reshape(-1, 32), reference.GGMLQuantizationType[type])
    assert np.array_equal(encoded(type, numbers), theirs.view(np.uint8).reshape(-1))


def test_a_type_that_cant_be_read() -> None:
    with pytest.raises(UserError, match=r"tensors of type IQ2_XXS can't be read. Known: F32.* Take another file"):
        Blocks("IQ2_XXS", torch.zeros(66, dtype=torch.uint8), (256,)).tensor()


# ── Encoding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def numbers(kind: str, count: int = 2**18) -> Numbers:
    random = np.random.default_rng(1)
    drawn = {
        "normal": lambda: random.normal(size=count),
        "heavy": lambda: random.standard_t(4, size=count),
        "uniform": lambda: random.uniform(-1, 1, size=count),
        "shifted": lambda: random.normal(size=count) + random.normal(size=count // 256).repeat(256),
    }[kind]()
    return (0.02 * drawn).astype(np.float32)


def relative_error(type: str, raw: NDArray[np.uint8], wanted: Numbers) -> float:
    """Mean squared error, by the reference's decoder, in units of the mean square."""
    found = decoded_by_reference(type, raw).astype(np.float64)
    return float(np.square(found - wanted).mean() / np.square(wanted.astype(np.float64)).mean())


# The same measure of ggml's own quantisers (`quantize_row_…_ref` of llama.cpp in llama-cpp-python 0.3.36) on these numbers.
GGML_ERRORS = {
    "Q4_0": {"normal": 7.4197e-3, "heavy": 1.3274e-2, "uniform": 4.2245e-3, "shifted": 5.7309e-3},
    "Q5_0": {"normal": 1.8337e-3, "heavy": 3.3117e-3, "uniform": 9.7110e-4, "shifted": 1.4300e-3},
    "Q4_K": {"normal": 5.1163e-3, "heavy": 7.4728e-3, "uniform": 2.9793e-3, "shifted": 2.5362e-3},
    "Q5_K": {"normal": 1.3070e-3, "heavy": 1.9096e-3, "uniform": 7.6169e-4, "shifted": 6.4923e-4},
    "Q6_K": {"normal": 3.1652e-4, "heavy": 5.1309e-4, "uniform": 1.8309e-4, "shifted": 2.5068e-4},
}


@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "shifted"])
@pytest.mark.parametrize("type", GGML_ERRORS)
def test_less_error_than_ggml(type: str, kind: str) -> None:
    wanted = numbers(kind)
    assert relative_error(type, encoded(type, wanted), wanted) < GGML_ERRORS[type][kind]


@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "shifted"])
def test_less_error_than_the_package(kind: str) -> None:
    wanted = numbers(kind)
    theirs = reference.quantize(wanted.reshape(-1, 32), reference.GGMLQuantizationType.Q4_0)
    assert relative_error("Q4_0", theirs, wanted) == pytest.approx(GGML_ERRORS["Q4_0"][kind], rel=1e-3)
    assert relative_error("Q4_0", encoded("Q4_0", wanted), wanted) < relative_error("Q4_0", theirs, wanted)


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32))
def test_q8_0_equals_the_reference_bit_for_bit(block: list[float]) -> None:
    wanted = np.array(block, np.float32)
    with np.errstate(all="ignore"):
        theirs = reference.quantize(wanted.reshape(1, 32), reference.GGMLQuantizationType.Q8_0)
    assert np.array_equal(encoded("Q8_0", wanted), theirs.reshape(-1))


def test_q8_0_rounds_halves_away_from_zero() -> None:
    wanted = np.array([127, *[n + 0.5 for n in range(-15, 16)]], np.float32)
    theirs = reference.quantize(wanted.reshape(1, 32), reference.GGMLQuantizationType.Q8_0)
    assert np.array_equal(encoded("Q8_0", wanted), theirs.reshape(-1))


@pytest.mark.parametrize("type", ENCODERS)
def test_numbers_on_the_grid_come_back(type: str) -> None:
    """What was decoded from blocks of moderate scales is encoded without loss, or nearly: the same numbers lie on other grids."""
    random = np.random.default_rng(2)
    raw = encoded(type, random.normal(size=256 * 64).astype(np.float32))
    wanted = decoded_by_reference(type, raw)
    assert relative_error(type, encoded(type, wanted), wanted) < {"Q8_0": 1e-12, "Q4_0": 1e-7, "Q5_0": 1e-7}.get(
        type, 2e-4
    )


@pytest.mark.parametrize("type", ENCODERS)
def test_strange_blocks(type: str) -> None:
    """Zeros, constants of either sign, one outlier, tiny and huge numbers: nothing is lost that the format can hold."""
    blocks = np.zeros((8, 256), np.float32)
    blocks[1], blocks[2] = 0.5, -0.5
    blocks[3, 17] = 3.0
    blocks[4, 200] = -3.0
    blocks[5] = 1e-12
    blocks[6] = np.linspace(0, 6e4, 256)
    blocks[7] = np.linspace(-1, 0, 256)
    found = decoded_by_reference(type, encoded(type, blocks.reshape(-1))).reshape(blocks.shape)
    assert not found[0].any()
    assert not found[5].any()  # below the smallest scale
    assert np.abs(found - blocks)[[1, 2, 3, 4]].max() < 4e-3
    assert np.abs(found - blocks)[6].max() < {"Q4_0": 4000, "Q5_0": 2000, "Q4_K": 2200}.get(type, 1100)
    assert np.abs(found - blocks)[7].max() < (0.07 if type == "Q4_0" else 0.04)


def test_numbers_that_a_type_cant_hold() -> None:
    with pytest.raises(UserError, match=r"w: it holds a number that F16 can't. Take BF16 or F32"):
        list(quantize("F16", torch.tensor([1e5]), where="w"))
    for number in (torch.nan, torch.inf):
        with pytest.raises(UserError, match=r"w: it holds a number that isn't finite"):
            list(quantize("Q4_K", torch.full((256,), number), where="w"))


@pytest.mark.parametrize("type", ENCODERS)
def test_pieces_are_the_whole(type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.from_numpy(numbers("normal", 2**14)).view(4, -1)
    whole = torch.cat(list(quantize(type, tensor)))
    monkeypatch.setattr("ownlm.formats.ggml_encode.CHUNK", 2**11)
    monkeypatch.setattr("ownlm.formats.ggml.CHUNK", 2**11)
    pieces = list(quantize(type, tensor))
    assert len(pieces) == 8
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(
        Blocks(type, whole, (2**14,)).tensor(), torch.from_numpy(decoded_by_reference(type, whole.numpy()))
    )
