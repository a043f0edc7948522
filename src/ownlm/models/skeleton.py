"""What the shapes that read tokens have in common: a table of vectors at one end, and at the other what reads the hidden states."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ownlm.models.blocks import matrix, read_out
from ownlm.models.heads import Pooling
from ownlm.models.specs import Task


class Skeleton(nn.Module):
    """`hf` is the config.json the model came with and `pooling` how its files want a text's vector made; both are written back when it is
    saved. `lm_head` None: the embedding is the head, with `lm_head_bias` where there is one. `head` is that of another task.

    Shapes: D hidden, V vocabulary.
    """

    embed_tokens: nn.Module
    lm_head: nn.Linear | None
    lm_head_bias: nn.Parameter | None
    head: nn.Module | None

    def __init__(self, config: Any, hf: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.config, self.hf = config, hf
        self.pooling: Pooling | None = None
        self.lm_head = self.lm_head_bias = self.head = None

    @property
    def numbers(self) -> Tensor:
        """A weight that is never kept in codes: its type is what the model computes in."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; its weights may be kept in less."""
        return self.numbers.dtype

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    @property
    def task(self) -> Task | None:
        """What its head does; None where that is to go on with a text, or there is none."""
        head = getattr(self.config, "head", None)
        return None if head is None else head.task

    @property
    def head_weight(self) -> Tensor:
        """(V, D): head_input(hidden) @ head_weight.T + head_bias are the logits. Made on the spot where it is kept in codes."""
        return matrix(self.embed_tokens if self.lm_head is None else self.lm_head, self.dtype)

    @property
    def head_bias(self) -> Tensor | None:
        return self.lm_head_bias if self.lm_head is None else self.lm_head.bias

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head multiplies: hidden states, scaled."""
        scale = getattr(self.config, "logit_scale", 1.0)
        return hidden if scale == 1.0 else hidden * scale

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…, V) in fp32, the product in the weights' dtype."""
        x = self.head_input(hidden)
        return (read_out(x, self.embed_tokens, self.head_bias) if self.lm_head is None else self.lm_head(x)).float()
