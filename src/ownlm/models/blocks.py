"""The modules of a transformer block; what they are made to is told by the frozen data of specs.py.

Shapes: B batch, T tokens, D hidden, H heads, K key/value heads, d head width, F feed-forward width.
Parameters carry Llama's Hugging Face names. Everything computes in the dtype of its weights; norms and softmax work in
fp32 inside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ownlm.models.attention import Visibility, attend
from ownlm.models.cache import Place
from ownlm.models.rotary import rotate
from ownlm.models.specs import Activation, Attention, Experts, FeedForward, Layer, Norm, Rotary


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward share: the rotations (…, 1, d), what is seen in each window or, with a cache, the place in it;
    scores added by position, and for layers that read another stack's output its keys and values, layer by layer."""

    rotations: Mapping[Rotary, tuple[Tensor, Tensor]]
    visibility: Mapping[int | None, Visibility]
    place: Place | None = None
    bias_BHTS: Tensor | None = None
    source: Sequence[tuple[Tensor, Tensor]] = ()
    source_visibility: Visibility | None = None


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
    """x / rms(x) * (weight + offset) over the last dimension (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.full((size,), 1.0 - offset)), eps, offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        if torch.is_grad_enabled() and x.device.type == "cpu":
            y: Tensor = RMSNormFunction.apply(x, weight, self.eps)  # type: ignore[no-untyped-call]
            return y
        return F.rms_norm(x, weight.shape, weight, self.eps)


def make_norm(size: int, norm: Norm) -> nn.Module:
    return RMSNorm(size, norm.eps, norm.offset) if norm.kind == "rms" else nn.LayerNorm(size, eps=norm.eps)


def project(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Each layer's output of the same x; in training as one GEMM, which also sums the gradient of x by itself.

    Layers that are more than their weight (adapted, quantised) compute for themselves.
    """
    if not torch.is_grad_enabled() or any(type(layer) is not nn.Linear for layer in layers):
        return tuple(layer(x) for layer in layers)
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return torch.split(F.linear(x, weight, bias), [layer.out_features for layer in layers], dim=-1)


class Coded(nn.Module):
    """A Linear's weight or an Embedding's table kept in codes (quantization/). `product` is what multiplies by it in PyTorch's place where
    nothing is trained, on the CPU (kernels/linear.py)."""

    product: Callable[[Tensor], Tensor] | None = None

    def quick(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What multiplies by the codes without making the numbers again, where there is that for x and nothing is trained: x W' + b."""
        return self.product if x.device.type == "cpu" and not torch.is_grad_enabled() else None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(O, I): the numbers that the codes stand for, made on the spot."""
        raise NotImplementedError


def matrix(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """(O, I): the weight of a Linear or an Embedding, in codes or not."""
    weight: Any = module.dequantized(dtype) if isinstance(module, Coded) else module.weight
    return weight  # type: ignore[no-any-return]


def read_out(hidden: Tensor, head: nn.Module, bias: Tensor | None = None) -> Tensor:
    """(…, D) -> (…, V): hidden states through a head without a bias of its own, a Linear or an Embedding, in codes or not."""
    product = head.quick(hidden) if isinstance(head, Coded) else None
    if product is None:
        return F.linear(hidden, matrix(head, hidden.dtype), bias)
    return product(hidden) if bias is None else product(hidden) + bias


def projections(hidden_size: int, a: Attention) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Into queries, keys and values, and out of the heads."""
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    q, k, v = (nn.Linear(hidden_size, width, bias=a.bias) for width in (queries, keys, keys))
    return q, k, v, nn.Linear(queries, hidden_size, bias=a.output_bias)


class SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, layer: Layer, index: int) -> None:
        super().__init__()
        self.spec, self.rotary, self.index = layer.attention, layer.rotary, index
        a = layer.attention
        self.scale = a.head_dim**-0.5 if a.scale is None else a.scale
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections(hidden_size, a)
        self.q_norm, self.k_norm = (
            RMSNorm(a.head_dim, layer.norm.eps, layer.norm.offset) if a.qk_norm else None for _ in range(2)
        )
        self.sinks = nn.Parameter(torch.zeros(a.num_heads)) if a.sinks else None

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        q, k, v = (
            y.view(*x_BTD.shape[:2], -1, self.spec.head_dim)
            for y in project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            turn = step.rotations[self.rotary]
            q, k = rotate(q, *turn), rotate(k, *turn)
        if step.place is None:
            seen = step.visibility[self.spec.window]
            y_BTHd = self._attend(q, k.transpose(1, 2), v.transpose(1, 2), seen, step.bias_BHTS)
        else:
            read = step.place.update(self.index, k, v, self.spec.window)
            parts = [self._attend(q[rows], keys, values, seen, step.bias_BHTS) for rows, keys, values, seen in read]
            y_BTHd = parts[0] if len(parts) == 1 else torch.cat(parts)
        out: Tensor = self.o_proj(y_BTHd.flatten(2))
        return out

    def _attend(
        self, q_BTHd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, seen: Visibility, bias_BHTS: Tensor | None
    ) -> Tensor:
        q_BHTd, cap = q_BTHd.transpose(1, 2), self.spec.softcap
        return attend(q_BHTd, k_BKSd, v_BKSd, seen, self.scale, softcap=cap, sinks_H=self.sinks, bias_BHTS=bias_BHTS)


class CrossAttention(nn.Module):
    """Attention over what another stack has read (arXiv:1706.03762, 3.2.3), without positions."""

    def __init__(self, hidden_size: int, layer: Layer, index: int) -> None:
        super().__init__()
        a = layer.attention
        self.spec, self.index = a, index
        self.scale = a.head_dim**-0.5 if a.scale is None else a.scale
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections(hidden_size, a)

    def read(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (B, K, S, d) of a source, the same for every query."""
        k, v = project(memory_BSD, self.k_proj, self.v_proj)
        return self._by_head(k), self._by_head(v)

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        assert step.source_visibility is not None
        q_BHTd = self._by_head(self.q_proj(x_BTD))
        y_BTHd = attend(q_BHTd, *step.source[self.index], step.source_visibility, self.scale)
        out: Tensor = self.o_proj(y_BTHd.flatten(2))
        return out

    def _by_head(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.view(*x_BTD.shape[:2], -1, self.spec.head_dim).transpose(1, 2)


def gated(gate: Tensor, up: Tensor, spec: FeedForward) -> Tensor:
    """act(gate) * up, with the limits and the offset of the spec."""
    if spec.limit is not None:
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    if spec.up_offset:
        up = up + spec.up_offset
    return ACTIVATIONS[spec.activation](gate) * up


class MLP(nn.Module):
    """The feed-forward of `FeedForward` (gates: arXiv:2002.05202). `product` may do all of it where nothing is trained, on the CPU; it
    gives None for layers that it wasn't made for (kernels/linear.py)."""

    product: Callable[["MLP", Tensor], Tensor | None] | None = None

    def __init__(self, hidden_size: int, spec: FeedForward) -> None:
        super().__init__()
        self.spec = spec
        self.gate_proj = nn.Linear(hidden_size, spec.size, bias=spec.bias) if spec.gated else None
        self.up_proj = nn.Linear(hidden_size, spec.size, bias=spec.bias)
        self.down_proj = nn.Linear(spec.size, hidden_size, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.product is not None and not torch.is_grad_enabled() and x.device.type == "cpu":
            whole = self.product(self, x)
            if whole is not None:
                return whole
        if self.gate_proj is None:
            inner = ACTIVATIONS[self.spec.activation](self.up_proj(x))
        else:
            gate, up = project(x, self.gate_proj, self.up_proj)
            inner = gated(gate, up, self.spec)
        out: Tensor = self.down_proj(inner)
        return out


class Stack(nn.Module):
    """The linear layers of all experts, one tensor each: (E, out, in), and (E, out) for a bias."""

    def __init__(self, hidden_size: int, spec: FeedForward, count: int) -> None:
        super().__init__()
        self.spec = spec
        shapes = {
            "gate_proj": (spec.size, hidden_size),
            "up_proj": (spec.size, hidden_size),
            "down_proj": (hidden_size, spec.size),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(count, *shape)))
            bias = nn.Parameter(torch.zeros(count, shape[0])) if spec.bias else None
            self.register_parameter(f"{name}_bias", bias)

    def linear(self, x: Tensor, name: str, expert: int) -> Tensor:
        bias = getattr(self, f"{name}_bias")
        return F.linear(x, getattr(self, name)[expert], None if bias is None else bias[expert])

    def forward(self, x_ND: Tensor, expert: int) -> Tensor:
        inner = gated(self.linear(x_ND, "gate_proj", expert), self.linear(x_ND, "up_proj", expert), self.spec)
        return self.linear(inner, "down_proj", expert)


class MoE(nn.Module):
    """A mixture of experts: every token is computed by the few that its router chooses (Mixtral, arXiv:2401.04088)."""

    def __init__(self, hidden_size: int, spec: FeedForward, experts: Experts) -> None:
        super().__init__()
        assert spec.gated, "experts are gated in every family there is"
        self.experts_spec = experts
        self.gate = nn.Linear(hidden_size, experts.count, bias=experts.router_bias)
        self.experts = Stack(hidden_size, spec, experts.count)

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x.flatten(0, -2)
        share_NE = self.gate(x_ND).softmax(-1, dtype=torch.float32)
        share_Nk, chosen_Nk = share_NE.topk(self.experts_spec.per_token, dim=-1)
        if self.experts_spec.renormalise:
            share_Nk = share_Nk / share_Nk.sum(-1, keepdim=True)
        out_ND = torch.zeros_like(x_ND)
        for expert in range(self.experts_spec.count):
            token, place = (chosen_Nk == expert).nonzero(as_tuple=True)
            if len(token):
                y = self.experts(x_ND[token], expert) * share_Nk[token, place, None].to(x.dtype)
                out_ND = out_ND.index_add(0, token, y)
        return out_ND.view_as(x)


class Block(nn.Module):
    """One `Layer` over hidden states; `index` is its place in the cache. With `cross` it reads another stack's output between
    attention and feed-forward (sequential layers with their norms before)."""

    def __init__(self, hidden_size: int, layer: Layer, index: int, *, cross: bool = False) -> None:
        super().__init__()
        self.layer = layer
        before, after = layer.norms in ("before", "around"), layer.norms in ("after", "around")

        def norm(there: bool) -> nn.Module | None:
            return make_norm(hidden_size, layer.norm) if there else None

        self.input_layernorm = norm(before)
        self.self_attn = SelfAttention(hidden_size, layer, index)
        self.attention_norm = norm(after)
        self.cross_layernorm = norm(cross)
        self.cross_attn = CrossAttention(hidden_size, layer, index) if cross else None
        # Llama's name for the norm before the feed-forward.
        self.post_attention_layernorm = norm(before and layer.residual != "shared")
        experts = layer.mlp.experts
        self.mlp = MLP(hidden_size, layer.mlp) if experts is None else MoE(hidden_size, layer.mlp, experts)
        self.mlp_norm = norm(after)

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        if self.layer.norms == "after":
            x_BTD = _normed(self.attention_norm, x_BTD + self.self_attn(x_BTD, step))
            return _normed(self.mlp_norm, x_BTD + self.mlp(x_BTD))
        h_BTD = _normed(self.input_layernorm, x_BTD)
        y_BTD = _normed(self.attention_norm, self.self_attn(h_BTD, step))
        if self.layer.residual == "sequential":
            x_BTD = x_BTD + y_BTD
            if self.cross_attn is not None:
                x_BTD = x_BTD + self.cross_attn(_normed(self.cross_layernorm, x_BTD), step)
            y_BTD = _normed(self.post_attention_layernorm, x_BTD)
            return x_BTD + _normed(self.mlp_norm, self.mlp(y_BTD))
        if self.layer.residual == "parallel":
            h_BTD = _normed(self.post_attention_layernorm, x_BTD)
        return x_BTD + y_BTD + _normed(self.mlp_norm, self.mlp(h_BTD))


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # Primer, arXiv:2109.08668
}
