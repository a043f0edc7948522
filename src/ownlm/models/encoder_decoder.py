"""The encoder-decoder: T5 1.0 and 1.1, Flan-T5 and mT5 are settings of it (arXiv:1910.10683, arXiv:2010.11934).

    source tokens ─ embed ─ block ─ block ─ … ─ norm ─ memory ─┬─ keys and values of each decoder layer
                                                               ▼
    target tokens ─ embed ─ block (with cross attention) ─ … ─ norm ─ hidden ─ logits

Positions are scores: each head learns one for every bucket of distances, shared by all layers of a stack, none across.

Shapes: B batch, S source tokens, T target tokens, D hidden, H heads, V vocabulary, d head width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ownlm.models.attention import Visibility, among, everything, masked
from ownlm.models.blocks import Block, Step, make_norm
from ownlm.models.cache import KVCache, Place
from ownlm.models.skeleton import Skeleton
from ownlm.models.specs import Layer, Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoderConfig:
    """An encoder-decoder, as data. `layers` are the decoder's; `max_tokens` is what it was trained with, not a limit.

    Logits are head(logit_scale * hidden). Decoding begins with `start_token`.
    """

    vocab_size: int
    hidden_size: int
    max_tokens: int
    encoder: tuple[Layer, ...]
    layers: tuple[Layer, ...]
    norm: Norm = field(default_factory=Norm)
    buckets: int = 32
    max_distance: int = 128
    tie_embeddings: bool = True
    logit_scale: float = 1.0
    start_token: int = 0

    @property
    def num_layers(self) -> int:
        """Layers of the decoder, which are those with a cache."""
        return len(self.layers)

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(key/value heads, head width) of every layer."""
        attention = self.layers[0].attention
        return attention.num_kv_heads, attention.head_dim


def buckets(relative: Tensor, count: int, max_distance: int, *, both_ways: bool) -> Tensor:
    """The bucket of each distance key - query: half of them exact, the rest logarithmic up to `max_distance`.

    With `both_ways` the upper half of the buckets is for keys that follow; without, those are all in bucket 0.
    """
    first = torch.zeros_like(relative)
    if both_ways:
        count //= 2
        first = (relative > 0) * count
        distance = relative.abs()
    else:
        distance = (-relative).clamp(min=0)
    exact = count // 2
    # In fp32 and in this order, as where these models were trained: a rounded logarithm decides the borders.
    steps = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (count - exact)
    far = (exact + steps.long()).clamp(max=count - 1)
    return first + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """A score per head for each bucket of distances."""

    def __init__(self, config: EncoderDecoderConfig, heads: int, *, both_ways: bool) -> None:
        super().__init__()
        self.max_distance, self.both_ways = config.max_distance, both_ways
        self.weight = nn.Parameter(torch.zeros(config.buckets, heads))

    def forward(self, start: int, queries: int) -> Tensor:
        """(1, H, T, start + T): what `queries` tokens from place `start` on add to their scores."""
        keys_S = torch.arange(start + queries, device=self.weight.device)
        relative_TS = keys_S - keys_S[start:, None]
        found_TS = buckets(relative_TS, len(self.weight), self.max_distance, both_ways=self.both_ways)
        return self.weight[found_TS].permute(2, 0, 1)[None]


@dataclass(frozen=True, slots=True)
class Source:
    """What the decoder reads of its sources: keys and values (B, K, S, d) of each layer, and which places are no padding."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask_BS: Tensor | None

    def rows(self, rows_N: Tensor) -> "Source":
        """The sources of these rows, in this order; one may come several times (beams)."""
        layers = tuple((keys[rows_N], values[rows_N]) for keys, values in self.layers)
        return Source(layers, None if self.mask_BS is None else self.mask_BS[rows_N])

    def visibility(self, queries: int) -> Visibility:
        if self.mask_BS is None:
            return everything(queries, self.layers[0][0].shape[2])
        return masked(~self.mask_BS[:, None].expand(-1, queries, -1))


class EncoderDecoder(Skeleton):
    """`model(tokens_BS, decoder_tokens_BT)` gives the decoder's hidden states, `model.logits(hidden)` their next-token logits."""

    config: EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig, hf: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, hf)
        D, heads = config.hidden_size, config.layers[0].attention.num_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.encoder = nn.ModuleList(Block(D, layer, index) for index, layer in enumerate(config.encoder))
        self.encoder_bias = RelativeBias(config, heads, both_ways=True)
        self.encoder_norm = make_norm(D, config.norm)
        self.decoder = nn.ModuleList(Block(D, layer, index, cross=True) for index, layer in enumerate(config.layers))
        self.decoder_bias = RelativeBias(config, heads, both_ways=False)
        self.norm = make_norm(D, config.norm)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(D, config.vocab_size, bias=False)

    @property
    def numbers(self) -> Tensor:
        return self.decoder_bias.weight

    def encode(self, tokens_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """memory_BSD, the encoder's final norm applied. `mask_BS` is True where a token is none of the padding."""
        width = tokens_BS.shape[1]
        seen = among(width, both_ways=True, padding_BT=None if mask_BS is None else ~mask_BS.bool())
        step = Step({}, {None: seen}, bias_BHTS=self.encoder_bias(0, width))
        x_BSD = self.embed_tokens(tokens_BS).to(self.dtype)
        for layer in self.encoder:
            x_BSD = layer(x_BSD, step)
        memory_BSD: Tensor = self.encoder_norm(x_BSD)
        return memory_BSD

    def source(self, memory_BSD: Tensor, mask_BS: Tensor | None = None) -> Source:
        """The keys and values that every decoder layer makes of the memory: worked out once, whatever is decoded."""
        layers = tuple(layer.cross_attn.read(memory_BSD) for layer in self.decoder)  # type: ignore[union-attr, operator]
        return Source(layers, None if mask_BS is None else mask_BS.bool())

    def decode(
        self,
        tokens_BT: Tensor,
        source: Source,
        *,
        mask_BT: Tensor | None = None,
        cache: KVCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """hidden_BTD of target tokens, the final norm applied; the first of them is `start_token`.

        mask_BT: False marks padding, which nobody sees; not with a cache.
        cache, start: row b is slot b, in which `start` tokens stand already. No gradients.
        """
        rows, width = tokens_BT.shape
        place: Place | None = None
        seen: dict[int | None, Visibility] = {}
        if cache is None:
            seen = {None: among(width, padding_BT=None if mask_BT is None else ~mask_BT.bool())}
        else:
            assert not torch.is_grad_enabled(), "the cache is for inference: call under torch.inference_mode()"
            assert mask_BT is None, "the rows of a cache are aligned and have no padding"
            place = cache.address(torch.arange(start, start + width, device=tokens_BT.device).expand(rows, width))
        step = Step(
            {},
            seen,
            place,
            bias_BHTS=self.decoder_bias(start, width),
            source=source.layers,
            source_visibility=source.visibility(width),
        )
        x_BTD = self.embed_tokens(tokens_BT).to(self.dtype)
        for layer in self.decoder:
            x_BTD = layer(x_BTD, step)
        hidden_BTD: Tensor = self.norm(x_BTD)
        return hidden_BTD

    def forward(
        self,
        tokens_BS: Tensor,
        decoder_tokens_BT: Tensor,
        *,
        mask_BS: Tensor | None = None,
        decoder_mask_BT: Tensor | None = None,
    ) -> Tensor:
        """hidden_BTD of the target tokens given the source tokens; masks are False where there is padding."""
        source = self.source(self.encode(tokens_BS, mask_BS), mask_BS)
        return self.decode(decoder_tokens_BT, source, mask_BT=decoder_mask_BT)
