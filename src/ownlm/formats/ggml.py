"""ggml's block formats: the numbers of a row in blocks of 32 or 256, each block a few scales and a few bits per number.

    F32 F16 BF16                 plain numbers
    Q4_0 Q5_0 Q8_0               x = d q            one scale for 32 numbers
    Q4_1 Q5_1                    x = d q + m        a scale and a minimum for 32
    Q3_K Q6_K                    x = d s q          a scale s for 16 numbers, its unit d for 256
    Q2_K Q4_K Q5_K               x = d s q - e m    a scale s and a minimum m for 16 or 32, their units d and e for 256
    IQ4_NL IQ4_XS MXFP4          x = d table[q]     four bits choose from sixteen values

Beside each decoder stands the layout of its block; `name:bytes` in the order of the file. Decoding gives llama.cpp's
numbers bit for bit. `ggml_encode.py` is the other direction.

Shapes: N blocks, S bytes of a block, G numbers in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ownlm.errors import UserError
from ownlm.gguf import LAYOUTS

Decoder: TypeAlias = Callable[[Tensor], Tensor]
Whole: TypeAlias = tuple[Tensor, Tensor]  # scales (N, 1) float32 and whole numbers (N, G) int8
Affine: TypeAlias = tuple[
    Tensor, Tensor, Tensor
]  # scales and minimums (N, G / 32) float32, numbers of four bits (N, G) uint8
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
CHUNK = 2**18  # numbers decoded or encoded at a time: what is in between stays in the processor's cache

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the value, so that all are whole


@dataclass(frozen=True, slots=True)
class Blocks:
    """A tensor of a file as its bytes (uint8), whole blocks of `type`; `give_back(bytes)` is told how far decoding got."""

    type: str
    raw: Tensor
    shape: tuple[int, ...]
    give_back: Callable[[int], None] = lambda done: None

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return LAYOUTS[self.type].size

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> "Blocks":
        """Entries of the first dimension: one, or a run of them."""
        chosen = self.raw.view(len(self), -1)[rows]
        shape = self.shape[1:] if isinstance(rows, int) else (len(chosen), *self.shape[1:])
        return Blocks(self.type, chosen.flatten(), shape)

    def by_row(self, change: Callable[[Tensor], Tensor]) -> "Blocks":
        """The same with the rows of a matrix (O, …) changed: put into another order, padded with rows of zeros."""
        rows = change(self.raw.view(len(self), -1))
        return Blocks(self.type, rows.flatten(), (len(rows), *self.shape[1:]))

    def tensor(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Its numbers; a view of the bytes where they are plain and of that dtype already. UserError: a type that can't be
        read."""
        if self.type in PLAIN:
            # Bytes that begin at an odd address can't be looked at as wider numbers.
            aligned = self.raw.data_ptr() % PLAIN[self.type].itemsize == 0
            return (self.raw if aligned else self.raw.clone()).view(PLAIN[self.type]).view(self.shape).to(dtype)
        out = torch.empty(self.shape, dtype=dtype)
        self.into(out)
        return out

    def into(self, *outs: Tensor) -> None:
        """Decode into contiguous tensors that share the rows among them in this order, of any dtype, on any device, a chunk at
        a time."""
        if self.type not in DECODERS:
            raise UserError(
                f"tensors of type {self.type} can't be read.",
                cure=f"Known: {', '.join([*PLAIN, *DECODERS])}. Take another file of the model.",
            )
        layout, decode = LAYOUTS[self.type], DECODERS[self.type]
        blocks_NS, step = self.raw.view(-1, layout.size), CHUNK // layout.block
        first = 0
        for out in outs:
            out_NG = out.view(-1, layout.block)
            for at in range(0, len(out_NG), step):
                end = min(at + step, len(out_NG))
                out_NG[at:end] = decode(blocks_NS[first + at : first + end])
                self.give_back((first + end) * layout.size)
            first += len(out_NG)


def _half(bytes_N2: Tensor) -> Tensor:
    """(N, 1) float32 of the two bytes of a float16."""
    return bytes_N2.contiguous().view(torch.float16).float()


def _bits(raw_NS: Tensor, width: int, *, span: int) -> Tensor:
    """Numbers of `width` bits; within each run of `span` bytes first the lowest bits of all bytes, then the next ...
    `_bits([[0x21, 0x43]], 4, span=2)` is [[1, 3, 2, 4]]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
    runs = raw_NS.reshape(len(raw_NS), -1, 1, span)
    numbers: Tensor = (runs >> shifts) & (2**width - 1)
    return numbers.view(len(raw_NS), -1)


def _scaled(scales: Tensor, q_NG: Tensor) -> Tensor:
    """float32 (N, G): each scale times its share of the row of whole numbers."""
    numbers_NG = q_NG.float()  # a copy, always: q is bytes
    numbers_NG.view(len(q_NG), scales.shape[1], -1).mul_(scales[:, :, None])
    return numbers_NG


def _affine(scales: Tensor, minimums: Tensor, q_NG: Tensor) -> Tensor:
    """The same plus each minimum in its share of the row."""
    numbers_NG = _scaled(scales, q_NG)
    numbers_NG.view(len(q_NG), minimums.shape[1], -1).add_(minimums[:, :, None])
    return numbers_NG


# ── 32 numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Four-bit numbers q: byte i holds number i in its low and number i + 16 in its high half.


def q4_0(raw_NS: Tensor) -> Tensor:
    """d:2  q:16     x = d (q - 8)"""
    return _scaled(_half(raw_NS[:, :2]), _bits(raw_NS[:, 2:], 4, span=16).view(torch.int8) - 8)


def q4_1(raw_NS: Tensor) -> Tensor:
    """d:2  m:2  q:16     x = d q + m"""
    return _affine(*_affine_q4_1(raw_NS))


def _affine_q4_1(raw_NS: Tensor) -> Affine:
    return _half(raw_NS[:, :2]), _half(raw_NS[:, 2:4]), _bits(raw_NS[:, 4:], 4, span=16)


def _five(high: Tensor, low: Tensor) -> Tensor:
    """Five-bit numbers from their fifth bits (number i in bit i, lowest first) and their low four."""
    return _bits(low, 4, span=16) | _bits(high, 1, span=1) << 4


def q5_0(raw_NS: Tensor) -> Tensor:
    """d:2  fifth bits:4  q:16     x = d (q - 16)"""
    return _scaled(*_whole_q5_0(raw_NS))


def _whole_q5_0(raw_NS: Tensor) -> Whole:
    return _half(raw_NS[:, :2]), _five(raw_NS[:, 2:6], raw_NS[:, 6:]).view(torch.int8) - 16


def q5_1(raw_NS: Tensor) -> Tensor:
    """d:2  m:2  fifth bits:4  q:16     x = d q + m"""
    return _scaled(_half(raw_NS[:, :2]), _five(raw_NS[:, 4:8], raw_NS[:, 8:])).add_(_half(raw_NS[:, 2:4]))


def q8_0(raw_NS: Tensor) -> Tensor:
    """d:2  q:32, signed     x = d q"""
    return _scaled(_half(raw_NS[:, :2]), raw_NS[:, 2:].view(torch.int8))


def iq4_nl(raw_NS: Tensor) -> Tensor:
    """d:2  q:16     x = d IQ4_NL[q]"""
    return _scaled(*_whole_iq4_nl(raw_NS))


def _whole_iq4_nl(raw_NS: Tensor) -> Whole:
    return _half(raw_NS[:, :2]), _looked_up(IQ4_NL, _bits(raw_NS[:, 2:], 4, span=16))


def mxfp4(raw_NS: Tensor) -> Tensor:
    """e:1  q:16     x = 2^(e - 128) FP4[q]; an e of 0 counts as a half of 1"""
    return _scaled(*_whole_mxfp4(raw_NS))


def _whole_mxfp4(raw_NS: Tensor) -> Whole:
    return torch.exp2(raw_NS[:, :1].float() - 128), _looked_up(FP4, _bits(raw_NS[:, 1:], 4, span=16))


def _looked_up(table: tuple[int, ...], q_NG: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.int8)[q_NG.int()]


# ── 256 numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def q2_k(raw_NS: Tensor) -> Tensor:
    """s and m:16, four bits each  q:64, two bits, in two runs of 32 bytes  d:2  e:2     16 numbers share s and m"""
    scales, q_NG = raw_NS[:, :16], _bits(raw_NS[:, 16:80], 2, span=32)
    d, e = _half(raw_NS[:, 80:82]), _half(raw_NS[:, 82:84])
    return _affine(d * (scales & 15).float(), -(e * (scales >> 4).float()), q_NG)


def q3_k(raw_NS: Tensor) -> Tensor:
    """third bits:32  q:64, two bits, in two runs of 32 bytes  s:12, six bits  d:2     x = d (s - 32) (q - 4)

    The low four bits of the sixteen s stand in bytes 0-7 like four-bit numbers, their high two in bytes 8-11."""
    scales = _bits(raw_NS[:, 96:104], 4, span=8) | _bits(raw_NS[:, 104:108], 2, span=4) << 4
    q_NG = _bits(raw_NS[:, 32:96], 2, span=32) | _bits(raw_NS[:, :32], 1, span=32) << 2
    return _scaled(_half(raw_NS[:, 108:110]) * (scales.view(torch.int8) - 32).float(), q_NG.view(torch.int8) - 4)


def _scales_and_minimums(raw_N12: Tensor) -> tuple[Tensor, Tensor]:
    """Eight s and eight m of six bits: bytes 0-3 the first four s, 4-7 the first four m, 8-11 the low four bits of the
    last s and m; the high two bits of those stand above the first ones."""
    first_s, first_m, last = raw_N12[:, :4], raw_N12[:, 4:8], raw_N12[:, 8:]
    s = torch.cat([first_s & 63, (last & 15) | (first_s >> 6) << 4], 1)
    return s, torch.cat([first_m & 63, last >> 4 | (first_m >> 6) << 4], 1)


def q4_k(raw_NS: Tensor) -> Tensor:
    """d:2  e:2  s and m:12  q:128, four bits, in runs of 32 bytes     32 numbers share s and m"""
    return _affine(*_affine_q4_k(raw_NS))


def _affine_q4_k(raw_NS: Tensor) -> Affine:
    s, m = _scales_and_minimums(raw_NS[:, 4:16])
    d, e = _half(raw_NS[:, :2]), _half(raw_NS[:, 2:4])
    return d * s.float(), -(e * m.float()), _bits(raw_NS[:, 16:], 4, span=32)


def q5_k(raw_NS: Tensor) -> Tensor:
    """d:2  e:2  s and m:12  fifth bits:32  q:128, four bits, in runs of 32 bytes     32 numbers share s and m"""
    s, m = _scales_and_minimums(raw_NS[:, 4:16])
    d, e = _half(raw_NS[:, :2]), _half(raw_NS[:, 2:4])
    q_NG = _bits(raw_NS[:, 48:], 4, span=32) | _bits(raw_NS[:, 16:48], 1, span=32) << 4
    return _affine(d * s.float(), -(e * m.float()), q_NG)


def q6_k(raw_NS: Tensor) -> Tensor:
    """q:128, low four bits, in runs of 64 bytes  high two bits:64, in runs of 32  s:16, signed  d:2     x = d s (q - 32)"""
    q_NG = _bits(raw_NS[:, :128], 4, span=64) | _bits(raw_NS[:, 128:192], 2, span=32) << 4
    scales = _half(raw_NS[:, 208:]) * raw_NS[:, 192:208].view(torch.int8).float()
    return _scaled(scales, q_NG.view(torch.int8) - 32)


def iq4_xs(raw_NS: Tensor) -> Tensor:
    """d:2  high two bits of s:2  low four bits of s:4  q:128, in runs of 16 bytes     x = d (s - 32) IQ4_NL[q]"""
    low = _bits(raw_NS[:, 4:8], 4, span=1)
    scales = low | _bits(raw_NS[:, 2:4], 2, span=1) << 4
    return _scaled(
        _half(raw_NS[:, :2]) * (scales.view(torch.int8) - 32).float(),
        _looked_up(IQ4_NL, _bits(raw_NS[:, 8:], 4, span=16)),
    )


DECODERS: dict[str, Decoder] = {
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k,
    "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs, "MXFP4": mxfp4,
}  # fmt: skip

# Types whose numbers are whole ones times one scale for a block of 32.
WHOLE: dict[str, Callable[[Tensor], Whole]] = {"Q5_0": _whole_q5_0, "IQ4_NL": _whole_iq4_nl, "MXFP4": _whole_mxfp4}
# Types whose numbers are four bits times a scale for 32 of them, plus a minimum.
AFFINE: dict[str, Callable[[Tensor], Affine]] = {"Q4_1": _affine_q4_1, "Q4_K": _affine_q4_k}

assert all(CHUNK % LAYOUTS[type].block == 0 for type in DECODERS)
