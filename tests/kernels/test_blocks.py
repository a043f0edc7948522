"""Blocks of GGUF packed from their bytes: the products of the codes that PyTorch makes of them, bit by bit, whatever they hold."""

import numpy as np
import pytest
import torch
from block_files import blocks
from torch import Tensor

from ownlm.formats.ggml import Blocks
from ownlm.gguf import LAYOUTS
from ownlm.kernels import library
from ownlm.kernels.linear import LANES, Product, teams
from ownlm.kernels.native import KINDS
from ownlm.kernels.sources import BLOCKS, Kind, kept_kind
from ownlm.quantization.codes import Codes, quantize
from ownlm.quantization.recode import recode, widened

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")
ROWS, COLUMNS = 1000, 256


class Packed(Product):
    """The product of blocks, in place of codes."""

    def __init__(self, given: Blocks, kind: Kind) -> None:
        found = library.library()
        assert found is not None
        self._lib, self.outputs, self.padded = found, len(given), -(-len(given) // LANES) * LANES
        name, shape = library.instruction_set().encode(), (teams()[1], KINDS[kind], len(given), given.shape[1])
        self.handle = found.ownlm_linear_new(name, *shape, BLOCKS[given.type], given.raw.data_ptr(), None, None, None)


def usual(type: str) -> Blocks:
    numbers = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02
    return Blocks(type, torch.from_numpy(blocks(type, numbers)), (ROWS, COLUMNS))


def hostile(type: str) -> Blocks:
    """Bytes by chance: scales of every size, infinite and not-a-number ones too, and minimums without any sense."""
    layout = LAYOUTS[type]
    raw = np.random.default_rng(0).integers(0, 256, ROWS * COLUMNS // layout.block * layout.size, np.uint8)
    return Blocks(type, torch.from_numpy(raw), (ROWS, COLUMNS))


def same(ours: Tensor, theirs: Tensor) -> None:
    equal = (ours == theirs) | (ours.isnan() & theirs.isnan())
    assert bool(equal.all()), f"{int((~equal).sum())} of {equal.numel()} differ"


X = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("made", [usual, hostile])
@pytest.mark.parametrize("type", BLOCKS)
def test_the_products_of_recoded_blocks(type: str, made: type) -> None:
    given = made(type)
    y = Packed(given, kept_kind(given))(X)
    same(y, Product(recode(given))(X))
    # What has a number that is none is so as a whole; all else is finite.
    lost = given.tensor().isnan().any(1)
    assert bool(y.isnan()[:, lost].all())
    assert int(y.isfinite().all(0).sum()) > 0.4 * ROWS
    assert bool(lost.any()) == (made is hostile)


@pytest.mark.parametrize("made", [usual, hostile])
@pytest.mark.parametrize("type", [type for type in BLOCKS if kept_kind(usual(type)) != "int8"])
def test_blocks_of_four_bits_beside_others(type: str, made: type) -> None:
    """As int8: the same values of Q4_0, the nearest of those with a minimum."""
    given = made(type)
    same(Packed(given, "int8")(X), Product(widened(recode(given)))(X))


@pytest.mark.parametrize("scheme", ["int8", "int4", "uint4"])
def test_numbers_that_are_none(scheme: str) -> None:
    """The kernels' own rounding beside that of PyTorch: what is too large is the largest there is, NaN stays."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight[3, 40], weight[5, 0], weight[7] = torch.nan, torch.inf, 1e38
    weight[9, :32], weight[11, 33] = 0, -torch.inf
    codes: Codes = quantize(weight, scheme)  # type: ignore[arg-type]
    found = library.library()
    assert found is not None
    product = Product(codes)
    product.handle = found.ownlm_linear_new(
        library.instruction_set().encode(), 1, KINDS[codes.scheme], 64, 96, 0, weight.data_ptr(), None, None, None
    )
    same(product(X[:, :96]), Product(codes)(X[:, :96]))
    assert product(X[:, :96])[:, 3].isnan().all()
