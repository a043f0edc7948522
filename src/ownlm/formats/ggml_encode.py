"""Numbers into ggml's block formats, each with the smallest mean squared error we can find cheaply.

Where llama.cpp's own quantiser takes the scale that fits the largest number, or searches with weights that favour large
ones, we look for the least squares: from a few first scales, round, then take the scale that is best for those roundings
(a line fitted through the pairs), and once more. Q8_0 is the exception: it equals llama.cpp's bit for bit.

Shapes: N blocks, G numbers in each, K groups with a scale of their own, S bytes of a block.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from ownlm.errors import UserError
from ownlm.formats.ggml import CHUNK, PLAIN
from ownlm.gguf import LAYOUTS

Encoder: TypeAlias = Callable[[Tensor], Tensor]
HALF_ROUNDS = 0.49999997  # the number before 0.5: adding it and cutting off rounds halves away from zero, as C's roundf


def quantize(type: str, tensor: Tensor, *, where: str = "") -> Iterator[Tensor]:
    """The bytes (uint8) of a tensor in pieces, in order. Its rows must be whole blocks. UserError, naming `where`, for numbers
    that the type can't hold."""
    for chunk in torch.split(tensor.detach().reshape(-1), CHUNK):
        if type in PLAIN:
            plain = chunk.to(PLAIN[type]).contiguous()
            if not plain.isfinite().all():
                raise UserError(f"it holds a number that {type} can't.", where=where, cure="Take BF16 or F32.")
            yield plain.view(torch.uint8)
        else:
            if not chunk.isfinite().all():
                raise UserError("it holds a number that isn't finite: the model is broken.", where=where)
            yield ENCODERS[type](chunk.float().view(-1, LAYOUTS[type].block)).view(-1)


def _half(numbers_N1: Tensor) -> Tensor:
    """The two bytes of each number as a float16."""
    return numbers_N1.clamp(-65504, 65504).to(torch.float16).view(torch.uint8)


def _as_half(numbers: Tensor) -> Tensor:
    """The numbers as a float16 holds them."""
    return numbers.clamp(-65504, 65504).to(torch.float16).float()


def _inverse(numbers: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(numbers == 0, 0.0, 1.0 / numbers)


def _pack(q: Tensor, width: int, *, span: int) -> Tensor:
    """Bytes that hold numbers of `width` bits, the first `span` numbers lowest; the inverse of `ggml._bits`."""
    runs = q.to(torch.uint8).view(len(q), -1, 8 // width, span)
    packed = runs[:, :, 0].clone()
    for at in range(1, 8 // width):
        packed |= runs[:, :, at] << (at * width)
    return packed.view(len(q), -1)


# ── 32 numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def q8_0(x_NG: Tensor) -> Tensor:
    d_N1 = x_NG.abs().amax(1, keepdim=True) / 127
    y_NG = x_NG * _inverse(d_N1)
    q_NG = (y_NG + torch.full_like(y_NG, HALF_ROUNDS).copysign_(y_NG)).trunc_().to(torch.int8)
    return torch.cat([_half(d_N1), q_NG.view(torch.uint8)], 1)


def q4_0(x_NG: Tensor) -> Tensor:
    d_N1 = _symmetric(x_NG, 8, steps=Q4_STEPS)
    q_NG = (x_NG * _inverse(_as_half(d_N1))).round_().clamp_(-8, 7).add_(8)
    return torch.cat([_half(d_N1), _pack(q_NG, 4, span=16)], 1)


def q5_0(x_NG: Tensor) -> Tensor:
    d_N1 = _symmetric(x_NG, 16, steps=Q6_STEPS)
    q_NG = (x_NG * _inverse(_as_half(d_N1))).round_().clamp_(-16, 15).add_(16).to(torch.uint8)
    return torch.cat([_half(d_N1), _pack(q_NG >> 4, 1, span=1), _pack(q_NG & 15, 4, span=16)], 1)


def _symmetric(x_NG: Tensor, most: int, *, steps: tuple[float, ...]) -> Tensor:
    """(N, 1) scales d for x = d q with q from -most to most - 1.

    The number farthest from zero gets `-most`, plus each of `steps`: a scale that cuts it off may serve the others better."""
    peak_N1 = x_NG.gather(1, x_NG.abs().argmax(1, keepdim=True))
    best_N1, gain_N1 = torch.zeros_like(peak_N1), torch.zeros_like(peak_N1)
    for step in steps:
        d_N1 = peak_N1 / -(most + step)
        for _ in range(2):
            q_NG = (x_NG * _inverse(d_N1)).round_().clamp_(-most, most - 1)
            xq_N1, qq_N1 = (x_NG * q_NG).sum(1, keepdim=True), q_NG.square_().sum(1, keepdim=True)
            d_N1 = xq_N1 * _inverse(qq_N1)
        # The squared error is sum(x x) - this.
        new_N1 = d_N1 * xq_N1
        better_N1 = new_N1 > gain_N1
        best_N1, gain_N1 = torch.where(better_N1, d_N1, best_N1), torch.where(better_N1, new_N1, gain_N1)
    return best_N1


# ── 256 numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def q4_k(x_NG: Tensor) -> Tensor:
    units_N2, scales_N12, q_NG = _with_minimums(x_NG, 15)
    return torch.cat([units_N2, scales_N12, _pack(q_NG, 4, span=32)], 1)


def q5_k(x_NG: Tensor) -> Tensor:
    units_N2, scales_N12, q_NG = _with_minimums(x_NG, 31)
    q_NG = q_NG.to(torch.uint8)
    return torch.cat([units_N2, scales_N12, _pack(q_NG >> 4, 1, span=32), _pack(q_NG & 15, 4, span=32)], 1)


def q6_k(x_NG: Tensor) -> Tensor:
    x_NKg = x_NG.view(len(x_NG), 16, 16)
    scales_NK = _symmetric(x_NG.view(-1, 16), 32, steps=Q6_STEPS).view(-1, 16)
    d_N1 = _as_half(scales_NK.gather(1, scales_NK.abs().argmax(1, keepdim=True)) / -128)
    s_NK = (scales_NK * _inverse(d_N1)).round_().clamp_(-128, 127)
    q_NKg = (x_NKg * _inverse(d_N1 * s_NK)[:, :, None]).round_().clamp_(-32, 31)
    u_NG = (q_NKg * s_NK[:, :, None]).view_as(x_NG)
    d_N1 = _as_half((x_NG * u_NG).sum(1, keepdim=True) * _inverse(u_NG.square().sum(1, keepdim=True)))
    q_NKg = (x_NKg * _inverse(d_N1 * s_NK)[:, :, None]).round_().clamp_(-32, 31)
    q_NG = (q_NKg + 32).view_as(x_NG).to(torch.uint8)
    s_N16 = s_NK.to(torch.int8).view(torch.uint8)
    return torch.cat([_pack(q_NG & 15, 4, span=64), _pack(q_NG >> 4, 2, span=32), s_N16, _half(d_N1)], 1)


def _with_minimums(x_NG: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the bytes of d and e, those of s and m, q) for x = d s q - e m with q from 0 to `most`, 32 numbers sharing s and m."""
    x_NKg = x_NG.view(len(x_NG), 8, 32)
    scales_NK, minimums_NK = (found.view(-1, 8) for found in _affine(x_NG.view(-1, 32), most, steps=K_STEPS))
    d_N1, e_N1 = (_as_half(found.amax(1, keepdim=True) / 63) for found in (scales_NK, minimums_NK))
    s_NK = (scales_NK * _inverse(d_N1)).round_().clamp_(0, 63)
    m_NK = (minimums_NK * _inverse(e_N1)).round_().clamp_(0, 63)
    q_NKg = _rounded(x_NKg, d_N1 * s_NK, e_N1 * m_NK, most)
    for _ in range(2):
        # In turn the units, the minimums and the q that are best for the others.
        d_N1, e_N1 = _units(x_NKg, q_NKg, s_NK, m_NK, d_N1, e_N1)
        m_NK = ((d_N1 * s_NK * q_NKg.sum(2) - x_NKg.sum(2)) / 32 * _inverse(e_N1)).round_().clamp_(0, 63)
        q_NKg = _rounded(x_NKg, d_N1 * s_NK, e_N1 * m_NK, most)
    s, m = s_NK.to(torch.uint8), m_NK.to(torch.uint8)
    first = [low[:, :4] | (low[:, 4:] >> 4) << 6 for low in (s, m)]
    last = (s[:, 4:] & 15) | m[:, 4:] << 4
    return torch.cat([_half(d_N1), _half(e_N1)], 1), torch.cat([*first, last], 1), q_NKg.view_as(x_NG)


def _rounded(x_NKg: Tensor, scales_NK: Tensor, minimums_NK: Tensor, most: int) -> Tensor:
    """The whole numbers q that bring scale * q - minimum nearest to x."""
    inverse_NK = _inverse(scales_NK)
    return torch.addcmul((minimums_NK * inverse_NK)[:, :, None], x_NKg, inverse_NK[:, :, None]).round_().clamp_(0, most)


def _units(
    x_NKg: Tensor, q_NKg: Tensor, s_NK: Tensor, m_NK: Tensor, d_N1: Tensor, e_N1: Tensor
) -> tuple[Tensor, Tensor]:
    """The d and e, as float16 holds them, that are best for these q, s and m: two equations for each block."""
    xq_NK, q_NK = (x_NKg * q_NKg).sum(2), q_NKg.sum(2)
    xx, xm = (s_NK * xq_NK).sum(1, keepdim=True), -(m_NK * x_NKg.sum(2)).sum(1, keepdim=True)
    uu = (s_NK.square() * q_NKg.square().sum(2)).sum(1, keepdim=True)
    um, mm = -(s_NK * m_NK * q_NK).sum(1, keepdim=True), 32 * m_NK.square().sum(1, keepdim=True)
    det = uu * mm - um * um
    sound = det > 1e-6 * uu * mm
    inverse = _inverse(torch.where(sound, det, 0.0))
    d, e = (mm * xx - um * xm) * inverse, (uu * xm - um * xx) * inverse
    sound = sound & (d > 0) & (e > 0)
    return torch.where(sound, _as_half(d), d_N1), torch.where(sound, _as_half(e), e_N1)


def _affine(x_NG: Tensor, most: int, *, steps: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(N, 1) scales s and minimums m for x = s q - m with q from 0 to `most` and m from 0."""
    floor_N1 = x_NG.amin(1, keepdim=True).clamp_(max=0)
    span_N1 = x_NG.amax(1, keepdim=True) - floor_N1
    sum_N1, count = x_NG.sum(1, keepdim=True), x_NG.shape[1]
    gain_N1 = torch.full_like(floor_N1, -1.0)
    best_s_N1, best_b_N1 = torch.zeros_like(floor_N1), torch.zeros_like(floor_N1)
    for step in steps:
        s_N1, b_N1 = span_N1 / (most + step), floor_N1
        for _ in range(2):
            q_NG = ((x_NG - b_N1) * _inverse(s_N1)).round_().clamp_(0, most)
            q_N1, xq_N1 = q_NG.sum(1, keepdim=True), (x_NG * q_NG).sum(1, keepdim=True)
            qq_N1 = q_NG.square_().sum(1, keepdim=True)
            # The line s q + b through the pairs (q, x); through zero if it would start above, or if there is one q only.
            inverse_N1 = _inverse(count * qq_N1 - q_N1 * q_N1)
            b_N1 = (qq_N1 * sum_N1 - q_N1 * xq_N1) * inverse_N1
            b_N1 = torch.where(inverse_N1 > 0, b_N1, torch.where(qq_N1 > 0, 0.0, sum_N1 / count)).clamp_(max=0)
            s_N1 = torch.where(b_N1 < 0, (count * xq_N1 - sum_N1 * q_N1) * inverse_N1, xq_N1 * _inverse(qq_N1))
        # The squared error is sum(x x) - this.
        new_N1 = s_N1 * xq_N1 + b_N1 * sum_N1
        better_N1 = new_N1 > gain_N1
        gain_N1 = torch.where(better_N1, new_N1, gain_N1)
        best_s_N1, best_b_N1 = torch.where(better_N1, s_N1, best_s_N1), torch.where(better_N1, b_N1, best_b_N1)
    return best_s_N1, -best_b_N1


# How far beyond the largest q the farthest number would lie, for each first scale: measured on normal, Student (4 degrees of
# freedom), Laplace and uniform numbers; more of them gain less than half a per cent.
Q4_STEPS = (-1.8, -1.3, -0.8, -0.4, 0.1, 0.6)
Q6_STEPS = (-0.9, -0.4, 0.1, 0.6)
K_STEPS = (-1.5, -0.8, -0.2, 0.5)

ENCODERS: dict[str, Encoder] = {"Q8_0": q8_0, "Q4_0": q4_0, "Q5_0": q5_0, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
