"""Blocks of GGUF files as codes: the same values where there are codes for them, else the nearest."""

import numpy as np
import pytest
import torch
from block_files import blocks

from ownlm.formats.ggml import DECODERS, Blocks
from ownlm.gguf import LAYOUTS
from ownlm.quantization.codes import GROUP, quantize
from ownlm.quantization.recode import EXACT, exactly, recode, widened

SHAPE = (24, 512)


def made(type: str, shape: tuple[int, ...] = SHAPE) -> Blocks:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return Blocks(type, torch.from_numpy(blocks(type, numbers)), shape)


@pytest.mark.parametrize("type", DECODERS)
def test_values(type: str) -> None:
    given = made(type)
    codes, wanted = recode(given), given.tensor()
    assert codes.scheme == ("int4" if type == "Q4_0" else "int8")
    assert codes.shape == SHAPE
    if type in EXACT:
        assert torch.equal(codes.tensor(), wanted)
        return
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


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K"])
def test_a_stack_is_its_matrices(type: str) -> None:
    stack = made(type, (3, 8, 256))
    whole = recode(stack)
    for index in range(3):
        one = recode(stack[index])
        assert torch.equal(whole[index].codes, one.codes)
        assert torch.equal(whole[index].scales, one.scales)


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


def test_which_types_are_exact() -> None:
    assert set(EXACT) == {"Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "MXFP4"}
    assert all(LAYOUTS[type].block == GROUP for type in EXACT)
