"""Weights kept in few bits: small integers, one scale (half precision) for each group of 32 inputs, or floats of 8 bits.

    int8   code * scale, code from -127 to 127       1 byte + ½ bit per weight, 8.5 bits in all; llama.cpp's Q8_0
    int4   (code - 8) * scale, code from 0 to 15     4.5 bits; llama.cpp's Q4_0
    uint4  code * scale + minimum, code as of int4   5 bits; llama.cpp's Q4_1, and what its Q4_K becomes (recode.py)
    nf4    NF4[code] * scale                         4.5 bits; the base of QLoRA (arXiv:2305.14314)
    fp8    code * scale, code a float8_e4m3fn        8 bits; one scale (float32) for a whole row (fp8.py)

`quantize` rounds to the nearest value; `gptq.py` chooses codes by what they do to the outputs. A model of these layers computes in
PyTorch by making the weights of a product again and dropping them after it, forward and backward; gradients flow to the input only.
The native kernels take codes and scales of int8, int4 and uint4 as they lie.

Shapes: O outputs, I inputs, G groups of a row (1 in fp8), P the bytes of its codes, E experts.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ownlm.formats.ggml import Blocks
from ownlm.models.blank import blank
from ownlm.models.blocks import Coded, MoE, Stack, gated
from ownlm.models.specs import FeedForward
from ownlm.quantization import fp8

Scheme = Literal["int8", "int4", "uint4", "nf4", "fp8"]
WHOLE_BYTES: dict[Scheme, torch.dtype] = {"int8": torch.int8, "fp8": fp8.E4M3}  # a code each; of the others two
GROUP = 32
LARGEST_HALF = 65_504.0


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
LEVELS: dict[Scheme, tuple[float, ...]] = {
    "int4": tuple(map(float, range(-8, 8))), "uint4": tuple(map(float, range(16))), "nf4": NF4,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A matrix, or a stack of them: codes (…, O, P), int8, float8_e4m3fn, or two of four bits in a uint8, the even column in the low half;
    scales (…, O, G) float16, in fp8 float32, and float16 minimums of uint4. I is rounded up to whole groups of 32, with zeros;
    `columns` is I."""

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    columns: int
    minimums: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(…, O, I), that of the weight."""
        return (*self.codes.shape[:-1], self.columns)

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by the names of `Quantized`'s buffers."""
        found = {"codes": self.codes, "scales": self.scales, "minimums": self.minimums}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> "Codes":
        return self.by_row(lambda tensor: tensor[rows])

    def by_row(self, change: Callable[[Tensor], Tensor]) -> "Codes":
        """The same with the rows of all its tensors changed."""
        minimums = None if self.minimums is None else change(self.minimums)
        return Codes(self.scheme, change(self.codes), change(self.scales), self.columns, minimums)

    def multiply(self, x: Tensor) -> bool:
        """Whether `product` is there for x: where x is, codes of this shape are multiplied as they lie, and nothing is trained."""
        fits = self.scheme == "fp8" and self.codes.shape[-2] % fp8.MULTIPLE == 0  # its columns are whole groups
        return fits and not torch.is_grad_enabled() and fp8.multiplies(x.device)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W' + b of a matrix."""
        return fp8.product(x, self.codes, self.scales, bias)

    def tensor(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(…, O, I): the weights that the codes stand for."""
        if self.scheme in WHOLE_BYTES:
            unit = self.codes.float()
        else:
            levels = torch.tensor(LEVELS[self.scheme], device=self.codes.device)
            both = torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=-1)  # what each byte stands for
            unit = F.embedding(self.codes.int(), both).flatten(-2)
        weight = unit.view(*self.scales.shape, unit.shape[-1] // self.scales.shape[-1])
        weight.mul_(self.scales.float().unsqueeze(-1))
        if self.minimums is not None:
            weight.add_(self.minimums.float().unsqueeze(-1))
        return weight.flatten(-2)[..., : self.columns].to(dtype)


def quantize(weight: Tensor, scheme: Scheme) -> Codes:
    """A weight (…, O, I) rounded to the nearest values. Of each group the number farthest from zero gets 127, or -8 in its own sign, as
    in llama.cpp's Q8_0 and Q4_0; in nf4 it gets 1 or -1. In uint4 the least gets 0 and the greatest 15. In fp8 the number farthest from
    zero in a row gets what serves the row best, from 224 to 448."""
    groups = in_groups(weight)
    if scheme == "uint4":
        least, most = groups.aminmax(dim=-1)
        scales, minimums = as_half((most - least) / 15), as_half(least)
        codes = rounded(groups - minimums.float().unsqueeze(-1), scales.float(), scheme)
        return packed(codes, scales, scheme, weight.shape[-1], minimums)
    if scheme == "fp8":
        groups = groups.flatten(-2).unsqueeze(-2)  # the row is one group
        scales = fp8.best_scales(groups)[..., 0]
    else:
        largest = groups.abs().amax(-1)
        if scheme == "int4":
            largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / -8
        scales = as_half(largest / 127 if scheme == "int8" else largest)
    return packed(rounded(groups, scales.float(), scheme), scales, scheme, weight.shape[-1])


def in_groups(weight: Tensor) -> Tensor:
    """(…, O, I) -> (…, O, G, GROUP) float32."""
    padded = F.pad(weight.detach().float(), (0, -weight.shape[-1] % GROUP))
    return padded.view(*weight.shape[:-1], -1, GROUP)


def as_half(scales: Tensor) -> Tensor:
    return scales.clamp(-LARGEST_HALF, LARGEST_HALF).half()


def nearest(units: Tensor, scheme: Scheme) -> Tensor:
    """The nearest of a scheme's numbers to numbers in units of their scale, as floats; not for nf4."""
    if scheme == "fp8":
        return fp8.nearest(units).float()
    low, high = LIMITS[scheme]
    return units.round().clamp_(low, high)


def rounded(numbers: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """The nearest whole numbers (of nf4: levels, counted; of fp8: floats of 8 bits) to groups (…, g) in units of their scales (…)."""
    units = numbers * torch.where(scales == 0, 0.0, 1.0 / scales).unsqueeze(-1)
    if scheme == "nf4":
        levels = units.new_tensor(NF4)
        return torch.bucketize(units, (levels[1:] + levels[:-1]) / 2).float() - 8
    return nearest(units, scheme)


def packed(numbers: Tensor, scales: Tensor, scheme: Scheme, columns: int, minimums: Tensor | None = None) -> Codes:
    """The codes of what `rounded` gave, (…, G, g), with their scales and minimums (…, G)."""
    flat = numbers.flatten(-2)
    if scheme in WHOLE_BYTES:
        return Codes(scheme, flat.to(WHOLE_BYTES[scheme]), scales, columns)
    codes = (flat if scheme == "uint4" else flat + 8).to(torch.uint8)
    return Codes(scheme, codes[..., ::2] | codes[..., 1::2] << 4, scales, columns, minimums)


def empty(scheme: Scheme, shape: tuple[int, ...]) -> Codes:
    """Room for the codes of a weight (…, O, I)."""
    *outer, columns = shape
    groups = -(-columns // GROUP)
    dtype = WHOLE_BYTES.get(scheme)
    codes = torch.empty(*outer, groups * GROUP // (2 if dtype is None else 1), dtype=dtype or torch.uint8)
    if scheme == "fp8":
        return Codes(scheme, codes, torch.empty(*outer, 1), columns)
    scales, minimums = torch.empty(2, *outer, groups, dtype=torch.float16)
    return Codes(scheme, codes, scales, columns, minimums if scheme == "uint4" else None)


class Quantized(Coded):
    """Codes, scales and minimums as buffers. (`.to(dtype)` would round the scales.) `blocks`: see checkpoints/unread.py."""

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None
    blocks: Blocks | None = None

    def __init__(self, kept: Codes) -> None:
        super().__init__()
        self.columns, self.scheme = kept.columns, kept.scheme
        self.register_buffer("codes", kept.codes)
        self.register_buffer("scales", kept.scales)
        self.register_buffer("minimums", kept.minimums)

    @property
    def kept(self) -> Codes:
        return Codes(self.scheme, self.codes, self.scales, self.columns, self.minimums)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.kept.tensor(dtype)

    def quick(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        kept = self.kept
        return partial(kept.product, bias=getattr(self, "bias", None)) if kept.multiply(x) else super().quick(x)


class QuantizedLinear(Quantized):
    """A frozen nn.Linear; it computes in the dtype of x."""

    def __init__(self, kept: Codes, bias: Tensor | None = None) -> None:
        super().__init__(kept)
        self.in_features, self.out_features = kept.columns, kept.codes.shape[-2]
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if (product := self.quick(x)) is not None:
            return product(x)
        y: Tensor = FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class FrozenProduct(torch.autograd.Function):
    """x W' + b. Keeps the codes for the backward pass, where plain autograd would keep W itself until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized(grad.dtype), None


class QuantizedEmbedding(Quantized):
    """A frozen nn.Embedding: of the table only the rows that are looked up are made, in float32."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.kept[ids].tensor()


class QuantizedStack(nn.Module):
    """A frozen `Stack`: its projections are (E, O, P); one expert is made whole at a time."""

    def __init__(self, kept: dict[str, Codes], spec: FeedForward, biases: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        for name, codes in kept.items():
            self.add_module(name, QuantizedEmbedding(codes))
        for name in kept:
            bias = biases.get(name)
            frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
            self.register_parameter(f"{name}_bias", frozen)

    def kept(self, name: str) -> Codes:
        part = getattr(self, name)
        assert isinstance(part, QuantizedEmbedding)
        return part.kept

    def linear(self, x: Tensor, name: str, expert: int) -> Tensor:
        bias, kept = getattr(self, f"{name}_bias"), self.kept(name)[expert]
        bias = None if bias is None else bias[expert]
        if kept.multiply(x):
            return kept.product(x, bias)
        return F.linear(x, kept.tensor(x.dtype), None if bias is None else bias.to(x.dtype))

    def forward(self, x_ND: Tensor, expert: int) -> Tensor:
        inner = gated(self.linear(x_ND, "gate_proj", expert), self.linear(x_ND, "up_proj", expert), self.spec)
        return self.linear(inner, "down_proj", expert)


def linears(model: nn.Module, *, everywhere: bool = False) -> dict[str, nn.Module]:
    """The linear layers inside the model's blocks by name, or `everywhere` but for those whose weight others read: the
    language model's head and the patches of images. Routers and stacked experts don't count."""
    routers = {f"{name}.gate" for name, module in model.named_modules() if isinstance(module, MoE)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
        and name not in routers
        and (re.search(r"\.\d+\.", name) or (everywhere and not name.endswith(("lm_head", "patches"))))
    }


def count_weights(model: nn.Module) -> int:
    """Parameters, and those that are kept in codes."""
    kept = [module.kept for module in model.modules() if isinstance(module, Quantized)]
    return sum(parameter.numel() for parameter in model.parameters()) + sum(math.prod(codes.shape) for codes in kept)


def quantize_linears(model: nn.Module, scheme: Scheme) -> None:
    """Replace the model's `linears` by quantised ones and freeze the rest of it, for an adapter to be trained on.

    Embeddings, norms, heads, biases, routers and stacked experts keep their dtype. Each layer's old weight is let go of
    before the next is converted.
    """
    model.requires_grad_(False)
    for name in linears(model):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, quantized(layer, lambda weight, _: quantize(weight, scheme)))


Quantize = Callable[[Tensor, str], Codes]  # a weight, and which part of its module it is: "" but for experts


def quantized(module: nn.Module, make: Quantize) -> nn.Module:
    """What stands in for a Linear, an Embedding or a Stack of experts, with the codes that `make` gives for its weights."""
    if isinstance(module, nn.Linear):
        return QuantizedLinear(make(module.weight, ""), module.bias)
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(make(module.weight, ""))
    assert isinstance(module, Stack), module
    names = ("gate_proj", "up_proj", "down_proj")
    biases = {name: bias for name in names if (bias := getattr(module, f"{name}_bias")) is not None}
    return QuantizedStack({name: make(getattr(module, name), name) for name in names}, module.spec, biases)


def plain(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module again whose weights are numbers: those that the codes stand for."""
    with blank():
        made: nn.Module
        if isinstance(module, QuantizedLinear):
            made = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        elif isinstance(module, QuantizedEmbedding):
            made = nn.Embedding(module.codes.shape[-2], module.columns)
        else:
            assert isinstance(module, QuantizedStack), module
            kept = module.kept("gate_proj")
            made = Stack(kept.columns, module.spec, len(kept.codes))
    weights = {name: bias.to(dtype) for name, bias in module.named_parameters()}
    if isinstance(module, QuantizedStack):
        weights |= {name: module.kept(name).tensor(dtype) for name in ("gate_proj", "up_proj", "down_proj")}
    else:
        weights["weight"] = module.dequantized(dtype)
    made.load_state_dict(weights, assign=True)
    return made


LIMITS: dict[Scheme, tuple[int, int]] = {"int8": (-127, 127), "int4": (-8, 7), "uint4": (0, 15)}
