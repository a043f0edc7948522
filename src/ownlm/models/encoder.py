"""The bidirectional encoder: BERT, RoBERTa and DistilBERT are settings of it.

    tokens ─ embed_tokens + embed_positions (+ embed_types) ─ norm ─ block ─ block ─ … ─ hidden ─ head

Shapes: B batch, T tokens, D hidden, V vocabulary. Parameters carry the names of our decoder's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ownlm.models.attention import among
from ownlm.models.blocks import Block, Step, make_norm
from ownlm.models.heads import MaskedLMHead, Pooler, make_head
from ownlm.models.skeleton import Skeleton
from ownlm.models.specs import Head, Layer, Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """An encoder, as data. `max_tokens` is the longest text it takes; `norm` the one after the embedding and in the head.

    `first_position` is the row of the position table that the first token adds. Where that isn't 0, the token
    `first_position - 1` is padding wherever it stands, and adds the row before (RoBERTa).
    """

    vocab_size: int
    hidden_size: int
    max_tokens: int
    layers: tuple[Layer, ...]
    norm: Norm = field(default_factory=lambda: Norm(kind="layer"))
    first_position: int = 0
    token_types: int = 0
    pooler: bool = False
    next_sentence: bool = False  # whether a second text follows the first, read from the pooler (BERT's pretraining)
    head: Head | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)


class Encoder(Skeleton):
    """`model(tokens_BT)` gives hidden states; `logits` (masked LM) or `head` (the other tasks) read them."""

    config: EncoderConfig

    def __init__(self, config: EncoderConfig, hf: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, hf)
        D = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.embed_positions = nn.Embedding(config.first_position + config.max_tokens, D)
        self.embed_types = nn.Embedding(config.token_types, D) if config.token_types else None
        self.embed_norm = make_norm(D, config.norm)
        self.layers = nn.ModuleList(Block(D, layer, index) for index, layer in enumerate(config.layers))
        self.pooler = Pooler(D) if config.pooler else None
        self.next_sentence = nn.Linear(D, 2) if config.next_sentence else None
        if config.head is not None:
            self.head = make_head(D, config.vocab_size, config.head, config.norm)

    @property
    def numbers(self) -> Tensor:
        return self.embed_positions.weight

    @property
    def head_bias(self) -> Tensor | None:
        return self.head.bias if isinstance(self.head, MaskedLMHead) else None

    def head_input(self, hidden: Tensor) -> Tensor:
        assert isinstance(self.head, MaskedLMHead), f"a masked-LM head is needed, this one is {self.task}"
        out: Tensor = self.head(hidden)
        return out

    def follows(self, hidden_BTD: Tensor) -> Tensor:
        """(B, 2): that the second text follows the first, and that it doesn't (BERT's next-sentence head)."""
        assert self.pooler is not None
        assert self.next_sentence is not None
        logits: Tensor = self.next_sentence(self.pooler(hidden_BTD)).float()
        return logits

    def forward(self, tokens_BT: Tensor, *, mask_BT: Tensor | None = None, types_BT: Tensor | None = None) -> Tensor:
        """hidden_BTD. Where `mask_BT` is False there is padding, on either side: nobody sees it, positions don't count it, and
        its own output is noise. types_BT: which text a token belongs to, 0 if not given."""
        width = tokens_BT.shape[1]
        assert width <= self.config.max_tokens, f"{width} tokens of {self.config.max_tokens}"
        assert mask_BT is None or mask_BT.dtype == torch.bool, mask_BT.dtype
        if mask_BT is not None and bool(mask_BT.all()):
            mask_BT = None
        x_BTD: Tensor = self.embed_tokens(tokens_BT).to(self.dtype) + self.embed_positions(
            self._positions(tokens_BT, mask_BT)
        )
        if self.embed_types is not None:
            x_BTD = x_BTD + self.embed_types(torch.zeros_like(tokens_BT) if types_BT is None else types_BT)
        x_BTD = self.embed_norm(x_BTD)
        padding_BT = None if mask_BT is None else ~mask_BT
        step = Step({}, {None: among(width, both_ways=True, padding_BT=padding_BT)})
        for layer in self.layers:
            x_BTD = layer(x_BTD, step)
        return x_BTD

    def _positions(self, tokens_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        first = self.config.first_position
        real_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if mask_BT is None else mask_BT
        if first:
            real_BT = real_BT & (tokens_BT != first - 1)
        return (real_BT.cumsum(1) * real_BT + (first - 1)).clamp(min=0)
