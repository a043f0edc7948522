"""Blocks of GGUF files as codes: the same values where there are codes for them, else the nearest."""

import numpy as np
import pytest
import torch
from block_files import blocks

from ownlm.formats.ggml import AFFINE, DECODERS, Blocks
from ownlm.gguf import LAYOUTS
from ownlm.quantization.codes import GROUP, quantize
from ownlm.quantization.recode import EXACT, exactly, recode, scheme_of, widened

SHAPE = (24, 512)


def made(type: str, shape: tuple[int, ...] = SHAPE) -> Blocks:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return Blocks(type, torch.from_numpy(blocks(type, numbers)), shape)


@pytest.mark.parametrize("type", DECODERS)
def test_values(type: str) -> None:
    given = made(type)
    codes, wanted = recode(given), given.tensor()
    assert codes.scheme == scheme_of(type)
    assert codes.shape == SHAPE
    if type in EXACT:
        assert torch.equal(codes.tensor(), wanted)
        return
    if type == "Q4_K":
        scales, minimums, _ = AFFINE[type](given.raw.view(-1, given.size))
        for found, exact in ((codes.scales, scales), (codes.minimums, minimums)):
            assert found is not None
            assert bool(((found.view_as(exact) - exact).abs() <= 2**-11 * exact.abs()).all())
    # Half a step of 127, and what half precision leaves of the scale.
    largest = wanted.view(SHAPE[0], -1, GROUP).abs().amax(-1, keepdim=True)
    error = (codes.tensor() - wanted).view(SHAPE[0], -1, GROUP).abs()
    assert bool((error <= largest * (0.5 / 127 + 2**-11)).all())
    assert error.max() > 0


def test_blocks_of_nothing_are_exact_whatever_their_scale() -> None:
    given = made("MXFP4")
    raw = given.raw.clone().view(-1, 17)
    raw[3] = 0  # an exponent that half precision doesn't reach, of zeros
    assert exactly(Blocks("MXFP4", raw.flatten(), SHAPE)) is not None
    raw[4, 0] = 1  # of numbers
    assert exactly(Blocks("MXFP4", raw.flatten(), SHAPE)) is None
    again = recode(Blocks("MXFP4", raw.flatten(), SHAPE))
    error = (again.tensor() - Blocks("MXFP4", raw.flatten(), SHAPE).tensor()).abs()
    assert error.max() <= 0.01 * given.tensor().abs().max()


def q4_k(d: float, e: float, s: int, m: int, q: int) -> Blocks:
    """A row of 256 equal numbers d s q - e m, for s and m below 16."""
    units = torch.tensor([d, e]).half().view(torch.uint8)
    shared = torch.tensor([s] * 4 + [m] * 4 + [m << 4 | s] * 4, dtype=torch.uint8)
    raw = torch.cat([units, shared, torch.full((128,), q << 4 | q, dtype=torch.uint8)])
    return Blocks("Q4_K", raw, (1, 256))


def test_the_ends_of_half_precision() -> None:
    """Products of a half and a whole number are never too small for a half; those beyond it become its largest."""
    least = 2.0**-24
    tiny = q4_k(least, 3 * least, 5, 7, 9)
    assert tiny.tensor()[0, 0] == (5 * 9 - 3 * 7) * least
    assert torch.equal(recode(tiny).tensor(), tiny.tensor())
    huge = recode(q4_k(60_000, 60_000, 2, 3, 1))
    assert huge.scales.unique().item() == 65_504
    assert huge.minimums is not None
    assert huge.minimums.unique().item() == -65_504
    assert recode(q4_k(torch.nan, 1, 1, 1, 1)).tensor().isnan().all()


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K"])
def test_a_stack_is_its_matrices(type: str) -> None:
    stack = made(type, (3, 8, 256))
    whole = recode(stack)
    for index in range(3):
        one = recode(stack[index])
        assert all(torch.equal(tensor, one.tensors()[name]) for name, tensor in whole[index].tensors().items())


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q6_K"])
def test_rows_change_places_without_loss(type: str) -> None:
    given = made(type)
    order = torch.from_numpy(np.random.default_rng(0).permutation(SHAPE[0]))
    assert torch.equal(given.by_row(lambda rows: rows[order]).tensor(), given.tensor()[order])
    assert torch.equal(given[5:9].tensor(), given.tensor()[5:9])
    assert torch.equal(given[5].tensor(), given.tensor()[5])
    padded = given.by_row(lambda rows: torch.nn.functional.pad(rows, (0, 0, 0, 2)))
    assert torch.equal(padded.tensor()[-2:], torch.zeros(2, SHAPE[1]))
    assert padded.shape == (26, 512)


def test_four_bits_as_eight() -> None:
    codes = quantize(torch.randn(5, 70, generator=torch.Generator().manual_seed(0)), "int4")
    wide = widened(codes)
    assert wide.scheme == "int8"
    assert torch.equal(wide.tensor(), codes.tensor())
    assert widened(wide) is wide


def test_four_bits_with_a_minimum_as_eight() -> None:
    codes = quantize(torch.randn(5, 70, generator=torch.Generator().manual_seed(0)), "uint4")
    assert torch.equal(widened(codes).tensor(), quantize(codes.tensor(), "int8").tensor())


def test_which_types_are_exact() -> None:
    assert set(EXACT) == {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "IQ4_NL", "MXFP4"}
    assert {type for type in DECODERS if scheme_of(type) == "uint4"} == {"Q4_1", "Q4_K"}
    assert all(LAYOUTS[type].block == GROUP for type in EXACT)
