"""Quantised blocks of GGUF files as codes of ours, which the kernels run.

    Q8_0 Q4_0 Q4_1         the same codes, scales and minimums
    Q5_0 IQ4_NL MXFP4      exactly: whole numbers from -127 to 127 with a scale for 32 of them, as int8
    Q4_K                   the same codes as uint4; its scales and minimums, products of a half and six bits, rounded to halves
    all others             rounded to the nearest int8, by at most 1/254 of the largest of 32 neighbours

Q4_K, Q5_K and Q6_K take 1.1, 1.5 and 1.3 times their place in the file then, Q2_K 3.2 times; float32 would take 4 to 12 times. The
kernels pack most types from the bytes of the file (cpu/blocks.h), to the same codes.
"""

from typing import Literal

import torch
from torch import Tensor

from ownlm.formats.ggml import AFFINE, DECODERS, WHOLE, Blocks
from ownlm.quantization.codes import GROUP, Codes, Scheme, as_half, empty, packed, quantize

EXACT = ("Q8_0", "Q4_0", "Q4_1", *WHOLE)
PIECE = 2**20  # numbers in float32 at a time


def scheme_of(type: str) -> Scheme:
    """The form of ours that blocks of a type become."""
    assert type in DECODERS, type
    return "int4" if type == "Q4_0" else "uint4" if type in AFFINE else "int8"


def recode(blocks: Blocks) -> Codes:
    """The codes of a matrix or a stack of them (…, O, I)."""
    if blocks.type in ("Q8_0", "Q4_0"):
        return from_blocks(blocks.type, blocks.raw, blocks.shape)  # type: ignore[arg-type]
    if (whole := exactly(blocks)) is not None:
        return whole
    made = empty(scheme_of(blocks.type), blocks.shape)
    flat = Blocks(blocks.type, blocks.raw, (made.codes.flatten(0, -2).shape[0], blocks.shape[-1]))
    step = max(1, PIECE // blocks.shape[-1])
    for at in range(0, len(flat), step):
        piece = flat[at : at + step]
        codes = affine(piece) if piece.type in AFFINE else quantize(piece.tensor(), made.scheme)
        for name, rows in codes.tensors().items():
            made.tensors()[name].flatten(0, -2)[at : at + step] = rows
    return made


def affine(blocks: Blocks) -> Codes:
    """uint4 of a matrix (O, I): scales and minimums beyond the range of half precision become its ends."""
    *both, numbers = AFFINE[blocks.type](blocks.raw.view(-1, blocks.size))
    scales, minimums = (as_half(each).view(len(blocks), -1) for each in both)
    return packed(numbers.view(*scales.shape, GROUP), scales, "uint4", blocks.shape[-1], minimums)


def exactly(blocks: Blocks) -> Codes | None:
    """int8 codes of the same values, or None where there are none."""
    if blocks.type not in WHOLE:
        return None
    scales, numbers = WHOLE[blocks.type](blocks.raw.view(-1, blocks.size))
    scales = scales.masked_fill((numbers == 0).all(-1, keepdim=True), 0.0)
    half = scales.half()
    if not bool(((half.float() == scales) | scales.isnan()).all()):  # MXFP4 beyond the range of half precision
        return None
    shape = blocks.shape
    return Codes("int8", numbers.view(shape), half.view(*shape[:-1], -1), shape[-1])


def widened(codes: Codes) -> Codes:
    """Four bits as int8: the same values of int4, the nearest of uint4."""
    if codes.scheme == "int8":
        return codes
    if codes.scheme == "uint4":
        return quantize(codes.tensor(), "int8")
    assert codes.scheme == "int4", codes.scheme
    both = torch.stack([codes.codes & 15, codes.codes >> 4], -1).flatten(-2)
    return Codes("int8", both.view(torch.int8) - 8, codes.scales, codes.columns)


def from_blocks(type: Literal["Q8_0", "Q4_0"], raw: Tensor, shape: tuple[int, ...]) -> Codes:
    """The bytes (uint8) of a tensor of ggml's blocks as codes: the same values, in our order of the four-bit numbers."""
    blocks = raw.view(*shape[:-1], shape[-1] // GROUP, -1)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    if type == "Q8_0":
        return Codes("int8", blocks[..., 2:].flatten(-2).view(torch.int8), scales, shape[-1])
    halves = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).flatten(-2)
    return Codes("int4", halves[..., ::2] | halves[..., 1::2] << 4, scales, shape[-1])
