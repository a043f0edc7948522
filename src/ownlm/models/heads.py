"""What reads a model's hidden states: a module for each task, and the pooling that makes one vector of a text.

    hidden_BTD ─► MaskedLMHead (then the embedding) ─► logits_BTV
               ├► SequenceHead ─► logits_BL       ├► TokenHead ─► logits_BTL       └► SpanHead ─► start_BT, end_BT

Shapes: B texts, T tokens, D hidden, L labels, V vocabulary. `mask_BT` is True for real tokens; None: all are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ownlm.models.blocks import ACTIVATIONS, make_norm
from ownlm.models.specs import Activation, Head, Norm

PoolingKind = Literal["mean", "cls", "last"]


class MaskedLMHead(nn.Module):
    """What the embedding is multiplied with: a dense layer, its activation and a norm; and the bias of the vocabulary."""

    def __init__(self, hidden_size: int, vocab_size: int, head: Head, norm: Norm) -> None:
        super().__init__()
        assert head.activation is not None
        self.act = inner(head.activation)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = make_norm(hidden_size, norm)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.norm(self.act(self.dense(hidden)))
        return out


class Pooler(nn.Module):
    """A text's vector: that of its first token through a dense layer (BERT)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_BTD[:, 0]))


class SequenceHead(nn.Module):
    """(B, T, D) -> (B, L): what each text is."""

    def __init__(self, hidden_size: int, head: Head) -> None:
        super().__init__()
        self.head = head
        self.dense = nn.Linear(hidden_size, hidden_size) if head.activation is not None else None
        self.out = nn.Linear(hidden_size, len(head.labels), bias=head.bias)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        x_BD = hidden_BTD[:, 0] if self.head.reads == "first" else last_token(hidden_BTD, mask_BT)
        if self.dense is not None and self.head.activation is not None:
            x_BD = inner(self.head.activation)(self.dense(x_BD))
        logits_BL: Tensor = self.out(x_BD).float()
        return logits_BL


class TokenHead(nn.Module):
    """(B, T, D) -> (B, T, L): what each token is; for padding, noise."""

    def __init__(self, hidden_size: int, head: Head) -> None:
        super().__init__()
        self.out = nn.Linear(hidden_size, len(head.labels), bias=head.bias)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        logits_BTL: Tensor = self.out(hidden_BTD).float()
        return logits_BTL


class SpanHead(nn.Module):
    """(B, T, D) -> two (B, T): how well an answer starts at each token, and how well it ends there; -inf at padding."""

    def __init__(self, hidden_size: int, head: Head) -> None:
        super().__init__()
        self.out = nn.Linear(hidden_size, 2)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        start_BT, end_BT = self.out(hidden_BTD).float().unbind(-1)
        if mask_BT is not None:
            start_BT, end_BT = (x_BT.masked_fill(~mask_BT, float("-inf")) for x_BT in (start_BT, end_BT))
        return start_BT, end_BT


def inner(activation: Activation | Literal["tanh"]) -> Callable[[Tensor], Tensor]:
    """The activation of a head's dense layer."""
    return torch.tanh if activation == "tanh" else ACTIVATIONS[activation]


def make_head(hidden_size: int, vocab_size: int, head: Head, norm: Norm) -> nn.Module:
    """The module of a head."""
    if head.task == "masked_lm":
        return MaskedLMHead(hidden_size, vocab_size, head, norm)
    return {"sequence": SequenceHead, "token": TokenHead, "span": SpanHead}[head.task](hidden_size, head)


def last_token(hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """(B, D): the vector of the last real token of each row."""
    if mask_BT is None:
        return hidden_BTD[:, -1]
    places = torch.arange(mask_BT.shape[1], device=mask_BT.device) * mask_BT
    return hidden_BTD[torch.arange(len(hidden_BTD), device=mask_BT.device), places.argmax(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How a text's vector is made: the mean of its tokens, its first or its last one; scaled to length 1 or not."""

    kind: PoolingKind = "mean"
    normalize: bool = True


def pool(
    hidden_BTD: Tensor, mask_BT: Tensor | None = None, *, kind: PoolingKind = "mean", normalize: bool = True
) -> Tensor:
    """(B, D) float32; `mask_BT` is True for real tokens, None: all are."""
    hidden_BTD = hidden_BTD.float()
    if kind == "cls":
        x_BD = hidden_BTD[:, 0] if mask_BT is None else hidden_BTD[range(len(mask_BT)), mask_BT.int().argmax(1)]
    elif kind == "last":
        x_BD = last_token(hidden_BTD, mask_BT)
    elif mask_BT is None:
        x_BD = hidden_BTD.mean(1)
    else:
        # Not a product with the mask: noise at padding may be infinite.
        total_BD = hidden_BTD.masked_fill(~mask_BT[..., None], 0.0).sum(1)
        x_BD = total_BD / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return F.normalize(x_BD, dim=-1) if normalize else x_BD
