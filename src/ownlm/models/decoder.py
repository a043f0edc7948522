"""The decoder-only transformer: GPT, Llama, Mistral, Mixtral, Phi, Gemma, Qwen, GPT-OSS and Grok are settings of it.

    tokens ─ embed_tokens (+ embed_positions) ─ block ─ block ─ … ─ norm ─ hidden ─ logits

Shapes: B batch, T tokens, D hidden, V vocabulary, d head width. Parameters carry Llama's Hugging Face names.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ownlm.models.attention import among
from ownlm.models.blank import blank
from ownlm.models.blocks import Block, CrossAttention, SelfAttention, Step, make_norm, matrix
from ownlm.models.cache import Place
from ownlm.models.heads import make_head
from ownlm.models.pooling import Pooling
from ownlm.models.rotary import attention_factor, frequencies, is_long, rotation
from ownlm.models.specs import Attention, FeedForward, Head, Layer, LongRope, Norm, Rotary, Task

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder, as data. `max_tokens` is the longest context it was made for; `norm` the one after the last layer.

    Logits are logit_scale * (head(hidden) + bias), then softcap * tanh(logits / softcap) where there is one.
    """

    vocab_size: int
    hidden_size: int
    max_tokens: int
    layers: tuple[Layer, ...]
    norm: Norm = field(default_factory=Norm)
    learned_positions: bool = False  # one vector per position, added to the embedding
    tie_embeddings: bool = False
    head_bias: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head: Head | None = None  # in place of the one over the vocabulary

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(key/value heads, head width) of every layer."""
        (shape,) = {(layer.attention.num_kv_heads, layer.attention.head_dim) for layer in self.layers}
        return shape


def uniform(
    *,
    num_layers: int,
    attention: Attention,
    mlp: FeedForward,
    norm: Norm | None = None,
    rotary: Rotary | None = None,
    **others: Any,
) -> DecoderConfig:
    """A decoder of equal layers: rotary positions where `rotary` is given, learned ones otherwise."""
    norm = norm or Norm()
    layer = Layer(attention=attention, mlp=mlp, norm=norm, rotary=rotary)
    return DecoderConfig(layers=(layer,) * num_layers, norm=norm, learned_positions=rotary is None, **others)


class Rotations:
    """cos and sin for every kind of rotation among the layers, from frequencies kept in fp32 outside of the weights."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self.kinds = {layer.rotary: layer.attention.head_dim for layer in layers if layer.rotary is not None}
        # Not buffers: those would be rounded by model.to(torch.bfloat16).
        self.frequencies: dict[tuple[Rotary, bool], Tensor] = {}

    def __call__(
        self, positions: Tensor, dtype: torch.dtype, long: bool | None = None
    ) -> Mapping[Rotary, tuple[Tensor, Tensor]]:
        """For `positions` (…), -1 for padding. `long`: of texts beyond LongRope's original context; None: as the positions say."""
        return {
            rotary: rotation(self._frequencies(rotary, positions, long), positions, dtype, attention_factor(rotary))
            for rotary in self.kinds
        }

    def _frequencies(self, rotary: Rotary, positions: Tensor, long: bool | None) -> Tensor:
        if not isinstance(rotary.scaling, LongRope):
            long = False
        key = rotary, is_long(rotary, int(positions.max()) + 1) if long is None else long
        found = self.frequencies.get(key)
        if found is None or found.device != positions.device:
            found = frequencies(rotary, self.kinds[rotary], long=key[1]).to(positions.device)
            self.frequencies[key] = found
        return found


class Decoder(nn.Module):
    """`model(tokens_BT)` gives hidden states, `model.logits(hidden)` their next-token logits.

    `hf` is the config.json it came with and `pooling` how its files want a text's vector made; both are written back when
    the model is saved.
    """

    def __init__(self, config: DecoderConfig, hf: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config, self.hf = config, hf
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_tokens, config.hidden_size) if config.learned_positions else None
        self.layers = nn.ModuleList(
            Block(config.hidden_size, layer, index) for index, layer in enumerate(config.layers)
        )
        self.norm = make_norm(config.hidden_size, config.norm)
        self.pooling: Pooling | None = None
        self.head: nn.Module | None = None
        if config.head is not None:
            self.lm_head = self.lm_head_bias = None
            self.head = make_head(config.hidden_size, config.vocab_size, config.head, config.norm)
        elif config.tie_embeddings:
            self.lm_head = None
            self.lm_head_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
            self.lm_head_bias = None
        self.rotations = Rotations(config.layers)
        # Of a decoder that is one of several shards: called with hidden states and `_logits` (shards.py).
        self.around_logits: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None
        self.windows = {layer.attention.window for layer in config.layers}

    @property
    def task(self) -> Task | None:
        """What its head does; None where that is to go on with a text."""
        return None if self.config.head is None else self.config.head.task

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; its weights may be kept in less."""
        return next(self.norm.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.norm.parameters()).device

    @property
    def head_weight(self) -> Tensor:
        """(V, D): hidden @ head_weight.T are the logits; the embedding itself when tied. Made on the spot where it is kept in codes."""
        return matrix(self.embed_tokens if self.lm_head is None else self.lm_head, self.dtype)

    @property
    def head_bias(self) -> Tensor | None:
        return self.lm_head_bias if self.lm_head is None else self.lm_head.bias

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head multiplies: hidden states, scaled."""
        assert self.head is None, f"this model has a head for {self.task}"
        return hidden if self.config.logit_scale == 1.0 else hidden * self.config.logit_scale

    def logits(self, hidden: Tensor, head: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """(…, D) -> (…, V) in fp32, the product in the weights' dtype. `head`: weight and bias in place of the model's."""
        if self.around_logits is None:
            return self._logits(hidden, head)
        assert head is None, "of a shard's head there are others elsewhere"
        return self.around_logits(hidden, self._logits)

    def _logits(self, hidden: Tensor, head: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        weight, bias = head or (self.head_weight, self.head_bias)
        logits = nn.functional.linear(self.head_input(hidden), weight, bias).float()
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, tokens_BT: Tensor, **where: Any) -> Tensor:
        """hidden_BTD, the final norm applied. Arguments as for `begin`."""
        x_BTD, step = self.begin(tokens_BT, **where)
        for layer in self.layers:
            x_BTD = layer(x_BTD, step)
        hidden_BTD: Tensor = self.norm(x_BTD)
        return hidden_BTD

    def begin(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        embeds_BTD: Tensor | None = None,
        place: Place | None = None,
    ) -> tuple[Tensor, Step]:
        """What the first layer is given; all layers share the step.

        positions_BT: 0 ... T-1 in every row if not given; -1 marks padding, which nobody sees; its own output is noise.
        documents_BT: a token sees only earlier tokens with its own number (packed training); not with a cache.
        embeds_BTD: stands in for the embedding of the tokens (`embed`), where images are among them.
        place: in a cache, where keys and values are written and read; it tells the positions. No gradients.
        """
        positions = positions_BT if place is None else place.positions_BT
        step = self._step(tokens_BT, positions, documents_BT, place)
        x_BTD = self.embed(tokens_BT) if embeds_BTD is None else embeds_BTD
        if self.embed_positions is not None:
            places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) if positions is None else positions
            x_BTD = x_BTD + self.embed_positions(places.clamp(min=0))
        return x_BTD, step

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """The tokens' vectors, scaled where the family scales them; without positions."""
        x_BTD: Tensor = self.embed_tokens(tokens_BT).to(self.dtype)
        # The factor is rounded to the dtype of the weights, as where these models were trained.
        return x_BTD if self.config.embed_scale == 1.0 else x_BTD * x_BTD.new_full((), self.config.embed_scale)

    def _step(
        self, tokens_BT: Tensor, positions_BT: Tensor | None, documents_BT: Tensor | None, place: Place | None
    ) -> Step:
        width = tokens_BT.shape[1]
        positions = torch.arange(width, device=tokens_BT.device) if positions_BT is None else positions_BT
        rotations = self.rotations(positions, self.dtype, None if place is None else place.long)
        if place is not None:
            assert documents_BT is None, "a sequence in a cache is one document"
            assert not torch.is_grad_enabled(), "the cache is for inference: call under torch.inference_mode()"
            return Step(rotations, {}, place)
        padding = None if positions_BT is None or int(positions_BT.min()) >= 0 else positions_BT < 0
        seen = {w: among(width, window=w, padding_BT=padding, documents_BT=documents_BT) for w in self.windows}
        return Step(rotations, seen)


def init_weights(model: M, *, seed: int = 0, zero_output: bool = True, embedding_std: float | None = None) -> M:
    """The same model, of any skeleton, with fresh weights made for training; equal seeds give equal weights, whatever the dtype.

    Matrices are normal with std fan_in ** -0.5, so that activations start at unit size at every width (LeCun et al.
    1998, "Efficient BackProp", 4.6). With `zero_output` every branch ends in zero and the network starts as the
    identity (arXiv:1901.09321); without, in std / sqrt(2 L) as in GPT-2. Embeddings are normal with `embedding_std`:
    1 by default, 0.02 as in GPT-2 when they are the head as well and nothing scales the logits down (T5 does). A head of its
    own starts at 0.001, near the uniform prediction (both as in nanochat). Norms are one, biases zero. Queries of an
    attention that doesn't scale its scores start smaller by what it leaves out (as in T5).
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    named = dict(model.named_parameters())
    scaled = getattr(config, "logit_scale", 1.0) < 1
    embedding_std = embedding_std or (1.0 if scaled or "lm_head.weight" in named else 0.02)
    norms = {f"{name}.weight": getattr(module, "offset", 0.0) for name, module in model.named_modules()}
    with torch.no_grad():
        for name, parameter in named.items():
            if name.endswith(("bias", "_bias.weight", "sinks", "segments", "class_token")):
                parameter.zero_()
                continue
            if name == "logit_scale":  # CLIP's begins with the paper's value
                continue
            if parameter.ndim == 1:
                parameter.fill_(1.0 - norms.get(name, 0.0))
                continue
            std = math.prod(parameter.shape[1:] if parameter.ndim == 4 else parameter.shape[-1:]) ** -0.5
            if name.endswith("embed_tokens.weight"):
                std = embedding_std
            elif name.endswith(("embed_positions.weight", "embed_types.weight")):
                std = embedding_std / 2
            elif name == "lm_head.weight":
                std = 0.001
            elif name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                std = 0.0 if zero_output else std / (2 * config.num_layers) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for module in model.modules():
            if isinstance(module, SelfAttention | CrossAttention) and module.spec.scale == 1.0:
                module.q_proj.weight.mul_(module.spec.head_dim**-0.5)
    return model


def count_parameters(config: DecoderConfig) -> int:
    """Weights of the whole model; a tied head counts once."""
    with blank():
        return sum(parameter.numel() for parameter in Decoder(config).parameters())


def flops_per_token(config: DecoderConfig, context: int) -> float:
    """Floating-point operations of one trained token, forward and backward, at a context of `context` tokens.

    6 per weight in a matrix product, and for attention 6 H d context per layer: two products of 2 H d per visible key,
    three times (forward, both gradients), with half the context visible on average (arXiv:2204.02311 appendix B counts
    all of it as visible). Inference takes a third.
    """
    D, matrices, attention = config.hidden_size, config.hidden_size * config.vocab_size, 0
    for layer in config.layers:
        a, mlp = layer.attention, layer.mlp
        matrices += D * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
        used = 1 if mlp.experts is None else mlp.experts.per_token
        matrices += used * D * mlp.size * (3 if mlp.gated else 2)
        attention += a.num_heads * a.head_dim * min(context, 2 * (a.window or context))
    return 6.0 * matrices + 6.0 * attention
