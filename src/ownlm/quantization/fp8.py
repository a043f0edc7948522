"""Numbers as float8_e4m3fn (4 bits of exponent, 3 of fraction, none infinite), with a scale for each row in float32.

The form of weights in compressed-tensors' FP8 checkpoints, and what GPUs from Ada and Hopper on multiply (`torch._scaled_mm`, scaled by
rows). There activations are rounded to it too, each row as it comes.

Shapes: R rows, O outputs, I inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SCALES_TRIED = 8
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # that of a row of zeros
MULTIPLE = 16  # of both sides of a matrix in `torch._scaled_mm`
CAPABILITY = (8, 9)  # Ada's; Hopper's is 9.0


def row_scales(x: Tensor) -> Tensor:
    """(…, I) -> (…, 1) float32: what makes 448 of the number farthest from zero."""
    return (x.abs().amax(-1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST_SCALE)


def best_scales(weight: Tensor) -> Tensor:
    """(…, I) -> (…, 1) float32: of some from `row_scales` to twice that, the one with the smallest sum of squared errors. Floats are as
    fine at one scale as at another; what differs is where the row's numbers lie between two powers of two."""
    first = best = row_scales(weight)
    least = torch.full_like(first, torch.inf)
    for step in range(SCALES_TRIED):
        scales = first * 2 ** (step / SCALES_TRIED)
        errors = nearest(weight * (1 / scales)).float().mul_(scales).sub_(weight).square_().sum(-1, keepdim=True)
        best, least = torch.where(errors < least, scales, best), torch.minimum(errors, least)
    return best


def nearest(units: Tensor) -> Tensor:
    """Numbers in units of their scale as E4M3; what lies beyond 448 becomes that."""
    return units.clamp(-LARGEST, LARGEST).to(E4M3)


def multiplies(device: torch.device) -> bool:
    """Whether a device multiplies E4M3 as it lies."""
    return (
        device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= CAPABILITY
    )


def product(x: Tensor, codes_OI: Tensor, scales_O1: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b for x (…, I) of any floating dtype, which is also the answer's: rows of x rounded to E4M3, their products added up in
    float32, the sum in bfloat16. O and the columns of the codes are multiples of 16; x may have fewer columns."""
    rows_RI = F.pad(x.flatten(0, -2), (0, codes_OI.shape[1] - x.shape[-1]))
    scales_R1 = row_scales(rows_RI)
    y_RO = torch._scaled_mm(
        nearest(rows_RI.float() / scales_R1),
        codes_OI.t(),
        scale_a=scales_R1,
        scale_b=scales_O1.t(),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
    )
    return y_RO.view(*x.shape[:-1], len(codes_OI)).to(x.dtype)


def reference(x: Tensor, codes_OI: Tensor, scales_O1: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `product` gives, by numbers in float32 on any device."""
    scales = row_scales(x)
    rounded = nearest(x.float() / scales).float() * scales
    weight_OI = (codes_OI.float() * scales_O1)[:, : x.shape[-1]]
    return F.linear(rounded, weight_OI, None if bias is None else bias.float()).to(x.dtype)
