"""What a transformer is made of, as frozen data: every family is a value of these, none a branch in the code.

    Layer = Attention + FeedForward + where the norms stand + how positions turn

A model is a tuple of layers, so that Gemma's five local layers to one global, GPT-3's alternating bands or experts in every
second layer are written down once, when a config.json is read.
"""

from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]
Task = Literal["masked_lm", "sequence", "token", "span"]
Problem = Literal["single", "multi", "regression"]  # one label of several, any number of labels, numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """`offset` is added to the stored weight: Gemma keeps weight - 1."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False  # of q, k and v
    output_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotation (Qwen3, Gemma 3)
    scale: float | None = None  # None: head_dim ** -0.5
    window: int | None = None  # a token sees itself and the window - 1 before it
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: bool = False  # a learned score per head that takes probability and gives nothing (GPT-OSS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Each token goes to `per_token` of `count` feed-forwards, weighted by the router's softmax over all of them;
    `renormalise` makes the chosen weights sum to 1."""

    count: int
    per_token: int
    renormalise: bool = True
    router_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """down(act(up(x))), or down(act(gate(x)) * (up(x) + up_offset)) when gated, gate and up cut at ±`limit` (gate above only)."""

    size: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    limit: float | None = None
    up_offset: float = 0.0
    experts: Experts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor` (position interpolation, arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a smooth step between them (Llama 3.1)."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Frequencies that turn often within the original context kept, rare ones divided by `factor`, a ramp between
    (arXiv:2309.00071); `attention_factor` multiplies the rotated queries and keys. `truncate` rounds the ramp's ends."""

    kind: Literal["yarn"] = "yarn"
    factor: float
    beta_fast: float
    beta_slow: float
    original_max_tokens: int
    attention_factor: float
    truncate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope:
    """A divisor for each frequency: `short` up to the original context, `long` for any longer text (arXiv:2402.13753)."""

    kind: Literal["longrope"] = "longrope"
    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_tokens: int
    attention_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary positions in the half layout: dimension i of a head turns together with i + d/2 (arXiv:2104.09864), where d is
    the first `fraction` of the head; the rest stands still."""

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongRope | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One block. Norms stand before the branches (GPT-2, Llama), after the sum (BERT), or before and after the branches (Gemma 2).
    Attention and feed-forward follow each other, or run in parallel, on a norm each (GPT-NeoX) or a shared one (Phi-2)."""

    attention: Attention
    mlp: FeedForward
    norm: Norm = field(default_factory=Norm)
    rotary: Rotary | None = None
    norms: Literal["before", "after", "around"] = "before"
    residual: Literal["sequential", "parallel", "shared"] = "sequential"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What reads the hidden states: every token into the vocabulary ("masked_lm"), a whole text ("sequence") or every token
    ("token") into labels, every token into a score for where an answer starts and one for where it ends ("span").
    `activation` is that of a dense layer before the last one; None: there is none."""

    task: Task
    labels: tuple[str, ...] = ()
    problem: Problem = "single"
    activation: Activation | Literal["tanh"] | None = None
    reads: Literal["first", "last"] = "first"  # the token that stands for the text
    bias: bool = True
