"""The decoder-only transformer: GPT, Llama, Mistral, Mixtral, Phi, Gemma, Qwen, GPT-OSS and Grok are settings of it.

    tokens ─ embed_tokens (+ embed_positions) ─ block ─ block ─ … ─ norm ─ hidden ─ logits

Shapes: B batch, T tokens, D hidden, V vocabulary, d head width. Parameters carry Llama's Hugging Face names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ownlm.models.attention import among
from ownlm.models.blank import blank
from ownlm.models.blocks import Block, Step, make_norm
from ownlm.models.cache import Place
from ownlm.models.heads import make_head
from ownlm.models.rotary import attention_factor, frequencies, is_long, rotation
from ownlm.models.skeleton import Skeleton
from ownlm.models.specs import Attention, FeedForward, Head, Layer, LongRope, Norm, Rotary


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


class Decoder(Skeleton):
    """`model(tokens_BT)` gives hidden states, `model.logits(hidden)` their next-token logits."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig, hf: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, hf)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_tokens, config.hidden_size) if config.learned_positions else None
        self.layers = nn.ModuleList(
            Block(config.hidden_size, layer, index) for index, layer in enumerate(config.layers)
        )
        self.norm = make_norm(config.hidden_size, config.norm)
        if config.head is not None:
            self.head = make_head(config.hidden_size, config.vocab_size, config.head, config.norm)
        elif not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        elif config.head_bias:
            self.lm_head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.rotations = Rotations(config.layers)
        # Of a decoder that is one of several shards: called with hidden states and `_logits` (checkpoints/shards.py).
        self.around_logits: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None
        self.windows = {layer.attention.window for layer in config.layers}

    @property
    def numbers(self) -> Tensor:
        return next(self.norm.parameters())

    def head_input(self, hidden: Tensor) -> Tensor:
        assert self.head is None, f"this model has a head for {self.task}"
        return super().head_input(hidden)

    def logits(self, hidden: Tensor, head: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """(…, D) -> (…, V) in fp32, the product in the weights' dtype. `head`: weight and bias in place of the model's."""
        if self.around_logits is None:
            return self._logits(hidden, head)
        assert head is None, "of a shard's head there are others elsewhere"
        return self.around_logits(hidden, self._logits)

    def _logits(self, hidden: Tensor, head: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        logits = (
            super().logits(hidden) if head is None else nn.functional.linear(self.head_input(hidden), *head).float()
        )
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


def count_parameters(config: DecoderConfig) -> int:
    """Weights of the whole model; a tied head counts once."""
    with blank():
        return sum(parameter.numel() for parameter in Decoder(config).parameters())
