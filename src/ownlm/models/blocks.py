"""The parts of a transformer block: their specs (frozen data) and their modules.

Shapes: B batch, T tokens, D hidden, H heads, K key/value heads, d head width, F feed-forward width.
Parameters carry Llama's Hugging Face names. Everything computes in the dtype of its weights; norms and softmax work in
fp32 inside.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ownlm.models.attention import Visibility, attend
from ownlm.models.cache import Address, KVCache

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False  # of q, k and v
    output_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotation (Qwen3)
    scale: float | None = None  # None: head_dim ** -0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a smooth step between them (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary positions in the half layout: dimension i of a head turns together with i + d/2 (arXiv:2104.09864)."""

    kind: Literal["rotary"] = "rotary"
    theta: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """One learned vector per position, added to the embedding; there are `DecoderConfig.max_tokens` of them."""

    kind: Literal["learned"] = "learned"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    size: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward share: rotation (…, 1, d), visibility, and the place in the cache."""

    cos: Tensor | None
    sin: Tensor | None
    visibility: Visibility
    cache: KVCache | None
    address: Address | None


def frequencies(rotary: Rotary, head_dim: int) -> Tensor:
    """Radians per position, fp32, shape (head_dim // 2,)."""
    freq = 1.0 / rotary.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    scaling = rotary.scaling
    if isinstance(scaling, LinearScaling):
        return freq / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_tokens * freq / (2 * math.pi)  # within the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * freq / scaling.factor + kept * freq
    return freq


def rotation(freq: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for `rotate`, each (…, 1, d); angles are formed in fp32 whatever the dtype."""
    angle = positions[..., None].float() * freq
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1).unsqueeze(-2), torch.cat([-sin, sin], -1).unsqueeze(-2)


def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its angle; `sin` comes with the sign of the first half turned."""
    return x_BTHd * cos + x_BTHd.roll(x_BTHd.shape[-1] // 2, -1) * sin


class RMSNormFunction(torch.autograd.Function):
    """F.rms_norm with a leaner gradient: its composite form on CPU takes about twice as long in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        size: Tensor = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        scale = (size * size / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, scale, weight)
        return (x32 * scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        # Mixed dtypes are slow within one operation on a CPU, so everything is made fp32 first.
        unit, grad, weight32 = x.float() * scale, grad.float(), weight.float()
        product = grad * unit
        dweight = product.flatten(0, -2).sum(0).to(weight.dtype)
        along = (product @ weight32).unsqueeze(-1) / x.shape[-1]
        return (grad * weight32).sub_(unit.mul_(along)).mul_(scale).to(x.dtype), dweight, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.device.type == "cpu":
            y: Tensor = RMSNormFunction.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return y
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def make_norm(size: int, norm: Norm) -> nn.Module:
    return RMSNorm(size, norm.eps) if norm.kind == "rms" else nn.LayerNorm(size, eps=norm.eps)


def project(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Each layer's output of the same x; in training as one GEMM, which also sums the gradient of x by itself."""
    if not torch.is_grad_enabled():
        return tuple(layer(x) for layer in layers)
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return torch.split(F.linear(x, weight, bias), [layer.out_features for layer in layers], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, attention: Attention, norm: Norm, layer: int) -> None:
        super().__init__()
        a = attention
        self.layer, self.head_dim = layer, a.head_dim
        self.scale = a.head_dim**-0.5 if a.scale is None else a.scale
        self.q_proj = nn.Linear(hidden_size, a.num_heads * a.head_dim, bias=a.bias)
        self.k_proj = nn.Linear(hidden_size, a.num_kv_heads * a.head_dim, bias=a.bias)
        self.v_proj = nn.Linear(hidden_size, a.num_kv_heads * a.head_dim, bias=a.bias)
        self.o_proj = nn.Linear(a.num_heads * a.head_dim, hidden_size, bias=a.output_bias)
        self.q_norm = RMSNorm(a.head_dim, norm.eps) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, norm.eps) if a.qk_norm else None

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        q, k, v = (
            y.view(*x_BTD.shape[:2], -1, self.head_dim) for y in project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if step.cos is not None and step.sin is not None:
            q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        if step.cache is not None and step.address is not None:
            keys, values = step.cache.update(self.layer, step.address, k, v)
        else:
            keys, values = k.transpose(1, 2), v.transpose(1, 2)
        y_BTHd = attend(q.transpose(1, 2), keys, values, step.visibility, self.scale)
        out: Tensor = self.o_proj(y_BTHd.flatten(2))
        return out


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, mlp: FeedForward) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[mlp.activation]
        self.gate_proj = nn.Linear(hidden_size, mlp.size, bias=mlp.bias) if mlp.gated else None
        self.up_proj = nn.Linear(hidden_size, mlp.size, bias=mlp.bias)
        self.down_proj = nn.Linear(mlp.size, hidden_size, bias=mlp.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            inner = self.activation(self.up_proj(x))
        else:
            gate, up = project(x, self.gate_proj, self.up_proj)
            inner = self.activation(gate) * up
        out: Tensor = self.down_proj(inner)
        return out


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # Primer, arXiv:2109.08668
}
