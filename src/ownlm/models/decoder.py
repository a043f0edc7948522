"""The decoder-only transformer, pre-norm: GPT-2, Llama and Qwen3 are settings of it.

    tokens ─ embed_tokens (+ embed_positions) ─┬─ norm ─ self_attn ─ + ─┬─ norm ─ mlp ─ + ─ … ─ norm ─ hidden ─ logits
                                               └────────────────────────┘ └─────────────┘

Shapes: B batch, T tokens, D hidden, V vocabulary, d head width. Parameters carry Llama's Hugging Face names.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ownlm.models.attention import causal, masked
from ownlm.models.blocks import (
    MLP,
    Attention,
    FeedForward,
    Learned,
    Norm,
    Rotary,
    SelfAttention,
    Step,
    frequencies,
    make_norm,
    rotation,
)
from ownlm.models.cache import KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder, as data. `max_tokens` is the longest context it was made for."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_tokens: int
    attention: Attention
    mlp: FeedForward
    norm: Norm = field(default_factory=Norm)
    position: Rotary | Learned = field(default_factory=Rotary)
    tie_embeddings: bool = False


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config.hidden_size, config.norm)
        self.self_attn = SelfAttention(config.hidden_size, config.attention, config.norm, layer)
        self.post_attention_layernorm = make_norm(config.hidden_size, config.norm)
        self.mlp = MLP(config.hidden_size, config.mlp)

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), step)
        out: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out


class Decoder(nn.Module):
    """`model(tokens_BT)` gives hidden states, `model.logits(hidden)` their next-token logits."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = isinstance(config.position, Learned)
        self.embed_positions = nn.Embedding(config.max_tokens, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config.hidden_size, config.norm)
        head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head = head
        # A plain attribute: as a buffer it would be rounded by model.to(torch.bfloat16).
        self.frequencies = (
            frequencies(config.position, config.attention.head_dim) if isinstance(config.position, Rotary) else None
        )

    @property
    def head_weight(self) -> Tensor:
        """(V, D): hidden @ head_weight.T are the logits; the embedding itself when tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…, V) in fp32, the product in the weights' dtype."""
        return nn.functional.linear(hidden, self.head_weight).float()

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """hidden_BTD, the final norm applied.

        positions_BT: 0 ... T-1 in every row if not given; -1 marks padding, which nobody sees; its own output is noise.
        documents_BT: a token sees only earlier tokens with its own number (packed training); not with a cache.
        cache, slots: read and write keys and values; row b is sequence slots[b] (slot b if not given). No gradients.
        """
        step, positions = self._step(tokens_BT, positions_BT, documents_BT, cache, slots)
        x_BTD = self.embed_tokens(tokens_BT)
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(positions.clamp(min=0))
        for layer in self.layers:
            x_BTD = layer(x_BTD, step)
        hidden_BTD: Tensor = self.norm(x_BTD)
        return hidden_BTD

    def _step(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        documents_BT: Tensor | None,
        cache: KVCache | None,
        slots: Tensor | None,
    ) -> tuple[Step, Tensor]:
        rows, width = tokens_BT.shape
        positions = torch.arange(width, device=tokens_BT.device) if positions_BT is None else positions_BT
        address = None
        if cache is not None:
            assert documents_BT is None, "a cache slot holds one document"
            assert not torch.is_grad_enabled(), "the cache is for inference: call under torch.inference_mode()"
            address = cache.address(positions.expand(rows, width), slots)
            visibility = address.visibility
        elif documents_BT is None and (positions_BT is None or int(positions_BT.min()) >= 0):
            visibility = causal(width, width)
        else:
            index = torch.arange(width, device=tokens_BT.device)
            hidden_BTS = (index > index[:, None]).expand(rows, -1, -1)
            if documents_BT is not None:
                hidden_BTS = hidden_BTS | (documents_BT[:, None, :] != documents_BT[:, :, None])
            if positions_BT is not None:
                # Padding still sees itself, so that its softmax has something to sum over.
                hidden_BTS = hidden_BTS | ((positions_BT < 0)[:, None, :] & (index != index[:, None]))
            visibility = masked(hidden_BTS)
        cos = sin = None
        if self.frequencies is not None:
            if self.frequencies.device != tokens_BT.device:
                self.frequencies = self.frequencies.to(tokens_BT.device)
            cos, sin = rotation(self.frequencies, positions, self.embed_tokens.weight.dtype)
        return Step(cos, sin, visibility, cache, address), positions


def init_weights(
    model: Decoder, *, seed: int = 0, zero_output: bool = True, embedding_std: float | None = None
) -> Decoder:
    """The same model with fresh weights, made for training; equal seeds give equal weights, whatever the dtype.

    Matrices are normal with std fan_in ** -0.5, so that activations start at unit size at every width (LeCun et al.
    1998, "Efficient BackProp", 4.6). With `zero_output` every branch ends in zero and the network starts as the
    identity (arXiv:1901.09321); without, in std / sqrt(2 L) as in GPT-2. Embeddings are normal with `embedding_std`:
    1 by default, 0.02 as in GPT-2 when they are the head as well. A head of its own starts at 0.001, near the uniform
    prediction (both as in nanochat). Norms are one, biases zero.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    embedding_std = embedding_std or (0.02 if config.tie_embeddings else 1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
                continue
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            std = parameter.shape[1] ** -0.5
            if name == "embed_tokens.weight":
                std = embedding_std
            elif name == "embed_positions.weight":
                std = embedding_std / 2
            elif name == "lm_head.weight":
                std = 0.001
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                std = 0.0 if zero_output else std / (2 * config.num_layers) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def count_parameters(config: DecoderConfig) -> int:
    """Weights of the whole model; a tied head counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters())


def flops_per_token(config: DecoderConfig, context: int) -> float:
    """Floating-point operations of one trained token, forward and backward, at a context of `context` tokens.

    6 per weight in a matrix product, and for attention 6 H d context per layer: two products of 2 H d per visible key,
    three times (forward, both gradients), with half the context visible on average (arXiv:2204.02311 appendix B counts
    all of it as visible). Inference takes a third.
    """
    a, D = config.attention, config.hidden_size
    projections = D * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
    mlp = D * config.mlp.size * (3 if config.mlp.gated else 2)
    matrices = config.num_layers * (projections + mlp) + D * config.vocab_size
    return 6.0 * matrices + 6.0 * config.num_layers * a.num_heads * a.head_dim * context
