"""Quantised blocks of GGUF files as codes of ours, which the kernels run.

    Q8_0 Q4_0              the same codes and scales; the kernels read them as they lie in the file
    Q5_0 IQ4_NL MXFP4      exactly: whole numbers from -127 to 127 with a scale for 32 of them, as int8
    all others             rounded to the nearest int8, by at most 1/254 of the largest of 32 neighbours

Q4_K, Q5_K and Q6_K take 1.9, 1.5 and 1.3 times their place in the file then, Q2_K 3.2 times; float32 would take 4 to 12 times.
"""

from typing import Literal

import torch
from torch import Tensor

from ownlm.formats.ggml import DECODERS, WHOLE, Blocks
from ownlm.quantization.codes import GROUP, Codes, Scheme, empty, quantize

EXACT = ("Q8_0", "Q4_0", *WHOLE)
PIECE = 2**20  # numbers in float32 at a time


def scheme_of(type: str) -> Scheme:
    """The form of ours that blocks of a type become."""
    assert type in DECODERS, type
    return "int4" if type == "Q4_0" else "int8"


def recode(blocks: Blocks) -> Codes:
    """The codes of a matrix or a stack of them (…, O, I)."""
    if blocks.type in ("Q8_0", "Q4_0"):
        return from_blocks(blocks.type, blocks.raw, blocks.shape)  # type: ignore[arg-type]
    if (whole := exactly(blocks)) is not None:
        return whole
    made = empty(scheme_of(blocks.type), blocks.shape)
    codes, scales = made.codes.flatten(0, -2), made.scales.flatten(0, -2)
    flat = Blocks(blocks.type, blocks.raw, (len(codes), blocks.shape[-1]))
    step = max(1, PIECE // blocks.shape[-1])
    for at in range(0, len(codes), step):
        piece = quantize(flat[at : at + step].tensor(), made.scheme)
        codes[at : at + step], scales[at : at + step] = piece.codes, piece.scales
    return made


def exactly(blocks: Blocks) -> Codes | None:
    """int8 codes of the same values, or None where there are none."""
    if blocks.type not in WHOLE:
        return None
    scales, numbers = WHOLE[blocks.type](blocks.raw.view(-1, blocks.size))
    scales = scales.masked_fill((numbers == 0).all(-1, keepdim=True), 0.0)
    half = scales.half()
    if not torch.equal(half.float(), scales):  # MXFP4 beyond the range of half precision
        return None
    shape = blocks.shape
    return Codes("int8", numbers.view(shape), half.view(*shape[:-1], -1), shape[-1])


def widened(codes: Codes) -> Codes:
    """int4 as int8: the same values."""
    if codes.scheme == "int8":
        return codes
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
