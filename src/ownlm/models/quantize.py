"""Frozen linear layers kept as small integers, one scale for each group of a row (QLoRA's base, arXiv:2305.14314).

    int8   round(w / scale), scale = max|w| / 127 of the group          1 byte  + 4 / group bytes per weight
    int4   the nearest NF4 level of w / scale, scale = max|w|           ½ byte  + 4 / group bytes per weight

The weights are made again for each product and dropped after it, forward and backward; gradients flow to the input only.

Shapes: O outputs, I inputs, G groups of a row.
"""

import re
from statistics import NormalDist
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ownlm.models.blocks import MoE

Scheme = Literal["int8", "int4"]
GROUP = 64


def _normal_levels() -> tuple[float, ...]:
    """The 16 levels of NF4: quantiles of N(0, 1) scaled to [-1, 1], 8 below zero, zero, 7 above (appendix E of the paper)."""
    outermost = (1 - 1 / 30 + 1 - 1 / 32) / 2  # the quantile that stands for 1

    def quantiles(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [NormalDist().inv_cdf(outermost - step * index) for index in range(count)]

    below, above = quantiles(7), quantiles(8)
    top = above[0]
    return (*(-value / top for value in below), 0.0, *(value / top for value in reversed(above)))


NF4 = _normal_levels()


def quantize(weight_OI: Tensor, scheme: Scheme, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """(codes, scales): (O, I) int8, or (O, I / 2) uint8 with the even column in the low half; and (O, G) fp32.

    I is rounded up to whole groups, with zeros.
    """
    assert group % 2 == 0, group
    rows, columns = weight_OI.shape
    padded = F.pad(weight_OI.detach().float(), (0, -columns % group)).view(rows, -1, group)
    largest = padded.abs().amax(-1, keepdim=True)
    scales = largest / 127 if scheme == "int8" else largest
    unit = padded / scales.clamp(min=torch.finfo(torch.float32).tiny)
    if scheme == "int8":
        return unit.round().clamp(-127, 127).to(torch.int8).flatten(1), scales[..., 0]
    levels = unit.new_tensor(NF4)
    nearest = torch.bucketize(unit.flatten(1), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return nearest[:, ::2] | nearest[:, 1::2] << 4, scales[..., 0]


def dequantize(codes: Tensor, scales_OG: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """(O, columns): the weights that the codes stand for."""
    if codes.dtype == torch.uint8:
        levels = scales_OG.new_tensor(NF4, dtype=torch.float32)
        both = torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=-1)  # what each byte stands for
        unit = F.embedding(codes.int(), both)
    else:
        unit = codes.float()
    weight = unit.view(*scales_OG.shape, -1) * scales_OG.float().unsqueeze(-1)
    return weight.flatten(1)[:, :columns].to(dtype)


class QuantizedLinear(nn.Module):
    """A frozen nn.Linear in `scheme`; it computes in the dtype of x. (`.to(dtype)` would round its scales.)"""

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, scheme: Scheme, group: int = GROUP) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = linear.in_features, linear.out_features, scheme
        codes, scales = quantize(linear.weight, scheme, group)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(O, I)"""
        return dequantize(self.codes, self.scales, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class FrozenProduct(torch.autograd.Function):
    """x W' + b. Keeps the codes for the backward pass, where plain autograd would keep W itself until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized(grad.dtype), None


def linears(model: nn.Module, *, everywhere: bool = False) -> dict[str, nn.Module]:
    """The linear layers inside the model's blocks by name, or `everywhere` but for the language model's head, whose weight
    the loss reads by itself. Routers and stacked experts don't count."""
    routers = {f"{name}.gate" for name, module in model.named_modules() if isinstance(module, MoE)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
        and name not in routers
        and (re.search(r"\.\d+\.", name) or (everywhere and not name.endswith("lm_head")))
    }


def quantize_linears(model: nn.Module, scheme: Scheme, *, group: int = GROUP) -> None:
    """Replace the model's `linears` by quantised ones and freeze the rest of it.

    Embeddings, norms, heads, biases, routers and stacked experts keep their dtype. Each layer's old weight is let go of
    before the next is converted.
    """
    model.requires_grad_(False)
    for name in linears(model):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, QuantizedLinear(layer, scheme, group))
